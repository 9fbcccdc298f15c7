"""What the processes of ``test_engine.py`` run: the same training, with and without DeepSpeed."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arplus.data.feed import Step
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from arplus.config import ModelConfig, TrainConfig, VocabularySizes, preset, special_ids, tiny
from arplus.model.arplus import ARPlus
from arplus.model.batch import Batch
from arplus.model.linear import product_dtype
from arplus.training.group import process_group

SIZES = VocabularySizes(characters=60, persona_words=40)


def config(preset_name: str = "arplus", **changes: Any) -> TrainConfig:
    """A tiny run without dropout, so that every partition computes the same numbers."""
    start = tiny(preset(preset_name))
    model = replace(start.model, dropout=0.0, d_model=32, heads=2, ff_size=48)
    if start.model.embedding_size == start.model.d_model:
        model = replace(model, embedding_size=32)
    return replace(start, model=model, batch_size=8, **changes)


def global_batch(model: ModelConfig, seed: int) -> Batch:
    """Eight random examples; every second one, which is worker 1's share, has only [UNK] in its personas."""
    generator = torch.Generator().manual_seed(seed)
    ids, B = special_ids(SIZES.characters), 8
    persona_ids = special_ids(SIZES.persona_words if model.memory_hops else SIZES.characters)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    context = draw(ids.pad, B, 12)
    response = torch.full((B, 9), ids.pad)
    length = draw(6, B) + 1
    for b in range(B):
        context[b, 5] = context[b, int(draw(6, 1)) + 6 :] = ids.sep
        context[b, 11 - int(draw(4, 1)) :] = ids.pad
        response[b, : length[b] + 2] = torch.cat(
            [torch.tensor([ids.bos]), draw(ids.pad, int(length[b])), torch.tensor([ids.eos])]
        )
    profiles = draw(persona_ids.pad, B, 2, 4)
    target = draw(persona_ids.pad, B, 6)
    profiles[1::2], target[1::2] = persona_ids.unk, persona_ids.unk
    return Batch(
        example_id_B=torch.arange(B),
        counted_B=torch.ones(B, dtype=torch.bool),
        context_BS=context,
        context_profile_BS=draw(2, B, 12),
        profiles_BPW=profiles,
        target_persona_BK=target,
        response_BT=response,
        infilled_BU=response.clone() if model.auxiliary == "infilling" else None,
    )


def part(batch: Batch, index: int, of: int) -> Batch:
    """Every ``of``-th row from row ``index`` on."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{k: v if v is None else v[index::of] for k, v in tensors.items()})


def targets(batch: Batch) -> int:
    """Targets of a whole global batch."""
    return int((batch.response_BT[:, 1:] != special_ids(SIZES.characters).pad).sum())


def initial_model(config: TrainConfig) -> ARPlus:
    """The same weights in every process. ReZero's gates start open, or only the last matrices would matter."""
    torch.manual_seed(config.seed)
    model = ARPlus(config.model, SIZES)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.r"):
            parameter.data.fill_(0.3)
    return model


