"""A batch holds what an oracle in plain Python says, and its auxiliary task is the paper's."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.prepared import random_examples
from helpers.small_models import WEIGHTED
from hypothesis import given, settings
from hypothesis import strategies as st

from arplus.config import AR, PAPER_ROWS, PRESETS, ModelConfig, VocabularySizes, special_ids
from arplus.data.collate import BatchSpec, ExampleRng, Window, frame, infill
from arplus.data.examples import SCHEMA
from arplus.data.packing import unpack
from arplus.data.ragged import Ragged
from arplus.model.batch import Batch, Packed

SIZES = VocabularySizes(characters=40, persona_words=30)
IDS = special_ids(SIZES.characters)
PERSONA_IDS = special_ids(SIZES.persona_words)

SPECS = [
    BatchSpec(sizes=SIZES, persona_words=words, infilling=infilling, labels=words and infilling)
    for words in (True, False)
    for infilling in (True, False)
]

# -------------------------------------------------------------------------------------------- examples and an oracle

character = st.integers(0, IDS.pad - 1) | st.just(IDS.unk)
word = st.integers(0, PERSONA_IDS.pad - 1) | st.just(PERSONA_IDS.unk)


@st.composite
def examples(draw: st.DrawFn) -> dict[str, Any]:
    """One row with the invariants of SCHEMA, small enough to shrink well."""
    utterances = draw(st.lists(st.lists(character, max_size=4), min_size=1, max_size=4))
    n_profiles = draw(st.integers(1, len(utterances) + 1))
    profiles = draw(st.lists(st.lists(word, min_size=3, max_size=5), min_size=n_profiles, max_size=n_profiles))
    spelled = draw(st.lists(st.lists(character, min_size=3, max_size=7), min_size=n_profiles, max_size=n_profiles))
    speakers = st.lists(st.integers(0, n_profiles - 1), min_size=len(utterances), max_size=len(utterances))
    return {
        "example_id": draw(st.integers(0, 2**63 - 1)),
        "context": [i for utterance in utterances for i in [*utterance, IDS.sep]],
        "speakers": draw(speakers),
        "response": draw(st.lists(character, min_size=1, max_size=15)),
        "profile_words": [i for profile in profiles for i in profile],
        "profile_word_counts": [len(profile) for profile in profiles],
        "profile_characters": [i for profile in spelled for i in profile],
        "profile_character_counts": [len(profile) for profile in spelled],
        "target_words": draw(st.lists(word, min_size=6, max_size=9)),
        "target_characters": draw(st.lists(character, min_size=9, max_size=14)),
        "persona_related": draw(st.booleans()),
    }


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[dict[str, Any]], pa.Table]:
    """Examples, and the same as a table: in up to three chunks, which do not start where their buffers do."""
    rows = draw(st.lists(examples(), min_size=1, max_size=7))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=2)))
    whole = pa.Table.from_pylist([rows[-1], *rows], SCHEMA).slice(1)
    parts = [whole.slice(a, b - a) for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    return rows, pa.concat_tables(parts)


def infilled(response: list[int], kind: float, place: float) -> list[int]:
    """One framed response of length l with its span replaced, said as the guide says it."""
    length = len(response)
    if length == 3:
        return response
    span = 1 if length < 6 else 2 if kind < 0.99 else 0
    starts = range(1, length - span)  # 1 … l - span - 1
    start = starts[int(place * len(starts))]
    return [*response[:start], IDS.mask, *response[start + span :]]


def oracle(rows: list[dict[str, Any]], spec: BatchSpec, rng: ExampleRng) -> dict[str, Any]:
    """What a batch must hold, row by row and character by character."""
    kind = "word" if spec.persona_words else "character"
    speakers_of: list[list[int]] = []
    profiles: list[list[int]] = []
    responses: list[list[int]] = []
    for row in rows:
        speakers = iter(row["speakers"])
        speaker, at_end = -1, True
        whose = []
        for i in row["context"]:
            if at_end:
                speaker = next(speakers)
            whose.append(len(profiles) + speaker)
            at_end = i == IDS.sep
        speakers_of.append(whose)
        items = iter(row[f"profile_{kind}s"])
        profiles += [[next(items) for _ in range(count)] for count in row[f"profile_{kind}_counts"]]
        responses.append([IDS.bos, *row["response"], IDS.eos])
    expected: dict[str, Any] = {
        "example_id_B": [row["example_id"] for row in rows],
        "context": [row["context"] for row in rows],
        "speaker_N": speakers_of,
        "profiles": profiles,
        "persona": [row[f"target_{kind}s"] for row in rows],
        "response": [r[:-1] for r in responses],
        "target_N": [r[1:] for r in responses],
        "infilled": None,
        "persona_related_B": [int(row["persona_related"]) for row in rows] if spec.labels else None,
    }
    if spec.infilling:
        numbers = [rng.uniform(np.array([row["example_id"]])) for row in rows]
        expected["infilled"] = [
            infilled(r, float(k[0]), float(p[0])) for r, (k, p) in zip(responses, numbers, strict=True)
        ]
    return expected


def found(batch: Batch) -> dict[str, Any]:
    """A batch in the oracle's form; what lies along the sequences of a field is cut as they are."""

    def lists(packed: Packed, values: torch.Tensor | None = None) -> list[list[int]]:
        parts = (packed.ids if values is None else values).split(packed.sequences.lengths.tolist())
        return [part.tolist() for part in parts]

    return {
        "example_id_B": batch.example_id_B.tolist(),
        "context": lists(batch.context),
        "speaker_N": lists(batch.context, batch.speaker_N),
        "profiles": lists(batch.profiles),
        "persona": lists(batch.persona),
        "response": lists(batch.response),
        "target_N": lists(batch.response, batch.target_N),
        "infilled": batch.infilled and lists(batch.infilled),
        "persona_related_B": None if batch.persona_related_B is None else batch.persona_related_B.tolist(),
    }


