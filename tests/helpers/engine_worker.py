"""What tests of the engine run, in processes of their own or on a GPU: one training, with and without DeepSpeed."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from arplus.config import ExampleRules, ModelConfig, TrainConfig, VocabularySizes, special_ids
from arplus.data.loader import Step
from arplus.model.batch import Batch, Packed
from arplus.model.cost import train_only
from arplus.model.network import PersonaTransformer
from arplus.model.objective import Losses
from arplus.pretrained.features import attach
from arplus.text import Vocabulary
from arplus.training.group import process_group
from helpers.small_models import smallest_run

SIZES = VocabularySizes(characters=60, persona_words=40)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where engines compute: on the CPU but in tests on a GPU, which is hidden from all others."""
NOISE = 0.0 if DEVICE.type == "cpu" else 1e-5
"""By how much weights may differ where nothing does: a GPU's kernels may add up in another order each time."""
CHARACTERS = Vocabulary([chr(0x4E00 + i) for i in range(SIZES.characters - 9)])


def config(preset_name: str = "arplus", **changes: Any) -> TrainConfig:
    """A tiny run without dropout, so that every partition computes the same numbers."""
    run = smallest_run(preset_name)
    return replace(run, model=replace(run.model, dropout=0.0), batch_size=8, **changes)


def second_stage(first: TrainConfig) -> TrainConfig:
    """What trains adapters, gates and norms, and the character table, by the linear schedule over twelve steps."""
    only = ("adapters", "norms and gates", "character table")
    optimizer = replace(first.optimizer, only=only, lr=1e-2, schedule="linear", warmup=3)
    model, objective = replace(first.model, adapter=4), replace(first.objective, lambda0=0.7)
    return replace(first, model=model, optimizer=optimizer, objective=objective, max_steps=12)


def global_batch(model: ModelConfig, seed: int, index: int = 0, of: int = 1) -> Batch:
    """Eight random examples, or every ``of``-th of them from ``index`` on, as workers and micro-batches take them.

    Every second one, which is worker 1's share, has only [UNK] in its personas.
    """
    rng = np.random.default_rng(seed)
    ids = special_ids(SIZES.characters)
    persona_ids = special_ids(SIZES.persona_words if model.memory_hops else SIZES.characters)

    def draw(high: int, n: int) -> list[int]:
        return [int(i) for i in rng.integers(high, size=n)]

    contexts, speakers, profiles, personas, responses = [], [], [], [], []
    for b in range(8):
        context = [*draw(ids.pad, 5), ids.sep, *draw(ids.pad, int(rng.integers(1, 6))), ids.sep]
        contexts.append(context)
        speakers.append(draw(2, len(context)))
        responses.append([ids.bos, *draw(ids.pad, int(rng.integers(1, 7)))])
        profiles.append([[persona_ids.unk] * 4 if b % 2 else draw(persona_ids.pad, 4) for _ in range(2)])
        personas.append([persona_ids.unk] * 6 if b % 2 else draw(persona_ids.pad, 6))
    own = range(index, 8, of)
    response = Packed.of([responses[b] for b in own])
    return Batch(
        example_id_B=torch.tensor(list(own)),
        context=Packed.of([contexts[b] for b in own]),
        speaker_N=torch.tensor([2 * i + s for i, b in enumerate(own) for s in speakers[b]]),
        profiles=Packed.of([words for b in own for words in profiles[b]]),
        persona=Packed.of([personas[b] for b in own]),
        response=response,
        target_N=torch.tensor([i for b in own for i in [*responses[b][1:], ids.eos]]),
        infilled=Packed.of([[*responses[b], ids.eos] for b in own]) if model.auxiliary == "infilling" else None,
        persona_related_B=torch.tensor([b % 3 == 0 for b in own], dtype=torch.int32),
    )


def initial_model(config: TrainConfig) -> PersonaTransformer:
    """The same weights in every process. ReZero's gates start open, or only the last matrices would matter."""
    torch.manual_seed(config.seed)
    model = PersonaTransformer(config.model, SIZES)
    for name, parameter in model.named_parameters():
        if name.endswith(".r"):
            parameter.data.fill_(0.3)
    return attach(model, CHARACTERS, ExampleRules())


