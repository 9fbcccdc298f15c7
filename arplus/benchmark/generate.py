"""Replies: a whole batch in one tensor program with cached keys and values, against the paper's loop, interleaved."""

from dataclasses import dataclass
from statistics import median
from typing import Annotated

import torch
from annotated_types import Gt

from arplus.benchmark import sides
from arplus.benchmark.machine import matmul_gflops
from arplus.benchmark.paper import PaperARPlus, paper_replies
from arplus.benchmark.pool import PoolBenchmark
from arplus.benchmark.report import Result, rate
from arplus.benchmark.train import timed
from arplus.config import ExampleRules, ModelConfig, Sampling, VocabularySizes, special_ids
from arplus.model.arplus import ARPlus
from arplus.model.attention import leave_cudnn_out
from arplus.model.generate import generate


@dataclass(frozen=True, kw_only=True)
class GenerateBenchmark(PoolBenchmark):
    """Measures replies of AR+ at its real size with random weights, all of the same length."""

    characters: Annotated[int, Gt(0)] = ExampleRules.max_utterance_characters
    """Characters of every reply."""
    rounds: Annotated[int, Gt(0)] = 3
    """Rounds that the medians are taken of, after one batch of ours that is not counted."""
    compare: bool = True
    """Whether the paper's loop is measured too, which takes most of the time."""


def measure(config: GenerateBenchmark, model_config: ModelConfig | None = None) -> Result:
    """Measures in this process; ``model_config`` replaces AR+ at its real size (tests do)."""
    leave_cudnn_out()
    network, sizes, device = model_config or ModelConfig(), VocabularySizes(), sides.device()
    # Random weights must not end a reply: what is measured are replies of full length.
    sampling = Sampling(max_characters=config.characters, min_characters=config.characters)
    pool = config.pool(network, sizes)
    mine = [step.micro_batches[0].to(device) for step in pool.sorted(config.batches)]
    theirs = [step.micro_batches[0].to(device) for step in pool.random(min(config.rounds, config.window_batches))]
    torch.manual_seed(0)
    model, paper = ARPlus(network, sizes).to(device), PaperARPlus(network, sizes).to(device)
    bos = special_ids(sizes.characters).bos

    generate(model, mine[0], sampling)
    ours, plain, gflops = [], [], []
    for i in range(config.rounds):
        gflops.append(matmul_gflops())
        ours.append(timed(lambda batch: generate(model, batch, sampling), mine) / len(mine))
        if config.compare:
            batch = theirs[i % len(theirs)]
            plain.append(timed(lambda batch: paper_replies(paper, batch, sampling, bos), [batch]))
    ratio = median(p / o for p, o in zip(plain, ours, strict=True)) if config.compare else None
    replies_per_second = config.batch_size / median(ours)
    return Result(
        figures={
            "replies_per_second": replies_per_second,
            "replies_per_second_least": config.batch_size / max(ours),
            "ratio_plain": ratio,
            "gflop_equivalents_per_reply": median(gflops) / replies_per_second,
        },
        table=[
            ("replies", f"{config.characters} characters each, batch {config.batch_size}"),
            ("ours", f"{rate(replies_per_second)} replies/s ({median(ours):.3g} s a batch, {min(ours):.3g} at best)"),
            ("paper's loop", f"{config.batch_size / median(plain):.3g} replies/s" if plain else "left out"),
            ("ratio plain", f"{ratio:.1f}" if ratio else "none"),
            ("GFLOP-equivalents a reply", f"{median(gflops) / replies_per_second:.2f}"),
        ],
    )
