"""What a network holds and what a step costs: parameters by component, operations against torch's counter."""

import dataclasses

import pytest
import torch
from helpers.small_models import SIZES, make_batch, make_model, small, take
from torch.utils.flop_counter import FlopCounterMode

from arplus.config import PAPER_ROWS, PRESETS, ModelConfig, VocabularySizes
from arplus.model.cost import forward_backward_flops, live_parameters, train_only
from arplus.model.network import PersonaTransformer

LIVE = {
    "ar": 23_777_280,
    "arplus": 31_142_449,
    "no-rezero": 31_144_496,
    "no-albert": 44_752_566,
    "no-factor-ff": 32_727_401,
    "no-memn2n": 8_740_633,
    "no-bart-mlm": 31_142_449,
    "ar-weighted": 23_777_793,
    "arplus-weighted": 31_142_962,
}


@pytest.mark.parametrize(
    ("preset", "changes", "live"),
    [
        *((preset, {}, live) for preset, live in LIVE.items()),
        ("arplus", {"shared_stacks": False}, 32_708_858),
        ("arplus", {"shared_stacks": False, "repeats": 1}, 48_372_948),
        ("arplus", {"shared_stacks": False, "repeats": 1, "ff_bottleneck": None}, 67_392_372),
        ("no-rezero", {"shared_stacks": False}, 32_710_904),
        ("ar", {"shared_stacks": False}, 42_691_584),
        ("arplus", {"memory_tying": "layer-wise"}, 21_153_329),
    ],
)
def test_live_parameters(preset, changes, live):
    with torch.device("meta"):
        model = PersonaTransformer(dataclasses.replace(PRESETS[preset].model, **changes), VocabularySizes())
    split = live_parameters(model)
    assert sum(split.values()) == live == sum(p.numel() for p in model.parameters())


def test_live_parameters_by_component():
    with torch.device("meta"):
        model = PersonaTransformer(PRESETS["arplus"].model, VocabularySizes())
    assert live_parameters(model) == {
        "character table": 1_899_600,
        "projections": 3 * 102_912,
        "persona table": 2_002_200,
        "memory": 20_502_528,
        "attention": 1_050_624,
        "feed-forward": 514_760,
        "norms and gates": 1_025,
        "output head": 4_862_976,
    }


@pytest.mark.parametrize(("preset", "expected"), [("ar", 10.3e9), ("arplus", 5.0e9)])
def test_flops_are_those_of_the_best_algorithm(preset, expected):
    flops = forward_backward_flops(PRESETS[preset].model, VocabularySizes())
    assert flops == pytest.approx(expected, rel=0.1)


def counted_and_computed(config: ModelConfig, only: tuple[str, ...] = ()) -> tuple[float, float]:
    """Float operations of a step on one example, by torch and by us."""
    model = make_model(config).train()
    train_only(model, only)
    batch = take(make_batch(config), [0])
    if batch.infilled is not None:
        batch = dataclasses.replace(batch, infilled=batch.response)
    with FlopCounterMode(display=False) as counter:
        losses = model(batch)
        (losses.sum_dialogue + losses.sum_auxiliary).backward()
    lengths = {"context": len(batch.context.ids), "targets": len(batch.target_N), "persona": len(batch.persona.ids)}
    return counter.get_total_flops(), forward_backward_flops(config, SIZES, only=only, **lengths)


@pytest.mark.parametrize("preset", [*sorted(PAPER_ROWS), "adapters"])
def test_flops_agree_with_torchs_counter(preset):
    counted, computed = counted_and_computed(small(preset))
    assert computed == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize("only", [("adapters", "norms and gates"), ("character table", "attention")])
def test_flops_of_a_step_that_trains_a_part_are_as_much_less_as_torch_counts(only):
    (counted, computed), (fewer, ours) = (counted_and_computed(small("adapters"), which) for which in ((), only))
    assert ours / computed == pytest.approx(fewer / counted, rel=0.1)
    assert fewer / counted < 0.9
