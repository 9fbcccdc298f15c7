"""One training run, and the presets, which are the paper's rows (Tables 1 and 2)."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from arplus.config.model import ModelConfig
from arplus.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """L = L_D + λ1 · L_LM (Eq. 4)."""

    lambda1: Annotated[float, Ge(0)] = 0.5
    """λ1, the weight of the auxiliary loss."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as the paper uses it, and the plateau schedule of its learning rate."""

    lr: Annotated[float, Gt(0)] = 2e-3
    """Initial learning rate."""
    eps: Annotated[float, Gt(0)] = 1e-6
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """Decoupled weight decay, on every parameter as in the paper's code."""
    clip: Annotated[float, Gt(0)] = 1.0
    """Largest global gradient norm."""
    plateau_factor: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Factor on the learning rate when the training loss has not improved for plateau_patience steps."""
    plateau_patience: Annotated[int, Ge(0)] = 60
    """Steps without a better total loss before the learning rate falls."""
    min_lr: Annotated[float, Ge(0)] = 1.5e-4
    """Floor of the schedule."""


@dataclass(frozen=True, kw_only=True)
class FeedConfig:
    """How Ray Data turns the encoded examples into batches."""

    window_batches: Annotated[int, Gt(0)] = 256
    """Global batches a window: a window is shuffled, sorted by length and cut into batches of like length."""
    prefetch: Annotated[int, Gt(0)] = 2
    """Windows prepared ahead of the training step."""
    static_shapes: bool = False
    """Pad every batch to one of a few fixed shapes, for kernels that are compiled a shape."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    preset: str = "arplus"
    """Row of the paper that this configuration started from; a label."""
    data: str = ""
    """URI of a prepared data set (the output of jobs/prepare.py)."""
    storage: str = "runs"
    """URI under which every run has a folder of its own."""
    run_name: str = ""
    """Name of the run and of its folder; the preset's name where empty."""
    workers: Annotated[int, Gt(0)] = 1
    """Training workers, one GPU each where there are GPUs."""
    worker_cpus: Annotated[float, Gt(0)] | None = None
    """CPUs a worker; by default what leaves one whole CPU to the data feed."""
    zero: Annotated[int, Ge(0), Le(3)] = 1
    """DeepSpeed ZeRO stage: 0 none, 1 optimizer state, 2 and gradients, 3 and parameters are partitioned."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass; auto is bf16 autocast on GPUs that have it, else fp32. Masters are fp32."""
    batch_size: Annotated[int, Gt(0)] = 64
    """Examples an optimizer step, over all workers; must divide by workers × accumulation."""
    accumulation: Annotated[int, Gt(0)] = 1
    """Micro-batches a worker an optimizer step."""
    epochs: Annotated[int, Gt(0)] = 3
    """Passes over the training set."""
    max_steps: Annotated[int, Gt(0)] | None = None
    """Stop after this many optimizer steps in all, even in mid-epoch."""
    validate_every: Annotated[int, Gt(0)] | None = None
    """Steps between validations within an epoch; there is always one at the end of each epoch."""
    checkpoint_every: Annotated[int, Gt(0)] | None = None
    """Steps between checkpoints beside those after each validation."""
    checkpoint_minutes: Annotated[float, Gt(0)] | None = 10.0
    """Minutes after which there is a checkpoint in any case."""
    keep_checkpoints: Annotated[int, Gt(0)] = 2
    """Newest checkpoints kept, beside the best one."""
    log_every: Annotated[int, Gt(0)] = 20
    """Steps between log lines and tracked points."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of initial weights, order, infilling and dropout."""
    resume: str = "auto"
    """auto goes on with the run of this name if there is one; never refuses an existing name; a checkpoint's URI
    starts from its whole state."""
    max_failures: Annotated[int, Ge(0)] = 8
    """How often the workers are started again, from the newest checkpoint, after one of them died."""
    audit: bool = False
    """Write which examples every step trained on, as Parquet under the run's audit folder."""
    init_from: str | None = None
    """Checkpoint URI whose weights the run starts from; optimizer and schedule start afresh."""
    mlflow: str | None = None
    """MLflow tracking URI; by default a sqlite file under the storage folder."""
    experiment: str = "arplus"
    """MLflow experiment."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its schedule."""
    feed: FeedConfig = field(default_factory=FeedConfig)
    """The batches."""

    @property
    def micro_batch_size(self) -> int:
        """Examples in one forward pass of one worker."""
        return self.batch_size // (self.workers * self.accumulation)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        share = self.workers * self.accumulation
        if self.batch_size % share:
            below, above = self.batch_size // share * share, -(-self.batch_size // share) * share
            sizes = f"{below} or {above} would do" if below else f"{above} would do"
            yield (
                "batch_size",
                f"must divide by workers × accumulation = {self.workers} × {self.accumulation}; "
                f"{sizes} (got {self.batch_size})",
            )


AR = ModelConfig(
    groups=1,
    embedding_size=512,
    ff_bottleneck=None,
    rezero=False,
    memory_hops=0,
    auxiliary="lm",
    tied_generator=True,
    decoder_norm=False,
)
"""The baseline, AR (Zheng et al. 2019 without the weight predictor: a = 1, Eq. 2)."""

_LOW_LR = 1.5e-4
"""The rate at which the paper's code trained AR and four of the five ablations; its schedule's floor, so constant."""


def _row(preset: str, model: ModelConfig, lr: float) -> TrainConfig:
    return TrainConfig(preset=preset, model=model, optimizer=OptimizerConfig(lr=lr))


PRESETS: dict[str, TrainConfig] = {
    row.preset: row
    for row in (
        replace(_row("ar", AR, _LOW_LR), optimizer=OptimizerConfig(lr=_LOW_LR, eps=1e-8)),
        _row("arplus", ModelConfig(), 2e-3),
        _row("no-rezero", ModelConfig(rezero=False), _LOW_LR),
        _row("no-albert", ModelConfig(groups=1, embedding_size=512), 2e-3),
        _row("no-factor-ff", ModelConfig(ff_bottleneck=None), _LOW_LR),
        _row("no-memn2n", ModelConfig(memory_hops=0), _LOW_LR),
        _row("no-bart-mlm", ModelConfig(auxiliary="lm"), _LOW_LR),
    )
}
"""The paper's rows by name, with the learning rate that the paper's code used for each (guide: Sizes)."""


def preset(name: str) -> TrainConfig:
    """The configuration of one of the paper's rows. Raises :class:`UserError` for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def tiny(config: TrainConfig) -> TrainConfig:
    """Shrinks any preset to seconds of training on a CPU; what makes the row the row stays."""
    model = config.model
    d_model = 128
    return replace(
        config,
        model=replace(
            model,
            layers=2,
            groups=2 if model.unique_layers == 1 else 1,
            d_model=d_model,
            embedding_size=d_model if model.embedding_size == model.d_model else 64,
            heads=4,
            ff_size=256,
            ff_bottleneck=None if model.ff_bottleneck is None else 32,
        ),
        # Small batches are noisy: the paper's patience would halve the rate before a short run has learnt anything.
        optimizer=replace(config.optimizer, lr=2e-3, plateau_patience=1000),
        batch_size=32,
        feed=replace(config.feed, window_batches=64),
    )
