"""The other side of the train benchmark computes what our model computes."""

import pytest
from small_models import SIZES, make_batch, make_model, small

from arplus.benchmark.paper import PaperARPlus, mean_losses, paper_replies
from arplus.config import Sampling, special_ids
from arplus.model.arplus import ARPlus


def same_weights(ours: ARPlus) -> PaperARPlus:
    """The plain model with our model's weights."""
    found = {}
    for name, value in ours.state_dict().items():
        new = name.replace("memory.tables", "tables").replace("gate.r", "r")
        new = new.replace("attention.output", "attention.out_proj").replace("feed_forward.5.", "feed_forward.7.")
        new = new.replace("feed_forward.2.expand_", "feed_forward.2.")
        new = new.replace("feed_forward.2.contract_", "feed_forward.4.")
        for kind in ("context", "auxiliary", "response"):
            new = new.replace(f"{kind}_input.projection", f"projections.{kind}")
        found[new.replace("query_key_value.", "in_proj_")] = value
    theirs = PaperARPlus(ours.config, SIZES).eval()
    theirs.load_state_dict(found)
    return theirs


def test_losses_and_gradients_are_ours():
    ours = make_model(small("arplus"))
    theirs, batch = same_weights(ours), make_batch(ours.config)
    losses = ours(batch)
    dialogue, auxiliary = mean_losses(theirs, batch)
    assert dialogue.item() == pytest.approx((losses.sum_dialogue / losses.count_dialogue).item(), rel=1e-6)
    assert auxiliary.item() == pytest.approx((losses.sum_auxiliary / losses.count_auxiliary).item(), rel=1e-6)
    (losses.sum_dialogue / losses.count_dialogue + 0.5 * losses.sum_auxiliary / losses.count_auxiliary).backward()
    (dialogue + 0.5 * auxiliary).backward()
    for mine, other in ((ours.memory.tables, theirs.tables), (ours.characters, theirs.characters)):
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm()


def test_both_have_the_same_number_of_parameters():
    ours = make_model(small("arplus"))
    assert sum(p.numel() for p in same_weights(ours).parameters()) == sum(p.numel() for p in ours.parameters())


def test_replies_follow_the_model():
    """With a nucleus of one character both sides reply alike."""
    from arplus.model.generate import generate

    ours = make_model(small("arplus"))
    batch = make_batch(ours.config)
    settings = Sampling(top_p=1e-9, max_characters=6, min_characters=0)
    theirs = paper_replies(same_weights(ours), batch, settings, special_ids(SIZES.characters).bos)
    for mine, other in zip(generate(ours, batch, settings).tolist(), theirs.tolist(), strict=True):
        reply = [i for i in mine if i != ours.pad]
        assert reply == other[: len(reply)]
