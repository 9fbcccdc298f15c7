"""The train steps that are compared: ours through the engine, the paper's code, and Hugging Face's BART."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from arplus.benchmark.bart import Bart
from arplus.benchmark.paper import PaperARPlus, mean_losses
from arplus.config import OptimizerConfig, TrainConfig, VocabularySizes
from arplus.data.feed import Step
from arplus.model.arplus import ARPlus
from arplus.model.attention import leave_cudnn_out
from arplus.training.engine import Engine
from arplus.training.loop import seed_dropout

Side = Literal["ours", "plain", "bart"]
TrainStep = Callable[[Step], None]
"""One optimizer step: forward, backward, clipping, AdamW."""


def device() -> torch.device:
    """Where the steps run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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

        def plain_loss(step: Step) -> torch.Tensor:
            dialogue, auxiliary = mean_losses(paper, step.micro_batches[0].to(device()))
            return dialogue + lambda1 * auxiliary

        return _torch_step(paper, plain_loss, config.optimizer)
    bart = Bart(config.model, sizes)
    return _torch_step(bart, lambda step: bart(step.micro_batches[0].to(device())), config.optimizer)


def engine_step(config: TrainConfig, sizes: VocabularySizes) -> TrainStep:
    """Our step, through the engine that training uses, in a process group (:mod:`arplus.training.group`)."""
    engine = Engine(ARPlus(config.model, sizes), config, device())
    steps = 0

    def take(step: Step) -> None:
        nonlocal steps
        seed_dropout(config.seed, steps)
        engine.train_step(step)
        steps += 1

    return take


def _torch_step(model: nn.Module, loss: Callable[[Step], torch.Tensor], config: OptimizerConfig) -> TrainStep:
    model = model.to(device()).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay)

    def take(step: Step) -> None:
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()

    return take


def run_config(
    precision: Literal["auto", "fp32", "bf16"], zero: int, batch_size: int, *, compiled: bool = False
) -> TrainConfig:
    """AR+ at its real size, one worker; a rate so low that random examples do not diverge."""
    optimizer = OptimizerConfig(lr=1e-5, min_lr=1e-5)
    return replace(
        TrainConfig(), precision=precision, compile=compiled, zero=zero, batch_size=batch_size, optimizer=optimizer
    )
