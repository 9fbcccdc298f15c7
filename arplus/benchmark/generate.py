"""Replies: a whole batch in one tensor program with cached keys and values, against the paper's loop, interleaved.

Ours are a window's batches as evaluation takes them: in order of context length, evenly spaced ones, since they differ
several times in cost. The paper's loop gets random ones.
"""

from statistics import median

import torch

from arplus import kernels
from arplus.benchmark import sides
from arplus.benchmark.machine import matmul_gflops
from arplus.benchmark.padded import Padded
from arplus.benchmark.paper import PaperARPlus, paper_replies
from arplus.benchmark.pool import Pool
from arplus.benchmark.report import Result, rate
from arplus.benchmark.settings import WINDOW, GenerateBenchmark
from arplus.benchmark.train import timed
from arplus.config import ModelConfig, Sampling, VocabularySizes, special_ids
from arplus.evaluation.evaluate import autocast
from arplus.kernels.gpu import leave_cudnn_out
from arplus.model.batch import Batch
from arplus.model.generate import generate
from arplus.model.network import PersonaTransformer


def measure(config: GenerateBenchmark, model_config: ModelConfig | None = None) -> Result:
    """Measures in this process; ``model_config`` replaces AR+ at its real size (tests do)."""
    leave_cudnn_out()
    network, sizes, device = model_config or ModelConfig(), VocabularySizes(), sides.device()
    # Random weights must not end a reply: what is measured are replies of full length.
    sampling = Sampling(max_characters=config.characters, min_characters=config.characters)
    pool = Pool.of(config, network, sizes, WINDOW * config.batch_size)
    mine = [batch.to(device) for batch in pool.by_length(config.batches)]
    pads = special_ids(sizes.characters).pad, special_ids(sizes.persona_words).pad
    theirs = [Padded.of(step.micro_batches[0], *pads).to(device) for step in pool.random(min(config.rounds, WINDOW))]
    torch.manual_seed(0)
    model, paper = PersonaTransformer(network, sizes).to(device), PaperARPlus(network, sizes).to(device)
    kernels.use(model, device)
    bos = special_ids(sizes.characters).bos

    def reply(batch: Batch) -> None:
        with autocast(device):
            generate(model, batch, sampling)

    reply(mine[0])
    ours, plain, gflops = [], [], []
    for i in range(config.rounds):
        gflops.append(matmul_gflops())
        ours.append(timed(reply, mine) / len(mine))
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
            ("ours", f"{rate(replies_per_second)} replies/s ({median(ours):.3g} s per batch, {min(ours):.3g} at best)"),
            ("paper's loop", f"{config.batch_size / median(plain):.3g} replies/s" if plain else "left out"),
            ("ratio plain", f"{ratio:.1f}" if ratio else "none"),
            ("GFLOP-equivalents per reply", f"{median(gflops) / replies_per_second:.2f}"),
        ],
    )
