"""``--dry-run``: what a training job would do, computed without starting anything."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from arplus import storage
from arplus.config import PEAK_TFLOPS, ExampleRules, TrainConfig, VocabularySizes, to_dict
from arplus.data.dataset import Dataset
from arplus.model.cost import forward_backward_flops, live_parameters, outline
from arplus.pretrained import features, weights
from arplus.training.footprint import activation_bytes, worker_bytes


def report(config: TrainConfig, job: Any = None) -> str:
    """The settings of a job (by default the run), and what the run comes to, as text; errors as of :func:`figures`."""
    return "\n".join([storage.as_json(to_dict(job or config)), *figures(config)])


def figures(config: TrainConfig) -> list[str]:
    """Parameters by component, float operations, memory, steps, hours and cost of a run, as lines.

    Without a data set it takes the paper's vocabulary sizes and rules. Raises :class:`UsageError` where ``--data`` is
    not a prepared data set.
    """
    config = replace(config, model=features.resolved(config.model))
    dataset = Dataset.open(config.data) if config.data else None
    sizes = dataset.sizes if dataset else VocabularySizes()
    rules = dataset.rules if dataset else ExampleRules()
    model = outline(config.model, sizes, config.optimizer.only)
    parts = live_parameters(model)
    lines = [f"live parameters: {sum(parts.values()):,}"]
    lines += [f"  {name:20} {count:>12,}" for name, count in parts.items()]
    if config.optimizer.only:
        trained, of = sum(p.numel() for p in model.parameters() if p.requires_grad), sum(parts.values())
        lines += [f"trained: {trained:,} of {of:,} ({trained / of:.2%})"]
    if frozen := features.frozen_parameters(config.model):
        lines += [f"frozen beside them: {frozen:,} ({4 * frozen / 2**30:.2f} GiB more of each worker's memory)"]
    if dataset is not None and config.init.pretrained is not None:
        lines += ["", weights.initialise(model, dataset.characters, config.init)]
    flops = _flops(config, sizes)
    lines += ["", f"float operations per example: {flops / 1e9:.2f} G (forward and backward, real tokens)"]
    lines += ["", *_memory(config, sizes, rules), ""]
    if dataset is None:
        return [*lines, "steps, hours and cost: unknown without --data"]
    examples = dataset.split("train", config.feed.max_examples).examples
    epoch, steps = -(-examples // config.batch_size), config.total_steps(examples)
    lines += [f"steps: {steps:,} ({epoch:,} per epoch of {examples:,} examples)"]
    return [*lines, *_hours(config, flops, steps * config.batch_size)]


def study_report(
    runs: Sequence[tuple[TrainConfig, int]], dataset: Dataset, concurrency: int | None, *, ends_early: bool
) -> list[str]:
    """Hours, cost and memory of a study's runs, each with its examples, as lines; ``runs`` is not empty."""
    first = runs[0][0]
    each = (_worker_hours(run, _flops(run, dataset.sizes), examples) for run, examples in runs)
    hours, assumed = zip(*each, strict=True)
    total = sum(hours)
    workers, shared = first.world_sizes[-1], first.placement.runs_per_gpu if first.world_sizes[-1] == 1 else 1
    price = first.estimate.price
    cost = "" if price is None else f", cost: {total * price:,.2f} at {price:g} each"
    lines = [f"worker-hours of {len(runs)} runs: {total:,.1f}{cost}"]
    if concurrency is not None:
        least = total / workers / concurrency
        lines += [f"hours with {concurrency} runs side by side: {_span(least, least * shared)}"]
    if shared > 1:
        lines += [
            f"GPU-hours with {shared} runs per GPU: {_span(total / shared, total)}, as they slow each other or not"
        ]
    early = ", no run that ends early" if ends_early else ""
    lines += [f"  (assumed: {assumed[0]}{early}; no loss by more workers, no start-up, validation or interruption)"]
    models = {run.model: run for run, _ in runs}.values()
    largest = max(models, key=lambda run: max(worker_bytes(run, dataset.sizes).values()))
    return [*lines, f"of the largest run ({largest.preset}):", *_memory(largest, dataset.sizes, dataset.rules)]