# -------------------------------------------------------------------------------------------------------- the window


@pytest.mark.parametrize("spec", SPECS, ids=lambda x: f"words={x.persona_words}-infilling={x.infilling}")
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_batch_of_any_rows_in_any_order_is_the_oracles(spec: BatchSpec, data: st.DataObject) -> None:
    rows, table = data.draw(tables())
    window = Window(table.select(spec.columns), spec)
    assert len(window) == len(rows)
    assert window.targets.tolist() == [len(row["response"]) + 1 for row in rows]
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9))
    rng = ExampleRng(data.draw(st.integers(0, 2**63 - 1)), data.draw(st.integers(0, 99)))
    batch = window.batch(np.array(chosen, np.int64), rng)
    assert found(batch) == oracle([rows[i] for i in chosen], spec, rng)
    assert batch.example_id_B.dtype == torch.int64
    ids = [batch.speaker_N, batch.target_N, batch.context.ids, batch.profiles.ids, batch.persona.ids]
    assert {t.dtype for t in ids} == {torch.int32}
    for packed in (batch.context, batch.profiles, batch.persona, batch.response, batch.infilled):
        assert packed is None or len(packed.sequences.blocks) == 1


@pytest.mark.parametrize("spec", SPECS[:1] + SPECS[-1:], ids=["words", "characters"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_micro_batches_at_once_are_the_oracles_one_by_one(spec: BatchSpec, data: st.DataObject) -> None:
    rows, table = data.draw(tables())
    window = Window(table.select(spec.columns), spec)
    one = st.lists(st.integers(0, len(rows) - 1), max_size=5)
    chosen = data.draw(st.lists(one, min_size=1, max_size=5))
    rng = ExampleRng(data.draw(st.integers(0, 2**63 - 1)), data.draw(st.integers(0, 99)))
    flat = window.micro_batches(
        np.array([i for part in chosen for i in part], np.int64), np.array([len(part) for part in chosen]), rng
    )
    for form in (flat, flat.narrowed()):
        batches = [found(batch) for batch in unpack(form)]
        assert batches == [oracle([rows[i] for i in part], spec, rng) for part in chosen]


def test_a_missing_speaker_is_caught() -> None:
    row = example(random.Random(0), response_length=3)
    row["speakers"].pop()
    with pytest.raises(AssertionError, match="has a speaker"):
        Window(pa.Table.from_pylist([row], SCHEMA), SPECS[0])


@pytest.mark.parametrize("name", [*PAPER_ROWS, *WEIGHTED])
def test_a_spec_reads_what_the_model_reads(name: str) -> None:
    model: ModelConfig = PRESETS[name].model
    spec = BatchSpec.of(model, SIZES)
    assert spec.persona_words == (name not in ("ar", "no-memn2n", "ar-weighted"))
    assert spec.infilling == (name not in ("ar", "no-bart-mlm", "ar-weighted"))
    assert ("persona_related" in spec.columns) == (name in WEIGHTED)
    assert set(spec.columns) <= set(SCHEMA.names)
    assert ("profile_words" in spec.columns) != ("profile_characters" in spec.columns)


def example(rng: random.Random, response_length: int) -> dict[str, Any]:
    """A random example of two utterances and two profiles."""

    def some(n: int, high: int = PERSONA_IDS.pad) -> list[int]:
        return [rng.randrange(high) for _ in range(n)]

    first, second = rng.randrange(1, 9), rng.randrange(1, 9)
    return {
        "example_id": rng.randrange(2**63),
        "context": [*some(first), IDS.sep, *some(second), IDS.sep],
        "speakers": [1, 0],
        "response": some(response_length),
        "profile_words": some(7),
        "profile_word_counts": [4, 3],
        "profile_characters": some(11),
        "profile_character_counts": [5, 6],
        "target_words": some(7),
        "target_characters": some(13),
    }


# -------------------------------------------------------------------------------------------------- frame and infill


def ragged(lists: Sequence[Sequence[int]]) -> Ragged:
    """Lists end to end, in the order given."""
    lengths = np.array([len(values) for values in lists], np.int64)
    values = np.array([i for values in lists for i in values], np.int32)
    return Ragged(values, np.cumsum(lengths) - lengths, lengths)


def unragged(values: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(values, np.cumsum(lengths))[:-1]]


@given(st.lists(st.lists(character, max_size=15), max_size=6), st.data())
@settings(deadline=None)
def test_lists_are_taken_in_any_order(lists: list[list[int]], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=9)) if lists else []
    assert unragged(*ragged(lists).take(np.array(rows, np.int64))) == [lists[i] for i in rows]


@given(st.lists(st.lists(character, max_size=15), max_size=6))
@settings(deadline=None)
def test_frame_puts_bos_and_eos_around(responses: list[list[int]]) -> None:
    framed = frame(ragged(responses), IDS)
    assert framed.starts.tolist() == (np.cumsum(framed.lengths) - framed.lengths).tolist()
    assert unragged(framed.values, framed.lengths) == [[IDS.bos, *r, IDS.eos] for r in responses]


def fill(responses: list[list[int]], kind: Sequence[float], place: Sequence[float]) -> list[list[int]]:
    """Infilled framed responses."""
    return unragged(*infill(ragged(responses), IDS, np.array(kind, float), np.array(place, float)))


unit = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.99, np.nextafter(0.99, 0), np.nextafter(1, 0)])


