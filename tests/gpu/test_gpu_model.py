"""The model at its real size on a GPU against float64, and its replies against those of a CPU."""

from dataclasses import replace

import pytest
import torch
from helpers.small_models import make_batch, make_model, small

from arplus import kernels
from arplus.benchmark.pool import Pool, random_examples
from arplus.config import ModelConfig, Sampling, VocabularySizes
from arplus.model.batch import Batch
from arplus.model.generate import generate
from arplus.model.network import PersonaTransformer

pytestmark = pytest.mark.gpu
SIZES = VocabularySizes()


def real_model() -> PersonaTransformer:
    """AR+ without dropout, its gates open, or only the last matrices would matter."""
    torch.manual_seed(0)
    model = PersonaTransformer(replace(ModelConfig(), dropout=0.0), SIZES).train()
    for name, parameter in model.named_parameters():
        if name.endswith(".r"):
            parameter.data.fill_(0.3)
    return model


def loss_and_gradients(model: PersonaTransformer, batch: Batch, *, bf16: bool = False) -> dict[str, torch.Tensor]:
    with torch.autocast(batch.target_N.device.type, torch.bfloat16, enabled=bf16):
        losses = model(batch)
    loss = (losses.sum_dialogue + 0.5 * losses.sum_auxiliary) / len(batch.target_N)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def batch(gpu: torch.device) -> Batch:
    size = 4 if gpu.type == "cpu" else 64
    pool = Pool(random_examples(2 * size, SIZES), ModelConfig(), SIZES, size)
    return pool.random(1)[0].micro_batches[0].to(gpu)


@pytest.fixture(scope="module")
def exact(batch: Batch, gpu: torch.device) -> dict[str, torch.Tensor]:
    """In float64, by the plain operations."""
    return loss_and_gradients(real_model().to(gpu, torch.float64), batch)


@pytest.mark.parametrize(("bf16", "limit"), [(False, 5e-5), (True, 4e-2)], ids=["fp32", "bf16"])
def test_loss_and_gradients_are_those_of_float64(
    batch: Batch,
    exact: dict[str, torch.Tensor],
    gpu: torch.device,
    bf16: bool,
    limit: float,
) -> None:
    model = real_model().to(gpu)
    kernels.use(model, gpu)
    found = loss_and_gradients(model, batch, bf16=bf16)
    assert found.keys() == exact.keys()
    errors = {name: float((found[name] - of).norm() / of.norm()) for name, of in exact.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < limit, worst


@pytest.mark.parametrize("preset", ["arplus", "ar", "arplus-weighted"])
def test_replies_are_those_of_a_cpu(gpu: torch.device, preset: str) -> None:
    model, batch = make_model(small(preset)), make_batch(small(preset), 100)

    def replies(device: torch.device) -> torch.Tensor:
        kernels.use(model, device)
        sampling = Sampling(max_characters=15, min_characters=15)
        return generate(model.to(device), batch.to(device), sampling, torch.Generator().manual_seed(0)).cpu()

    assert (replies(gpu) == replies(torch.device("cpu"))).float().mean() > 0.99