def plain_run(config: TrainConfig, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process, plain torch: the loss curve and the weights after it, which are the reference."""
    model = initial_model(config)
    o, lambda0, lambda1 = config.optimizer, config.objective.lambda0, config.objective.lambda1
    train_only(model, o.only)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=o.lr, eps=o.eps, weight_decay=o.weight_decay)
    schedule: Any = ReduceLROnPlateau(optimizer, factor=o.plateau_factor, patience=o.plateau_patience, min_lr=o.min_lr)
    if o.schedule == "linear":
        assert config.max_steps
        rising, falling = 1 / max(o.warmup, 1), 1 / (config.max_steps - o.warmup)
        schedule = LambdaLR(optimizer, lambda i: i * rising if i < o.warmup else (config.max_steps - i) * falling)
    curve = []
    for i in range(steps):
        batch = global_batch(config.model, i)
        losses = model(batch)
        loss = (lambda0 * losses.sum_dialogue + lambda1 * losses.sum_auxiliary) / len(batch.target_N)
        if losses.sum_weight is not None:
            loss = loss + config.objective.lambda2 * losses.sum_weight / 8
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, o.max_grad_norm)
        optimizer.step()
        schedule.step(*([loss.item()] if o.schedule == "plateau" else []))
        curve.append(loss.item())
    return curve, {name: p.detach() for name, p in model.named_parameters()}


def engine_steps(config: TrainConfig, first: int, last: int) -> list[Step]:
    """This process's part of steps ``first`` to ``last - 1``."""
    parts = config.workers * config.gradient_accumulation_steps
    steps = []
    for i in range(first, last):
        targets = len(global_batch(config.model, i).target_N)
        own = range(
            dist.get_rank() * config.gradient_accumulation_steps,
            (dist.get_rank() + 1) * config.gradient_accumulation_steps,
        )
        steps.append(Step([global_batch(config.model, i, m, parts) for m in own], targets, 8))
    return steps


def run(rank: int, world: int, rendezvous: Path, task: Callable[..., Any], arguments: tuple, result: Path) -> None:
    """Body of a spawned process: joins the group, runs ``task(*arguments)``; rank 0 saves what it returns."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported: a collection looks through a million objects of it
    with process_group(rank, world, rendezvous):
        found = task(*arguments)
    if rank == 0:
        torch.save(found, result)


def curves(configs: list[TrainConfig], steps: int) -> list[list[float]]:
    """Loss curves of engines, one after another in the same processes."""
    from arplus.training.engine import Engine

    found = []
    for c in configs:
        engine = Engine(initial_model(c), c, DEVICE, c.max_steps)
        found.append([result.loss for result in results(engine, engine_steps(c, 0, steps))])
    return found


def results(engine: Any, steps: list[Step]) -> list[Any]:
    """What each of these steps computed."""
    found = []
    for step in steps:
        engine.train_step(step)
        found += engine.read()[0]
    return found


def large_curves(configs: list[TrainConfig], steps: int) -> list[list[float]]:
    """:func:`curves` by the functions that compute the real sizes."""
    from arplus.kernels import cpu

    cpu.LEAST = 0  # in this process alone, which is the test's
    return curves(configs, steps)


def dtypes_of_products(configs: list[TrainConfig]) -> list[list[str]]:
    """What a validation and a training step multiply in, with torch asked about autocast as on a GPU.

    There the question without a device, which DeepSpeed asks, is about the device that trains; here it would not be.
    """
    from arplus.training.engine import Engine

    asked = torch.is_autocast_enabled
    found = []
    with mock.patch.object(torch, "is_autocast_enabled", lambda device=DEVICE.type: asked(device)):
        for c in configs:
            engine = Engine(initial_model(c), c, DEVICE)
            seen: list[str] = []
            engine.module.head.register_forward_pre_hook(lambda *_, seen=seen: seen.append(str(autocast_dtype())))
            (step,) = engine_steps(c, 0, 1)
            engine.evaluate(step.micro_batches[0])
            engine.train_step(step)
            found.append(seen)
    return found


def autocast_dtype() -> torch.dtype | None:
    """What autocast multiplies in here, if it is on."""
    return torch.get_autocast_dtype(DEVICE.type) if torch.is_autocast_enabled(DEVICE.type) else None


def after_a_bad_step(configs: list[TrainConfig], bad: str) -> list[tuple[str, int, bool]]:
    """Of three steps the second's loss or gradient is bad, and all are read at last.

    What is said of which step, and whether the weights are those of the other two steps.
    """
    from arplus.errors import NonFiniteLossError
    from arplus.training.engine import Engine

    def infinite(_: Any, __: Any, losses: Losses) -> Losses:
        return losses._replace(sum_dialogue=losses.sum_dialogue + torch.inf)  # its gradient is finite

    found = []
    for c in configs:
        first, second, third = engine_steps(c, 0, 3)
        good = Engine(initial_model(c), c, DEVICE)
        results(good, [first, third])
        model = initial_model(c)
        engine = Engine(model, c, DEVICE)
        engine.train_step(first)
        if dist.get_rank() == 0:
            bias = model.context_input.projection.bias
            hook = (
                model.register_forward_hook(infinite)
                if bad == "loss"
                else bias.register_hook(lambda gradient: gradient * torch.inf)
            )
        engine.train_step(second)
        if dist.get_rank() == 0:
            hook.remove()
        engine.train_step(third)
        try:
            engine.read()
            said, index = "nothing", -1
        except NonFiniteLossError as error:
            said, index = str(error), error.index
        expected = good.weights()
        same = all((value - expected[name]).abs().max() <= NOISE for name, value in engine.weights().items())
        found.append((said, index, same))
    return found


def rates(c: TrainConfig, steps: int, often: bool) -> tuple[list[tuple[float, float]], int]:
    """Losses and learning rates of a run that reads each step, or when it must alone; and how often it read."""
    from arplus.training.engine import Engine

    engine = Engine(initial_model(c), c, DEVICE, c.max_steps)
    engine.reads_each_step = often
    found, readings = [], 0
    for step in engine_steps(c, 0, steps):
        engine.train_step(step)
        if engine.wants_reading:
            readings += 1
            found += [(result.loss, result.lr) for result in engine.read()[0]]
    found += [(result.loss, result.lr) for result in engine.read()[0]]
    return found, readings


def train_part(config: TrainConfig, state: dict | None, first: int, last: int) -> dict[str, Any]:
    """Trains steps ``first`` to ``last - 1`` from a state, and gives losses, norms and the state after them."""
    from arplus.training.engine import Engine

    model = initial_model(config)
    if state is not None:
        model.load_weights(state["weights"])
    engine = Engine(model, config, DEVICE, config.max_steps)
    if state is not None:
        engine.load_moments(state["moments"], first)
        engine.schedule.load(state["schedule"])
    found = results(engine, engine_steps(config, first, last))
    return {
        "curve": [r.loss for r in found],
        "norms": [r.grad_norm for r in found],
        "weights": engine.weights(),
        "moments": engine.moments(),
        "schedule": engine.schedule.state(),
    }


def train_parts(parts: list[tuple[TrainConfig, int, int]], state: dict | None = None) -> list[dict[str, Any]]:
    """:func:`train_part` from step to step, each part from the state of the one before."""
    made: list[dict[str, Any]] = []
    for c, first, last in parts:
        found = [train_part(c, made[-1] if made else state, first, last)]
        dist.broadcast_object_list(found)  # rank 0 alone has the state, and all start from it
        made += found
    return made


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
            made = engine.Engine(initial_model(c), c, DEVICE)
            steps = [Step([global_batch(c.model, i, 0, 8)], len(global_batch(c.model, i).target_N)) for i in range(5)]
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