@given(st.lists(st.tuples(st.lists(character, min_size=1, max_size=15), unit, unit), min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_infill_is_the_oracles_and_keeps_the_frame(drawn: list[tuple[list[int], float, float]]) -> None:
    responses = [[IDS.bos, *characters, IDS.eos] for characters, _, _ in drawn]
    filled = fill(responses, [kind for _, kind, _ in drawn], [place for _, _, place in drawn])
    assert filled == [infilled(r, kind, place) for r, (_, kind, place) in zip(responses, drawn, strict=True)]
    for before, after in zip(responses, filled, strict=True):
        assert (after[0], after[-1]) == (IDS.bos, IDS.eos)
        assert after.count(IDS.mask) == (len(before) > 3)


@pytest.mark.parametrize(
    ("length", "kind", "infilled_length"),
    [(3, 0.0, 3), (3, 0.995, 3), (4, 0.0, 4), (4, 0.995, 4), (5, 0.5, 5), (6, 0.98, 5), (6, 0.99, 7), (17, 0.5, 16)],
)
def test_the_span_depends_on_the_length(length: int, kind: float, infilled_length: int) -> None:
    response = [IDS.bos, *range(length - 2), IDS.eos]
    for place in (0.0, 0.5, 0.999):
        (filled,) = fill([response], [kind], [place])
        assert len(filled) == infilled_length
        lost = length - infilled_length + 1 if IDS.mask in filled else 0
        assert [i for i in filled if i != IDS.mask] == [i for i in response if i in filled]
        assert len(set(response) - set(filled)) == lost


def test_an_insertion_comes_about_once_in_a_hundred() -> None:
    n = 40_000
    kind, place = ExampleRng(seed=11, epoch=0).uniform(np.arange(n))
    lengths = Counter(map(len, fill([[IDS.bos, 1, 2, 3, 4, IDS.eos]] * n, kind.tolist(), place.tolist())))
    assert set(lengths) == {5, 7}
    assert abs(lengths[7] - 0.01 * n) < 4 * math.sqrt(n * 0.01 * 0.99)


@pytest.mark.parametrize("length", [4, 5, 6, 9, 17])
@pytest.mark.parametrize("insert", [False, True])
def test_the_start_is_uniform(length: int, insert: bool) -> None:
    span = 1 if length < 6 else 0 if insert else 2
    n, places = 20_000, range(1, length - span)
    _, place = ExampleRng(seed=5, epoch=2).uniform(np.arange(n))
    response = [IDS.bos, *range(length - 2), IDS.eos]
    filled = fill([response] * n, [0.995 if insert else 0.5] * n, place.tolist())
    starts = Counter(row.index(IDS.mask) for row in filled)
    assert set(starts) == set(places)
    expected = n / len(places)
    chi_square = sum((starts[i] - expected) ** 2 / expected for i in places)
    freedom = len(places) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 1  # mean and 4 standard deviations of chi-square


# ------------------------------------------------------------------------------------------------------------- draws

ids = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20)


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), ids, st.randoms())
@settings(deadline=None)
def test_draws_depend_on_seed_epoch_and_id_alone(seed: int, epoch: int, ids: list[int], rng: random.Random) -> None:
    kind, place = ExampleRng(seed, epoch).uniform(np.array(ids))
    order = rng.sample(range(len(ids)), len(ids))
    for i in order:
        alone = ExampleRng(seed, epoch).uniform(np.array([ids[i]]))
        assert (alone[0][0], alone[1][0]) == (kind[i], place[i])
    shuffled = ExampleRng(seed, epoch).uniform(np.array(ids)[order])
    assert np.array_equal(shuffled[0], kind[order])
    assert ((kind >= 0) & (kind < 1) & (place >= 0) & (place < 1)).all()


