"""The paper's code computes what our model computes, from the same batches padded."""

import pytest
from helpers.small_models import SIZES, make_batch, make_model, small

from arplus.benchmark.baselines.padded import Padded
from arplus.benchmark.baselines.paper_code import PaperARPlus, mean_losses, paper_replies
from arplus.config import Sampling, special_ids
from arplus.model.batch import Batch
from arplus.model.generate import generate
from arplus.model.network import PersonaTransformer

IDS = special_ids(SIZES.characters)
PERSONA_PAD = special_ids(SIZES.persona_words).pad
THEIR_NAMES = {
    "memory.tables": "tables",
    "_input.projection": "",
    "attention.output": "attention.out_proj",
    "query_key_value.": "in_proj_",
    "feed_forward.narrow": "feed_forward.0",
    "feed_forward.expand": "feed_forward.2",
    "feed_forward.contract": "feed_forward.4",
    "feed_forward.widen": "feed_forward.7",
}


def their_name(name: str) -> str:
    """A parameter of ours in the plain model."""
    for ours, theirs in THEIR_NAMES.items():
        name = name.replace(ours, theirs)
    return f"projections.{name}" if name.split(".")[0] in ("context", "auxiliary", "response") else name


def same_weights(ours: PersonaTransformer) -> PaperARPlus:
    """The plain model with our model's weights."""
    theirs = PaperARPlus(ours.config, SIZES).eval()
    theirs.load_state_dict({their_name(name): value for name, value in ours.state_dict().items()})
    return theirs


def padded(batch: Batch) -> Padded:
    return Padded.of(batch, SIZES)


def test_a_padded_batch_has_the_same_rows():
    batch = make_batch(small("arplus"), 7)
    rows = padded(batch)
    B = len(batch.example_id_B)
    for values_N, of, tensor, filler in (
        (batch.context.ids, batch.context.sequences, rows.context_BS, IDS.pad),
        (batch.speaker_N, batch.context.sequences, rows.speaker_BS, 0),
        (*batch.profiles, rows.profiles_PW, PERSONA_PAD),
        (*batch.persona, rows.persona_BK, PERSONA_PAD),
        (*batch.response, rows.response_BT, IDS.pad),
        (batch.target_N, batch.response.sequences, rows.target_BT, IDS.pad),
        (*batch.infilled, rows.infilled_BU, IDS.pad),
    ):
        lengths = of.lengths.tolist()
        assert tensor.shape == (len(lengths), max(lengths))
        assert tensor.dtype == values_N.dtype
        ends = of.offsets.tolist()
        for row, length, end in zip(tensor.tolist(), lengths, ends[1:], strict=True):
            assert row == values_N[end - length : end].tolist() + [filler] * (tensor.shape[1] - length)
    assert rows.context_BS.shape[0] == B
    assert padded(make_batch(small("ar"), 2)).infilled_BU is None


@pytest.mark.parametrize("seed", [1, 2])
def test_losses_and_gradients_are_ours(seed: int):
    ours = make_model(small("arplus"), seed)
    theirs, batch = same_weights(ours), make_batch(ours.config, 9, seed)
    losses = ours(batch)
    own = [loss / len(batch.target_N) for loss in losses[:2]]
    plain = mean_losses(theirs, padded(batch))
    for a, b in zip(own, plain, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-6)
    for dialogue, auxiliary in (own, plain):
        (dialogue + 0.5 * auxiliary).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = gradients.pop(their_name(name))
        assert expected.norm() > 0, name
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), name
    assert not gradients


def test_both_have_the_same_number_of_parameters():
    ours = make_model(small("arplus"))
    assert sum(p.numel() for p in same_weights(ours).parameters()) == sum(p.numel() for p in ours.parameters())


def test_replies_follow_the_model():
    """With a nucleus of one character both sides reply alike."""
    ours = make_model(small("arplus"))
    batch = make_batch(ours.config)
    settings = Sampling(top_p=1e-9, max_characters=6, min_characters=0)
    theirs = paper_replies(same_weights(ours), padded(batch), settings, IDS.bos)
    assert theirs.shape == (5, 6)
    for mine, other in zip(generate(ours, batch, settings).tolist(), theirs.tolist(), strict=True):
        reply = [i for i in mine if i != IDS.pad]
        assert reply == other[: len(reply)]
        assert len(reply) == 6 or other[len(reply)] >= IDS.pad
