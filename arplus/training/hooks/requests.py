"""What may end a run early or ask for a checkpoint: a word to stop, another job that took over, a node that goes."""

import logging
import time

import ray.train
import torch.distributed as dist

from arplus.runs.attempt import Attempt, Watch
from arplus.runs.checkpoint import TrainProgress
from arplus.training.context import RunEndedError
from arplus.training.hooks.base import Hook, Request

log = logging.getLogger(__name__)

LOOK_S = 10.0
"""Seconds between two questions whether a node is to be taken away; each one is a barrier of all workers."""


class StopRequests(Hook):
    """Ends the run where its job was told to stop, or has lost it to another; rank 0's."""

    def __init__(self, run_uri: str, mine: Attempt) -> None:
        self.watch = Watch(run_uri, mine)

    def request(self) -> Request:
        """Asks for the end."""
        return Request.END if self.watch.stop or self.watch.error else Request.NOTHING

    def finish(self) -> None:
        """Raises where the run is another's by now."""
        if self.watch.error:
            raise RunEndedError(self.watch.error)

    def close(self) -> None:
        """Ends the watching."""
        self.watch.close()


class Preemption(Hook):
    """Saves where a node is to be taken away, once per node; every worker's."""

    def __init__(self) -> None:
        self.lost_nodes: list[str] = []
        self.looked_at = time.monotonic()

    def request(self) -> Request:
        """Asks all workers to look, from time to time."""
        now = time.monotonic()
        if now - self.looked_at < LOOK_S:
            return Request.NOTHING
        self.looked_at = now
        return Request.LOOK

    def on_request(self, requested: Request) -> Request:
        """Looks, and asks for a checkpoint where another node is to go."""
        if Request.LOOK not in requested or (info := ray.train.get_preemption_info()) is None:
            return Request.NOTHING
        before, self.lost_nodes = self.lost_nodes, info.preempted_node_ids
        if before == self.lost_nodes:
            return Request.NOTHING
        if dist.get_rank() == 0:
            log.warning("nodes %s will be taken away: saving now", ", ".join(self.lost_nodes))
        return Request.SAVE


class EarlyStopping(Hook):
    """Ends the run after ``patience`` validations in a row without a lower perplexity; every worker's."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def is_over(self, progress: TrainProgress) -> bool:
        """Whether patience is at its end. A checkpoint holds the count, so that a resume does not begin anew."""
        return progress.validations_since_best >= self.patience

    def on_validation(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """Says that this validation was the last one."""
        if dist.get_rank() == 0 and self.is_over(progress):
            log.info(
                "stopping early at step %d: no perplexity below %s in %d validations (--patience)",
                progress.step,
                "infinity" if progress.best_response_ppl is None else f"{progress.best_response_ppl:.3f}",
                self.patience,
            )