def plain_run(config: TrainConfig, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process, plain torch: the loss curve and the weights after it, which are the reference."""
    model = initial_model(config)
    o = config.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, eps=o.eps, weight_decay=o.weight_decay)
    schedule = ReduceLROnPlateau(optimizer, factor=o.plateau_factor, patience=o.plateau_patience, min_lr=o.min_lr)
    curve = []
    for i in range(steps):
        losses = model(global_batch(config.model, i))
        loss = losses.sum_dialogue / losses.count_dialogue
        loss = loss + config.objective.lambda1 * losses.sum_auxiliary / losses.count_auxiliary
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
        optimizer.step()
        schedule.step(loss.item())
        curve.append(loss.item())
    return curve, {name: p.detach() for name, p in model.named_parameters()}


def engine_steps(config: TrainConfig, first: int, last: int) -> list[Step]:
    """This process's part of steps ``first`` to ``last - 1``."""
    parts = config.workers * config.accumulation
    steps = []
    for i in range(first, last):
        batch = global_batch(config.model, i)
        own = range(dist.get_rank() * config.accumulation, (dist.get_rank() + 1) * config.accumulation)
        steps.append(Step([part(batch, m, parts) for m in own], targets(batch)))
    return steps


def run(rank: int, world: int, rendezvous: Path, task: Callable[..., Any], arguments: tuple, result: Path) -> None:
    """Body of a spawned process: joins the group, runs ``task(*arguments)``; rank 0 saves what it returns."""
    torch.set_num_threads(1)
    with process_group(rank, world, rendezvous):
        found = task(*arguments)
    if rank == 0:
        torch.save(found, result)


def curves(configs: list[TrainConfig], steps: int) -> list[list[float]]:
    """Loss curves of engines, one after another in the same processes."""
    from arplus.training.engine import Engine

    found = []
    for c in configs:
        engine = Engine(initial_model(c), c, torch.device("cpu"))
        found.append([engine.train_step(step).loss for step in engine_steps(c, 0, steps)])
    return found


def large_curves(configs: list[TrainConfig], steps: int) -> list[list[float]]:
    """:func:`curves` by the functions that compute the real sizes."""
    from arplus.model import feed_forward, linear

    feed_forward._LEAST = linear._LEAST = 0  # in this process alone, which is the test's
    return curves(configs, steps)


def dtypes_of_products(configs: list[TrainConfig]) -> list[list[str]]:
    """What a validation and a training step multiply in, with torch asked about autocast as on a GPU.

    There the question without a device, which DeepSpeed asks, is about the device that trains; here it would not be.
    """
    from arplus.training.engine import Engine

    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device="cpu": asked(device)  # type: ignore[assignment]
    found = []
    for c in configs:
        engine = Engine(initial_model(c), c, torch.device("cpu"))
        seen: list[str] = []
        engine.module.generator.register_forward_pre_hook(
            lambda _, arguments, seen=seen: seen.append(str(product_dtype(arguments[0])))
        )
        (step,) = engine_steps(c, 0, 1)
        engine.evaluate(step.micro_batches[0])
        engine.train_step(step)
        found.append(seen)
    return found


def after_a_bad_gradient(configs: list[TrainConfig]) -> list[tuple[str, bool]]:
    """What a step says whose loss is finite and whose gradient is not, and whether it left the weights as they were."""
    from arplus.training.engine import Engine, NonFiniteLossError

    found = []
    for c in configs:
        model = initial_model(c)
        engine = Engine(model, c, torch.device("cpu"))
        first, second = engine_steps(c, 0, 2)
        engine.train_step(first)
        before = engine.weights()
        if dist.get_rank() == 0:
            model.context_input.projection.bias.register_hook(lambda gradient: gradient * torch.inf)
        try:
            engine.train_step(second)
            said = "nothing"
        except NonFiniteLossError as error:
            said = str(error)
        after = engine.weights()
        found.append((said, all(torch.equal(after[name], value) for name, value in before.items())))
    return found


def train_part(config: TrainConfig, state: dict | None, first: int, last: int) -> dict[str, Any]:
    """Trains steps ``first`` to ``last - 1`` from a state, and gives losses, norms and the state after them."""
    from arplus.training.engine import Engine

    model = initial_model(config)
    if state is not None:
        model.load_weights(state["weights"])
    engine = Engine(model, config, torch.device("cpu"))
    if state is not None:
        engine.load_moments(state["moments"], first)
        engine.load_schedule(state["schedule"])
    results = [engine.train_step(step) for step in engine_steps(config, first, last)]
    return {
        "curve": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "weights": engine.weights(),
        "moments": engine.moments(),
        "schedule": engine.schedule_state(),
    }


def train_parts(parts: list[tuple[TrainConfig, int, int]], state: dict | None = None) -> list[dict[str, Any]]:
    """:func:`train_part` from step to step, each part from the state of the one before."""
    results: list[dict[str, Any]] = []
    for c, first, last in parts:
        found = [train_part(c, results[-1] if results else state, first, last)]
        dist.broadcast_object_list(found)  # rank 0 alone has the state, and all start from it
        results += found
    return results


def cut_and_whole(configs: list[TrainConfig]) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Six steps in two parts and at once, for each configuration."""
    return [(train_parts([(c, 0, 3), (c, 3, 6)]), train_part(c, None, 0, 6)) for c in configs]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live, whatever holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def memory(configs: list[TrainConfig], bucket: int) -> list[tuple[int, int]]:
    """Bytes between two steps and at a step's peak, counted, for each configuration; with buckets of that size.

    One example a worker, so that activations are next to nothing. Of three steps the least peak is taken: how long a
    buffer lives that the other worker has not yet added up, or that is left in a cycle, is luck.
    """
    from arplus.training import engine

    engine.BUCKET = bucket
    found = []
    for c in configs:
        with LiveBytes() as live:
            made = engine.Engine(initial_model(c), c, torch.device("cpu"))
            steps = [Step([part(s.micro_batches[0], 0, 8)], s.targets) for s in engine_steps(c, 0, 5)]
            for step in steps[:2]:
                made.train_step(step)
            peaks = []
            for step in steps[2:]:
                gc.collect()
                live.peak = between = live.now
                made.train_step(step)
                peaks.append(live.peak)
            found.append((between, min(peaks)))
        del made
    return found