def _memory(config: TrainConfig, sizes: VocabularySizes, rules: ExampleRules) -> list[str]:
    """A table of the train state per worker, by ZeRO stage and number of workers, and the activations on top."""
    state = worker_bytes(config, sizes)
    workers = config.world_sizes
    shown = sorted({workers[0], workers[len(workers) // 2], workers[-1]})
    lines = ["memory per worker at a step's fullest moment, GiB:"]
    lines += ["  " + f"{'train state, workers:':24}" + "".join(f"{w:>8}" for w in shown)]
    for stage in range(4):
        mark = " (this run's)" if stage in {config.zero_stage_of(w) for w in workers} else ""
        figures = "".join(f"{state[stage, w] / 2**30:8.2f}" for w in shown)
        lines += [f"  {f'ZeRO {stage}':24}{figures}{mark}"]
    micro_batches = {w: _activations(config, sizes, rules, w) for w in shown}
    lines += [f"  {'activations':24}" + "".join(f"{micro_batches[w] / 2**30:8.2f}" for w in shown)]
    return [
        *lines,
        f"  (activations: {' / '.join(str(config.micro_batch_size(w)) for w in shown)} examples of "
        f"{rules.max_context_ids} context characters, the longest there are, in fp32; about half in bf16; "
        "--gradient-accumulation-steps divides them)",
        *_sharing(config, sizes, rules),
    ]


def _sharing(config: TrainConfig, sizes: VocabularySizes, rules: ExampleRules) -> list[str]:
    """What a GPU holds that several runs share, or why those of this one cannot; nothing where none is shared."""
    if (runs := config.placement.runs_per_gpu) == 1:
        return []
    if problem := config.gpu_sharing_problem():
        return [f"on GPUs this would be refused: --gpus-per-worker {problem}"]
    one = worker_bytes(config, sizes)[config.zero_stage_of(1), 1] + _activations(config, sizes, rules, 1)
    return [
        f"memory of a GPU that {runs} runs share (--gpus-per-worker {config.placement.gpus_per_worker:g}): "
        f"{runs * one / 2**30:.2f} GiB, and what CUDA itself takes for {runs} processes"
    ]


def _hours(config: TrainConfig, flops: float, examples: int) -> list[str]:
    """The hours of a run over so many examples, their cost where there is a price, and what both assume."""
    worker_hours, assumed = _worker_hours(config, flops, examples)
    most, least = worker_hours / config.world_sizes[0], worker_hours / config.world_sizes[-1]
    price = config.estimate.price
    cost = "" if price is None else f", cost: {worker_hours * price:,.2f} at {price:g} each"
    return [
        f"hours: {_span(least, most)}, worker-hours: {worker_hours:,.1f}{cost}",
        f"  (assumed: {assumed}; no loss by more workers, no start-up, validation or interruption)",
    ]


def _flops(config: TrainConfig, sizes: VocabularySizes) -> float:
    return forward_backward_flops(config.model, sizes, only=config.optimizer.only)


def _activations(config: TrainConfig, sizes: VocabularySizes, rules: ExampleRules, workers: int) -> int:
    return activation_bytes(config.model, sizes, rules, config.micro_batch_size(workers), config.optimizer.only)


def _span(least: float, most: float) -> str:
    return f"{least:,.1f}" + ("" if least == most else f" to {most:,.1f}")


def _worker_hours(config: TrainConfig, flops: float, examples: int) -> tuple[float, str]:
    """The hours in which one worker trains on so many examples of ``flops`` each, and what that assumes."""
    estimate = config.estimate
    if estimate.examples_per_second is not None:
        rate = estimate.examples_per_second
        assumed = f"{rate:g} examples/s per worker, as given"
    else:
        peak = PEAK_TFLOPS[estimate.gpu]
        rate = peak * 1e12 * estimate.mfu / flops
        assumed = (
            f"{rate:,.0f} examples/s per worker: {estimate.mfu:.0%} of the {peak} TFLOP/s of an {estimate.gpu}, "
            "a guess; --estimate.examples-per-second takes a measured rate instead"
        )
    return examples / rate / 3600, assumed
