"""What a training job would do, computed without starting anything."""

import json

import torch

from arplus.config import TrainConfig, VocabularySizes, to_dict
from arplus.data.dataset import Dataset
from arplus.model.arplus import ARPlus
from arplus.model.cost import forward_backward_flops, live_parameters


def report(config: TrainConfig) -> str:
    """The resolved configuration, parameters by component, float operations, steps and memory, as text.

    Without a data set it takes the paper's vocabulary sizes. Raises :class:`UserError` where the data set is none.
    """
    dataset = Dataset.open(config.data) if config.data else None
    sizes = dataset.sizes if dataset else VocabularySizes()
    with torch.device("meta"):
        parts = live_parameters(ARPlus(config.model, sizes))
    total = sum(parts.values())
    lines = [json.dumps(to_dict(config), ensure_ascii=False, indent=2), "", f"live parameters: {total:,}"]
    lines += [f"  {name:20} {count:>12,}" for name, count in parts.items()]
    flops = forward_backward_flops(config.model, sizes)
    lines += ["", f"float operations an example: {flops / 1e9:.2f} G (forward and backward, real tokens)"]
    if dataset:
        examples = dataset.split("train").examples
        steps = -(-examples // config.batch_size)
        run = steps * config.epochs if config.max_steps is None else min(steps * config.epochs, config.max_steps)
        lines += [f"steps: {run:,} ({steps:,} an epoch of {examples:,} examples)"]
    else:
        lines += ["steps: unknown without --data"]
    return "\n".join([*lines, f"memory a worker for the train state: {state_bytes(config, total) / 2**20:,.0f} MiB"])


def state_bytes(config: TrainConfig, parameters: int) -> float:
    """Bytes of weights, gradients and moments on one worker, all fp32, as the ZeRO stage partitions them.

    Activations come on top; they grow with the micro-batch.
    """
    weights, gradients, moments = 4 * parameters, 4 * parameters, 8 * parameters
    masters = 4 * parameters if config.zero else 0  # ZeRO's flat fp32 copy
    share = 1 / config.workers
    return (
        weights * (share if config.zero >= 3 else 1)
        + gradients * (share if config.zero >= 2 else 1)
        + (moments + masters) * (share if config.zero >= 1 else 1)
    )
