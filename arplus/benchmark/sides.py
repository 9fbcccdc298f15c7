"""The train steps that are compared: ours through the engine, the paper's code, and Hugging Face's BART."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from arplus.benchmark.bart import Bart
from arplus.benchmark.padded import Padded
from arplus.benchmark.paper import PaperARPlus, mean_losses
from arplus.config import ExampleRules, OptimizerConfig, TrainConfig, VocabularySizes, special_ids
from arplus.data.capacity import Filler
from arplus.data.loader import Step
from arplus.kernels.gpu import leave_cudnn_out
from arplus.model.network import PersonaTransformer
from arplus.training.engine import Engine, is_compiled
from arplus.training.loop import seed_dropout

Side = Literal["ours", "plain", "bart"]
TrainStep = Callable[[Any], None]
"""One optimizer step on one of the side's :func:`inputs`: forward, backward, clipping, AdamW."""


def device() -> torch.device:
    """Where the steps run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(side: Side, steps: list[Step], run: TrainConfig, sizes: VocabularySizes) -> list[Any]:
    """The same batches as a side takes them: packed for us, padded to their longest rows for the others."""
    if side == "ours":
        if not is_compiled(run, device()):
            return list(steps)
        filler = Filler(ExampleRules(), run.batch_size)
        filled = filler([batch for step in steps for batch in step.micro_batches])
        return [Step([batch], step.targets) for batch, step in zip(filled, steps, strict=True)]
    pad, persona_pad = special_ids(sizes.characters).pad, special_ids(sizes.persona_words).pad
    return [Padded.of(step.micro_batches[0], pad, persona_pad) for step in steps]


def train_step(side: Side, config: TrainConfig, sizes: VocabularySizes) -> TrainStep:
    """The step of a fresh model of one side. Raises ImportError for BART without ``transformers``.

    The others train in fp32 with torch's AdamW as it comes.
    """
    leave_cudnn_out()
    torch.manual_seed(0)
    if side == "ours":
        return engine_step(config, sizes)
    if side == "plain":
        paper = PaperARPlus(config.model, sizes)
        lambda1 = config.objective.lambda1

        def plain_loss(batch: Padded) -> torch.Tensor:
            dialogue, auxiliary = mean_losses(paper, batch)
            return dialogue + lambda1 * auxiliary

        return _torch_step(paper, plain_loss, config.optimizer)
    bart = Bart(config.model, sizes)
    return _torch_step(bart, bart, config.optimizer)


def engine_step(config: TrainConfig, sizes: VocabularySizes) -> TrainStep:
    """Our step, through the engine that training uses, in a process group (:mod:`arplus.training.group`)."""
    engine = Engine(PersonaTransformer(config.model, sizes), config, device())
    steps = 0

    def take(step: Step) -> None:
        nonlocal steps
        seed_dropout(config.seed, steps)
        engine.train_step(step)
        if engine.wants_reading:
            engine.read()
        steps += 1

    return take


def _torch_step(model: nn.Module, loss: Callable[[Padded], torch.Tensor], config: OptimizerConfig) -> TrainStep:
    model = model.to(device()).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay)

    def take(batch: Padded) -> None:
        optimizer.zero_grad()
        loss(batch.to(device())).backward()
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()

    return take


def run_config(
    precision: Literal["auto", "fp32", "bf16"],
    zero_stage: Literal["auto", 0, 1, 2, 3],
    batch_size: int,
    *,
    compiled: Literal["auto", "on", "off"] = TrainConfig.compile,
) -> TrainConfig:
    """AR+ at its real size, one worker; a rate so low that random examples do not diverge."""
    optimizer = OptimizerConfig(lr=1e-5, min_lr=1e-5)
    return replace(
        TrainConfig(),
        precision=precision,
        compile=compiled,
        zero_stage=zero_stage,
        batch_size=batch_size,
        optimizer=optimizer,
    )