def test_draws_change_with_each_of_seed_epoch_and_id_and_look_independent() -> None:
    n = 20_000
    base = ExampleRng(1, 0)
    columns = [
        *base.uniform(np.arange(n)),
        *base.uniform(np.arange(n, 2 * n)),
        *ExampleRng(1, 1).uniform(np.arange(n)),
        *ExampleRng(2, 0).uniform(np.arange(n)),
        *ExampleRng(0, 1).uniform(np.arange(n)),
    ]
    for column in columns:
        assert abs(column.mean() - 0.5) < 5 / math.sqrt(12 * n)
        assert abs(column.std() - math.sqrt(1 / 12)) < 0.01
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    assert abs(correlations).max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("model", [ModelConfig(), AR], ids=["words", "characters"])
def test_personas_of_others(model: ModelConfig) -> None:
    """As if the other's persona had been written into the table, its target and its profile 0."""
    spec = BatchSpec.of(model, VocabularySizes(characters=49, persona_words=34))
    table = random_examples(range(20)).select(spec.columns)
    profiles, counts, target = spec.persona_columns
    rows = table.to_pylist()
    other = np.roll(np.arange(20), 7)
    written = []
    for row, theirs in zip(rows, (rows[i] for i in other), strict=True):
        own, new = row[counts][0], theirs[counts][0]
        row = row | {target: theirs[target], counts: [new, *row[counts][1:]]}
        written.append(row | {profiles: theirs[profiles][:new] + row[profiles][own:]})
    taken = np.array([3, 19, 7, 0, 11])
    window = Window(table, spec)
    before = window.batch(taken, ExampleRng(0, 0))
    swapped = window.with_personas_of(other).batch(taken, ExampleRng(0, 0))
    expected = Window(pa.Table.from_pylist(written, table.schema), spec).batch(taken, ExampleRng(0, 0))
    for name in ("context", "persona", "response", "infilled", "profiles"):
        mine, theirs = getattr(swapped, name), getattr(expected, name)
        if theirs is not None:
            assert mine.ids.tolist() == theirs.ids.tolist(), name
            assert mine.sequences.lengths.tolist() == theirs.sequences.lengths.tolist(), name
    assert swapped.speaker_N.tolist() == expected.speaker_N.tolist()
    assert swapped.persona.ids.tolist() != before.persona.ids.tolist()
    assert before.persona.ids.tolist() == window.batch(taken, ExampleRng(0, 0)).persona.ids.tolist()
