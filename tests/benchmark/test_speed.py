"""The train and generate benchmarks at sizes of seconds: what they compare, and what their figures mean."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from arplus.benchmark import generate, sides, train
from arplus.benchmark.pool import Pool, random_examples, real_lengths
from arplus.config import ModelConfig, VocabularySizes, special_ids
from arplus.data.examples import SCHEMA

TINY = ModelConfig(layers=2, groups=2, d_model=32, embedding_size=16, heads=2, ff_size=48, ff_bottleneck=8)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(random_examples(64 * 32, VocabularySizes()), ModelConfig(), VocabularySizes(), 64)


def test_lengths_are_those_of_training_examples(pool: Pool) -> None:
    steps = pool.random(16)
    sizes = VocabularySizes()
    lengths = real_lengths(
        [s.micro_batches[0] for s in steps], pool.pad, special_ids(sizes.persona_words).pad
    )  # fmt: skip
    assert lengths == pytest.approx((33.6, 11.4, 8), rel=0.07)
    assert pool.padding(steps) == pytest.approx(0.63, abs=0.04)
    for step in steps:
        (batch,) = step.micro_batches
        assert batch.context_BS.shape[1] <= 7 * 16
        assert step.targets == int((batch.response_BT[:, 1:] != pool.pad).sum())


def test_random_examples_are_examples() -> None:
    table = random_examples(50, VocabularySizes())
    assert table.schema == SCHEMA
    sep = special_ids(VocabularySizes().characters).sep
    for row in table.to_pylist():
        assert row["context"].count(sep) == len(row["speakers"])
        assert sum(row["profile_word_counts"]) == len(row["profile_words"])
        assert 1 <= len(row["response"]) <= 15


def test_the_sorted_batches_stand_for_all(pool: Pool) -> None:
    every, some = pool.sorted(32), pool.sorted(8)

    def slots(steps: list) -> float:
        batches = [step.micro_batches[0] for step in steps]
        return float(np.mean([b.context_BS.shape[1] + 3 * b.response_BT.shape[1] for b in batches]))

    ids = torch.cat([step.micro_batches[0].example_id_B for step in every])
    assert sorted(ids.tolist()) == list(range(64 * 32))
    assert slots(some) == pytest.approx(slots(every), rel=0.05)
    assert pool.padding(every) < 0.2 < pool.padding(pool.random(8))


@pytest.mark.parametrize("bart", [True, False])
def test_train(bart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if bart:
        pytest.importorskip("transformers", reason="the comparison needs make benchmark-deps")
    else:
        monkeypatch.setitem(sys.modules, "transformers", None)
    run = replace(sides.run_config("fp32", 0, 4), model=TINY)
    settings = train.TrainBenchmark(batch_size=4, window_batches=8, batches=2, rounds=2)
    torch.backends.cuda.enable_cudnn_sdp(True)
    result = train.measure(settings, run)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    found, table = result.figures, dict(result.table)
    assert (found["ratio_bart"] is not None) == bart
    assert found["examples_per_second"] > 0
    assert found["examples_per_second_least"] <= found["examples_per_second"]
    assert 0.1 < found["ratio_plain"] < 10, "there is nothing to save at this size"
    assert 100 << 20 < found["peak_memory_bytes"] < 3 << 30
    assert found["peak_memory_ratio_plain"] > 0.5, "both hold torch at least"
    if not torch.cuda.is_available():
        assert found["mfu"] is None
    gflops = float(table["GFLOP-equivalents an example"].split()[-2])
    assert found["gflop_equivalents_per_example"] == pytest.approx(gflops / found["examples_per_second"], rel=0.2)


def test_generate() -> None:
    settings = generate.GenerateBenchmark(characters=5, batch_size=4, window_batches=8, batches=2, rounds=2)
    torch.backends.cuda.enable_cudnn_sdp(True)
    found = generate.measure(settings, TINY).figures
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert found["replies_per_second"] > 0
    assert found["ratio_plain"] > 0
    assert generate.measure(replace(settings, compare=False), TINY).figures["ratio_plain"] is None


def test_each_side_learns() -> None:
    """The compared steps are training steps: the loss of a batch that is seen again and again falls."""
    run = sides.run_config("fp32", 0, 8)
    run = replace(run, model=TINY, optimizer=replace(run.optimizer, lr=1e-2))
    (step,) = Pool(random_examples(8, VocabularySizes()), TINY, VocabularySizes(), 8).random(1)
    losses: list[float] = []
    original = torch.Tensor.backward

    def backward(self: torch.Tensor, *arguments: object, **named: object) -> None:
        losses.append(self.item())
        original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        take = sides.train_step("plain", run, VocabularySizes())
        for _ in range(15):
            take(step)
    assert losses[-1] < 0.8 * losses[0]
