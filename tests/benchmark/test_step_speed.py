"""The train and generate benchmarks at sizes of seconds: what they compare, and what their figures mean."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.prepared import write_dataset

from arplus.benchmark import reply_speed, step_speed
from arplus.benchmark.baselines.padded import Padded
from arplus.benchmark.options import GenerateBenchmark, TrainBenchmark
from arplus.benchmark.pool import Pool, examples_of, mean_lengths, padding, random_examples
from arplus.config import ModelConfig, VocabularySizes, special_ids
from arplus.data.examples import SCHEMA
from arplus.errors import UsageError

TINY = ModelConfig(layers=2, repeats=2, d_model=32, embedding_size=16, heads=2, ff_size=48, ff_bottleneck=8)
RUN = step_speed.run_config(64, precision="fp32")


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(random_examples(64 * 32, VocabularySizes()), ModelConfig(), VocabularySizes(), 64)


def test_lengths_are_those_of_training_examples(pool: Pool) -> None:
    batches = [step.micro_batches[0] for step in pool.random(16)]
    assert mean_lengths(batches) == pytest.approx((33.6, 11.4, 8), rel=0.07)
    assert padding(batches) == pytest.approx(0.63, abs=0.04)
    assert all(batch.context.sequences.width <= 7 * 16 for batch in batches)


def test_padding_and_lengths_are_counted_as_other_code_pads(pool: Pool) -> None:
    sizes = VocabularySizes()
    pads = special_ids(sizes.characters).pad, special_ids(sizes.persona_words).pad
    steps = pool.random(3)
    batches = [step.micro_batches[0] for step in steps]
    padded: list[Padded] = step_speed.inputs("paper", steps, RUN, pool)
    real = [sum(int((x != pad).sum()) for x in column) / (3 * 64) for column, pad in (
        ([p.context_BS for p in padded], pads[0]), ([p.target_BT for p in padded], pads[0]),
        ([p.persona_BK for p in padded], pads[1]),
    )]  # fmt: skip
    assert mean_lengths(batches) == pytest.approx(real)
    assert padding(batches) == pytest.approx(1 - real[0] * 3 * 64 / sum(p.context_BS.numel() for p in padded))


def test_all_sides_take_the_same_random_batches(pool: Pool) -> None:
    """Those of a training worker: each example once, blocks by context length, and the targets to divide by."""
    sizes = VocabularySizes()
    steps = pool.random(32)
    ids = torch.cat([step.micro_batches[0].example_id_B for step in steps])
    assert sorted(ids.tolist()) == list(range(64 * 32))
    assert step_speed.inputs("ours", steps, RUN, pool) == steps
    for step, padded in zip(steps, step_speed.inputs("bart", steps, RUN, pool), strict=True):
        (batch,) = step.micro_batches
        lengths = batch.context.sequences.lengths
        assert lengths.equal(lengths.sort().values)
        assert len(batch.context.sequences.blocks) > 1
        assert step.targets == len(batch.target_N) == int((padded.target_BT != special_ids(sizes.characters).pad).sum())


def test_random_examples_are_examples() -> None:
    table = random_examples(50, VocabularySizes())
    assert table.schema == SCHEMA
    sep = special_ids(VocabularySizes().characters).sep
    for row in table.to_pylist():
        assert row["context"].count(sep) == len(row["speakers"])
        assert sum(row["profile_word_counts"]) == len(row["profile_words"])
        assert 1 <= len(row["response"]) <= 15


def test_batches_by_length_stand_for_all(pool: Pool) -> None:
    every, some = pool.by_length(32), pool.by_length(8)
    lengths = [float(batch.context.sequences.lengths.float().mean()) for batch in every]
    assert lengths == sorted(lengths)
    assert sorted(torch.cat([batch.example_id_B for batch in every]).tolist()) == list(range(64 * 32))
    assert mean_lengths(some) == pytest.approx(mean_lengths(every), rel=0.07)
    assert padding(every) < 0.1 < padding([step.micro_batches[0] for step in pool.random(8)])


def test_a_data_set_with_too_few_examples_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, {"train": [[30]]})
    assert len(examples_of(dataset, 20)) == 20
    with pytest.raises(UsageError, match=r"has 30 training examples, and this benchmark takes 31; lower --batch-size"):
        examples_of(dataset, 31)


def test_a_data_sets_examples_are_taken_with_its_own_vocabularies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose special tokens are the last ids of as many as it has."""
    monkeypatch.setattr(step_speed, "peak_memory", lambda *_: 1 << 30)  # what reads it: test_train
    data = write_dataset(tmp_path, {"train": [[300]]}).uri
    few = {"batch_size": 4, "batches": 2, "rounds": 2, "data": data}
    run = replace(step_speed.run_config(4, precision="fp32"), model=TINY)
    assert step_speed.measure(TrainBenchmark(**few), run).figures["examples_per_second"] > 0
    assert reply_speed.measure(GenerateBenchmark(characters=5, **few), TINY).figures["replies_per_second"] > 0


@pytest.mark.processes  # each side measures its peak memory in one of its own
@pytest.mark.parametrize("bart", [True, pytest.param(False, marks=pytest.mark.soak)])
def test_train(bart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if bart:
        pytest.importorskip("transformers", reason="the comparison needs make benchmark-deps")
    else:
        monkeypatch.setitem(sys.modules, "transformers", None)
    run = replace(step_speed.run_config(4, precision="fp32"), model=TINY)
    settings = TrainBenchmark(batch_size=4, batches=2, rounds=2)
    torch.backends.cuda.enable_cudnn_sdp(True)
    result = step_speed.measure(settings, run)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    found, table = result.figures, dict(result.table)
    assert (found["ratio_bart"] is not None) == bart
    assert found["examples_per_second"] > 0
    assert found["examples_per_second_least"] <= found["examples_per_second"]
    assert found["ratio_paper"] > 0
    assert found["peak_memory_bytes"] > 100 << 20, "it holds torch at least"
    assert found["peak_memory_ratio_paper"] > 0
    if not torch.cuda.is_available():
        assert found["mfu"] is None
    gflops = float(table["GFLOP-equivalents per example"].split()[-2])
    assert found["gflop_equivalents_per_example"] == pytest.approx(gflops / found["examples_per_second"], rel=0.2)


def test_generate() -> None:
    settings = GenerateBenchmark(characters=5, batch_size=4, batches=2, rounds=2)
    torch.backends.cuda.enable_cudnn_sdp(True)
    found = reply_speed.measure(settings, TINY).figures
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert found["replies_per_second"] > 0
    assert found["ratio_paper"] > 0
    assert reply_speed.measure(replace(settings, compare=False), TINY).figures["ratio_paper"] is None


def test_each_side_learns() -> None:
    """The compared steps are training steps: the loss of a batch that is seen again and again falls."""
    run = step_speed.run_config(8, precision="fp32")
    run = replace(run, model=TINY, optimizer=replace(run.optimizer, lr=1e-2))
    pool = Pool(random_examples(8, VocabularySizes()), TINY, VocabularySizes(), 8)
    (batch,) = step_speed.inputs("paper", pool.random(1), run, pool)
    losses: list[float] = []
    original = torch.Tensor.backward

    def backward(self: torch.Tensor, *arguments: object, **named: object) -> None:
        losses.append(self.item())
        original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        take = step_speed.train_step("paper", run, VocabularySizes())
        for _ in range(15):
            take(batch)
    assert losses[-1] < 0.8 * losses[0]
