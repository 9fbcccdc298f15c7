"""How fast replies are: a whole batch in one tensor program with cached keys and values, beside the paper's loop.

Ours are a window's batches as evaluation takes them: in order of context length, evenly spaced ones, since they differ
several times in cost. The paper's loop gets random ones.
"""

from itertools import cycle
from statistics import median

import torch

from arplus import kernels
from arplus.benchmark.baselines.padded import Padded
from arplus.benchmark.baselines.paper_code import PaperARPlus, paper_replies
from arplus.benchmark.figures import Result, rate
from arplus.benchmark.options import WINDOW, GenerateBenchmark
from arplus.benchmark.pool import pool_of
from arplus.benchmark.step_speed import device
from arplus.benchmark.usage import interleaved
from arplus.config import ModelConfig, Sampling, special_ids
from arplus.evaluation.evaluate import PAPER_BATCH, autocast
from arplus.kernels.gpu import leave_cudnn_out
from arplus.model.batch import Batch
from arplus.model.generate import generate
from arplus.model.network import PersonaTransformer


def measure(config: GenerateBenchmark, model_config: ModelConfig | None = None) -> Result:
    """Measures in this process; ``model_config`` replaces AR+ at its real size (tests do)."""
    leave_cudnn_out()
    network, there = model_config or ModelConfig(), device()
    # Random weights must not end a reply: what is measured are replies of full length.
    sampling = Sampling(max_characters=config.characters, min_characters=config.characters)
    size = config.batch_size
    # Evaluation's windows are of so many examples, whatever it takes of them at a time.
    examples = max(WINDOW * min(size, PAPER_BATCH), config.batches * size)
    pool = pool_of(config, network, examples)
    sizes = pool.sizes
    mine = [batch.to(there) for batch in pool.by_length(config.batches)]
    steps = pool.random(min(config.rounds, examples // size))
    theirs = cycle([Padded.of(step.micro_batches[0], sizes).to(there) for step in steps])
    torch.manual_seed(0)
    model, paper = PersonaTransformer(network, sizes).to(there), PaperARPlus(network, sizes).to(there)
    kernels.use(model, there)
    model.fold()

    def ours(batches: list[Batch] = mine) -> None:
        for batch in batches:
            with autocast(there):
                generate(model, batch, sampling)

    def papers() -> None:
        paper_replies(paper, next(theirs), sampling, special_ids(sizes.characters).bos)

    ours(mine[:1])
    times, gflops = interleaved({"ours": ours} | ({"paper": papers} if config.compare else {}), config.rounds)
    own = [t / len(mine) for t in times["ours"]]
    ratio = median(p / o for p, o in zip(times["paper"], own, strict=True)) if config.compare else None
    replies_per_second = config.batch_size / median(own)
    loop = f"{config.batch_size / median(times['paper']):.3g} replies/s" if config.compare else "left out"
    return Result(
        figures={
            "replies_per_second": replies_per_second,
            "replies_per_second_least": config.batch_size / max(own),
            "ratio_paper": ratio,
            "gflop_equivalents_per_reply": gflops / replies_per_second,
        },
        table=[
            ("replies", f"{config.characters} characters each, batch {config.batch_size}"),
            ("ours", f"{rate(replies_per_second)} replies/s ({median(own):.3g} s per batch, {min(own):.3g} at best)"),
            ("paper's loop", loop),
            ("ratio paper", f"{ratio:.1f}" if ratio else "none"),
            ("GFLOP-equivalents per reply", f"{gflops / replies_per_second:.2f}"),
        ],
    )
