"""The train steps of the other sides: they train in fp32 with torch's AdamW as it comes."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from arplus.benchmark.baselines.bart import Bart
from arplus.benchmark.baselines.padded import Padded
from arplus.benchmark.baselines.paper_code import PaperARPlus, mean_losses
from arplus.config import TrainConfig, VocabularySizes


def make(
    side: Literal["paper", "bart"], run: TrainConfig, sizes: VocabularySizes, device: torch.device
) -> Callable[[Padded], None]:
    """The step of a fresh model. Raises ImportError for BART without ``transformers``."""
    model: nn.Module = PaperARPlus(run.model, sizes) if side == "paper" else Bart(run.model, sizes)
    model = model.to(device).train()
    parameters, settings = list(model.parameters()), run.optimizer
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, eps=settings.eps, weight_decay=settings.weight_decay)

    def loss(batch: Padded) -> Tensor:
        if isinstance(model, PaperARPlus):
            dialogue, auxiliary = mean_losses(model, batch)
            return dialogue + run.objective.lambda1 * auxiliary
        found: Tensor = model(batch)
        return found

    def take(batch: Padded) -> None:
        optimizer.zero_grad()
        loss(batch.to(device)).backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()

    return take
