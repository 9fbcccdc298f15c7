"""The optimizer step: a DeepSpeed engine at ZeRO stage 0 to 3, AdamW, clipping and the learning rate's schedule.

Every loss is (sum, count), and the count is that of the *global* batch. So one worker with one batch, one worker with
two micro-batches and two workers compute the same gradient (huggingface/transformers#34242, pytorch/torchtitan#2206).
There is one backward for λ0·L_D + λ1·L_LM + λ2·L_W, because ZeRO-2 and 3 refuse to reduce a shared parameter twice
(deepspeedai/DeepSpeed#2103).

A step of ours does not wait for the GPU: what it computed stays there until :meth:`Engine.read`. (DeepSpeed's stages 1
to 3 wait for the norm of the gradient themselves.)
"""

import math
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import, which else warns of a missing accelerator

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from arplus import kernels
from arplus.config import TrainConfig
from arplus.data.loader import Step
from arplus.errors import NonFiniteLossError
from arplus.kernels.gpu import has_bf16
from arplus.model.batch import Batch
from arplus.model.cost import train_only
from arplus.model.network import PersonaTransformer
from arplus.model.objective import Losses
from arplus.torch_private import leave_update_out, set_timeout
from arplus.training import deepspeed_private
from arplus.training.footprint import BUCKET
from arplus.training.schedule import Linear, Plateau

MOMENTS = ("exp_avg", "exp_avg_sq")


class StepResult(NamedTuple):
    """What one optimizer step computed, over the global batch and before the update."""

    loss: float
    """L = λ0 · L_D + λ1 · L_LM, and + λ2 · L_W where a weight is predicted."""
    dialogue: float
    """L_D, nats per target."""
    auxiliary: float
    """L_LM, nats per target."""
    grad_norm: float
    """Global gradient norm before clipping."""
    lr: float
    """Learning rate of this step."""
    weight: float | None = None
    """L_W, nats per example; None where no weight is predicted."""
    mean_a: float | None = None
    """Mean of the predicted weights a."""


class Unread(NamedTuple):
    """The same on this worker's device, not yet waited for nor summed over the workers."""

    sums: Tensor
    """This worker's :meth:`Losses.together`, float64."""
    grad_norm: Tensor
    counts: list[int]
    """What each of these is divided by: targets or examples of the global batch."""
    lr: float


