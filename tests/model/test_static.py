"""A training step asks no tensor what it holds, so that a GPU can run it as one graph without waiting for it.

Fake tensors have shapes and no values: a shape that depends on data fails, and so does a value that Python asks for.
Tensors of the device "meta" have no values either, and stand for those of a GPU: what meets one of the CPU would fail
there, or wait for a copy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.small_models import FORMS, SIZES, WEIGHTED, gradients, make_batch, small, take
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental import _config as assumptions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arplus import kernels
from arplus.config import ModelConfig, Sampling
from arplus.model.batch import Batch, Packed, Sequences
from arplus.model.generate import generate
from arplus.model.network import PersonaTransformer
from arplus.model.ops import Module, Operations


def faked(value: Any, mode: FakeTensorMode) -> Any:
    """The batch, or a part of it, with fake tensors; the sizes of its blocks stay Python's."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, Packed):
        return Packed(*(faked(part, mode) for part in value))
    if isinstance(value, Batch | Sequences):
        names = [f.name for f in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: faked(getattr(value, name), mode) for name in names})
    return value


def step(config: ModelConfig, operations: Operations) -> None:
    """Loss, backward, clipping and optimizer on fake tensors."""
    batch = take(make_batch(config), range(5), [2, 3])
    # How adapters are initialised, once, depends on what is drawn.
    with FakeTensorMode() as mode, mock.patch("torch.nn.init.trunc_normal_"):
        model = PersonaTransformer(config, SIZES).train()
        for module in model.modules():
            if isinstance(module, Module):
                module.ops = operations
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        gradients(model, model(faked(batch, mode)))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("preset", ["arplus", "ar", "no-rezero", *FORMS, *WEIGHTED])
def test_no_shape_and_no_branch_of_a_step_depends_on_data(preset: str) -> None:
    step(dataclasses.replace(small(preset), layers=2, dropout=0.1), Operations())


class Selecting(Operations):
    """Selects what it has not dropped: as many elements as there happen to be."""

    def dropout(self, x: Tensor, p: float) -> Tensor:
        return x.index_put((x > 0,), x[x > 0])


class Asking(Operations):
    """Asks whether there is anything to drop."""

    def dropout(self, x: Tensor, p: float) -> Tensor:
        return super().dropout(x, p) if x.abs().max() > 0 else x


@pytest.mark.parametrize("operations", [Selecting, Asking])
def test_such_an_operation_is_found(operations: type[Operations]) -> None:
    config = dataclasses.replace(small("arplus"), layers=2, dropout=0.1)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        step(config, operations())


@pytest.mark.processes
@pytest.mark.parametrize("preset", ["arplus", "unshared", "unshared-gelu", *WEIGHTED])
def test_the_loss_is_one_graph_without_a_break(preset: str) -> None:
    """Dynamo alone, which raises at a break; Inductor's compiler would take minutes."""
    config = dataclasses.replace(small(preset), layers=1, repeats=1)
    model, batch = PersonaTransformer(config, SIZES), take(make_batch(config), range(5), [2, 3])
    kernels.use(model, torch.device("cuda"))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(batch), model(batch))


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices, but for single numbers; whatever is asked of values is true."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True
        found = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten._to_copy.default:
            tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor) and x.dim()]
            assert len({x.device for x in tensors}) < 2, function
        return found


def on_one_device(preset: str, act: Callable[[PersonaTransformer, Batch], object], operations: Operations) -> None:
    """Lets a model and a batch act that are not on the CPU."""
    config = dataclasses.replace(small(preset), layers=2, dropout=0.1)
    model = PersonaTransformer(config, SIZES).train().to("meta")
    for module in model.modules():
        if isinstance(module, Module):
            module.ops = operations
    batch = take(make_batch(config), range(5), [2, 3]).to("meta")
    with OneDevice(), mock.patch.object(assumptions, "meta_nonzero_assume_all_nonzero", True):
        act(model, batch)


ACTS: dict[str, Callable[[PersonaTransformer, Batch], object]] = {
    "trains": lambda model, batch: gradients(model, model(batch)),
    "replies": lambda model, batch: generate(model, batch, Sampling(max_characters=3, min_characters=1)),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("preset", ["arplus", "ar", "no-rezero", *FORMS, *WEIGHTED])
def test_what_a_gpu_computes_with_is_on_the_gpu(preset: str, act: str) -> None:
    on_one_device(preset, ACTS[act], Operations())


class Elsewhere(Operations):
    """Selects by an index that it made on the CPU: a GPU does it, after a copy that it waits for."""

    def dropout(self, x: Tensor, p: float) -> Tensor:
        return x[torch.arange(len(x))]


def test_what_is_elsewhere_is_found() -> None:
    with pytest.raises(AssertionError, match=r"aten\.index"):
        on_one_device("arplus", ACTS["trains"], Elsewhere())