class Engine:
    """A model with its optimizer, partitioned over the workers of the default process group.

    Training state goes in and out as full fp32 tensors by parameter name, so that a checkpoint knows nothing of the
    ZeRO stage or of the number of workers (deepspeedai/DeepSpeed#2921). The model's weights are those it has when it
    is handed in; they must be equal on all workers. Of them ``--optimizer.only`` says which are trained. The linear
    schedule wants to know the ``steps`` of the whole run.
    """

    def __init__(
        self, model: PersonaTransformer, config: TrainConfig, device: torch.device, steps: int | None = None
    ) -> None:
        assert dist.is_initialized(), "Ray Train (or the test) sets the process group up first"
        self.config = config
        self.device = device
        self.stage = config.zero_stage_of(dist.get_world_size())
        model = model.to(device)
        kernels.use(model, device)
        if is_compiled(config, device):
            # One shape of batches, one graph, in place, so that names stay. Recorded kernels are launched at once; but
            # the gradients lie in the recording's memory, which a second micro-batch would overwrite.
            model.compile(
                dynamic=False, mode="reduce-overhead" if config.gradient_accumulation_steps == 1 else "default"
            )
        train_only(model, config.optimizer.only)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Weight decay on everything, as in the paper's code. `fused` is one kernel for all tensors, on CPU too.
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=config.optimizer.lr,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.unread: list[Unread] = []
        self.reads_each_step = device.type == "cpu"
        """Whether what a step computed is there as soon as it ends, so that nothing waits for it."""
        self.grad_norm = torch.zeros((), device=device)
        if self.stage == 0:
            # DeepSpeed's stage 0 clips fp32 gradients but never tells their norm, so clipping is done here instead.
            self.optimizer.register_step_pre_hook(lambda *_: self._clip(parameters))
        initialise_communication()
        self.engine = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=deepspeed_config(
                config,
                dist.get_world_size(),
                sum(p.numel() for p in parameters),
                bf16=bf16_is_used(config.precision, device),
            ),
            dist_init_required=False,
        )[0]
        deepspeed_private.reduce_gradients(self.engine, self.stage > 0 or dist.get_world_size() > 1)
        self.before_reduction: Callable[[], None] = lambda: None
        """Called when this worker has its own part of a step's gradient, before it is added up over the workers."""
        deepspeed_private.tell_before_reduction(self.engine, lambda: self.before_reduction())
        timeout = timedelta(minutes=config.collective_timeout_minutes)
        set_timeout(timeout, deepspeed_private.data_parallel_group(self.engine))
        self.module: nn.Module = self.engine.module
        self.schedule: Plateau | Linear
        if config.optimizer.schedule == "plateau":
            self.schedule = Plateau(self.optimizer, config.optimizer)
        else:
            assert steps is not None
            self.schedule = Linear(self.optimizer, config.optimizer, steps)

    def train_step(self, step: Step) -> None:
        """One optimizer step over this worker's micro-batches of a global batch; all workers call it together.

        A step whose loss or gradient is not finite reaches no weights; :meth:`read` tells.
        """
        self.engine.train()
        # DeepSpeed averages gradients over the workers; the loss is already divided by the global count.
        scale, objective = dist.get_world_size() / step.targets, self.config.objective
        counts = self.config.model.loss_counts(step.targets, step.examples)
        sums = torch.zeros(len(counts), dtype=torch.float64, device=self.device)
        for i, batch in enumerate(step.micro_batches):
            losses = self._forward(batch)
            loss = objective.total(losses.sum_dialogue, losses.sum_auxiliary) * scale
            if losses.sum_weight is not None:
                loss = loss + objective.lambda2 * losses.sum_weight * (dist.get_world_size() / step.examples)
            # An infinite loss may have a finite gradient. Times 1, or NaN, it has none, on any worker.
            self.engine.backward(loss * (1 + 0 * loss.detach()), scale_wrt_gas=False)
            sums += losses.together()
            if i + 1 < len(step.micro_batches):
                self.engine.step()
        lr = self.lr
        self.engine.step()
        self.schedule.after_step()
        if self.stage > 0:
            self.grad_norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)
        self.unread.append(Unread(sums, self.grad_norm, counts, lr))

    @property
    def wants_reading(self) -> bool:
        """Whether :meth:`read` is due: where the device is waited for anyway, or the rate might fall."""
        return self.reads_each_step or len(self.unread) > self.schedule.losses_to_spare

    def read(self, number: int = 0) -> tuple[list[StepResult], int]:
        """What the steps since the last reading computed; a collective call.

        A ``number`` of the caller's goes along in the same collective, and its sum over the workers comes back.

        Tells the schedule of the losses, which is exact if all is read when :attr:`wants_reading`.
        Raises :class:`NonFiniteLossError`, on every worker, for the first step that was not applied.
        """
        unread, self.unread = self.unread, []
        own_number = torch.full((1,), number, dtype=torch.float64, device=self.device)
        together = torch.cat([own_number, *(step.sums for step in unread)])
        dist.all_reduce(together)
        norms = [step.grad_norm.double().reshape(1) for step in unread]
        number_sum, *values = torch.cat([together, *norms]).tolist()  # in one reading, since each waits for the GPU
        results, objective = [], self.config.objective
        found, read_norms = iter(values), values[len(values) - len(unread) :]
        for i, (step, norm) in enumerate(zip(unread, read_norms, strict=True)):
            dialogue, auxiliary, *weight_and_a = (next(found) / count for count in step.counts)
            total = objective.total(dialogue, auxiliary, *weight_and_a[:1])
            if not math.isfinite(total):
                said = f"loss {total} (L_D {dialogue}, L_LM {auxiliary}) at learning rate {step.lr}"
                raise NonFiniteLossError(said, i)
            if not math.isfinite(norm):
                raise NonFiniteLossError(f"gradient norm {norm} at learning rate {step.lr}", i)
            self.schedule.after_loss(total)
            results.append(StepResult(total, dialogue, auxiliary, norm, step.lr, *weight_and_a))
        return results, int(number_sum)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        """The losses of a batch of this worker, without dropout and without an update."""
        self.engine.eval()
        return self._forward(batch)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def weights(self) -> dict[str, Tensor]:
        """Full fp32 weights by name, copied to the CPU of rank 0, nothing on others; a collective call."""
        return self._gathered(None, "")

    def moments(self) -> dict[str, Tensor]:
        """AdamW's full moments as ``exp_avg.NAME`` and ``exp_avg_sq.NAME``, as :meth:`weights`; a collective call.

        Those of what is trained; empty before the first step.
        """
        if not self.optimizer.state:
            return {}
        return {name: value for key in MOMENTS for name, value in self._gathered(key, f"{key}.").items()}

    def load_moments(self, moments: dict[str, Tensor], updates: int) -> None:
        """Sets the moments that :meth:`moments` gave after ``updates`` optimizer steps; a collective call."""
        if not moments:
            return
        for owner in self._state_owners():
            # What AdamW would make at its first step; the values follow below, for ZeRO by partition.
            self.optimizer.state[owner] = {
                "step": torch.tensor(float(updates), device=owner.device),
                **{key: torch.zeros_like(owner, memory_format=torch.preserve_format) for key in MOMENTS},
            }
        deepspeed_private.link_moments(self.engine.optimizer, self.stage)
        for name, parameter in self._trained():
            for key in MOMENTS:
                value = moments[f"{key}.{name}"].to(self.device)
                if self.stage == 0:
                    self.optimizer.state[parameter][key].copy_(value)
                elif self.stage == 3:
                    safe_set_local_optimizer_state(parameter, _own_part(value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _forward(self, batch: Batch) -> Losses:
        losses: Losses = self.engine(batch.to(self.device))
        return losses

    def _clip(self, parameters: list[nn.Parameter]) -> None:
        self.grad_norm = nn.utils.clip_grad_norm_(parameters, self.config.optimizer.max_grad_norm)
        leave_update_out(self.optimizer, (~self.grad_norm.isfinite()).float())

    def _gathered(self, key: str | None, prefix: str) -> dict[str, Tensor]:
        # Of arplus-large eight workers of a node would copy 28 GB, of which seven eighths are thrown away.
        found = {}
        for name, parameter in self.module.named_parameters() if key is None else self._trained():
            full = self._full(parameter, key)
            if dist.get_rank() == 0:
                found[prefix + name] = full.to("cpu", copy=True)
        return found

    def _full(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        if self.stage == 0:
            return (parameter if key is None else self.optimizer.state[parameter][key]).detach()
        if not parameter.requires_grad:  # DeepSpeed keeps no master of it
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                return parameter.detach().clone()
        full = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        return full.view(deepspeed_private.full_shape(parameter))

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _state_owners(self) -> list[Tensor]:
        """The tensors under which AdamW keeps its state: parameters, or ZeRO's flat fp32 partitions of them."""
        if self.stage == 0:
            return [parameter for _, parameter in self._trained()]
        return deepspeed_private.fp32_partitions(self.engine.optimizer, self.stage)


def bf16_is_used(precision: str, device: torch.device) -> bool:
    """Whether the forward pass runs in bf16 autocast: where asked for, or ("auto") on a GPU that has bf16."""
    if precision == "auto":
        return has_bf16(device)
    return precision == "bf16"


def is_compiled(config: TrainConfig, device: torch.device) -> bool:
    """Whether the step is compiled, and batches have one shape for it."""
    if config.compile == "auto":
        has_compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
        return device.type == "cuda" and config.zero_stage != 3 and has_compiler
    return config.compile == "on"


def deepspeed_config(config: TrainConfig, workers: int, parameters: int, *, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of a run. Weights and gradients are fp32 at every stage; bf16 is autocast's.

    Autocast is DeepSpeed's to switch on: one around the engine it switches off again, on a GPU alone. Of no module are
    gradients reduced in bf16.
    """
    micro_batch_size = config.micro_batch_size(workers)
    return {
        "train_batch_size": micro_batch_size * workers * config.gradient_accumulation_steps,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.optimizer.max_grad_norm if config.zero_stage_of(workers) else 0.0,
        "zero_optimization": zero_config(config.zero_stage_of(workers), parameters),
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 1 << 62,  # our own log line says more
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU, twice per step
    }


def zero_config(stage: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's ``zero_optimization`` for a model of so many parameters; sizes count elements, not bytes.

    DeepSpeed's own defaults are for billions of parameters: a bucket of 2 GB on every worker, whatever the model.

    No overlap of communication and backward pass: gradients of shared layers and of the memory's tables are complete
    at its end only. After 90 % of its time 16 % of AR+'s gradients were, and 46 % of arplus-large's (on a CPU), so
    there is little to hide, for a second bucket and another stream. Nothing of this was measured on a GPU.

    Stage 3 keeps what it has gathered for as long as two buckets last, so that groups of shared layers are gathered
    once per pass where they fit, and not kept to the step's end. Updated weights are gathered in one call, in place.

    No activation checkpointing: it would recompute a third of the step, while a smaller micro-batch
    (--gradient-accumulation-steps) gives the same gradient for nothing. One longest example of arplus-large keeps
    0.6 GiB in fp32 (``--dry-run``).
    """
    bucket = min(BUCKET, parameters)
    return {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "overlap_comm": False,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_live_parameters": 2 * BUCKET,
        "stage3_max_reuse_distance": 2 * BUCKET,
    }


def _own_part(value: Tensor) -> Tensor:
    """What this worker holds of a full tensor under ZeRO-3: equal parts, the last ones padded with zeros.

    ``safe_set_full_optimizer_state`` would cut the parts without the padding and fail on a scalar like ReZero's r.
    """
    flat, workers = value.flatten(), dist.get_world_size()
    size = -(-flat.numel() // workers)
    padded = nn.functional.pad(flat, (0, size * workers - flat.numel()))
    return padded[dist.get_rank() * size :][:size]


def initialise_communication() -> None:
    """DeepSpeed's communication, upon this process's group; none of its operators is built."""
    if get_accelerator().device_name() == "cpu":  # on others nobody asks for it, and asking probes every operator
        deepspeed_private.leave_shm_out()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
