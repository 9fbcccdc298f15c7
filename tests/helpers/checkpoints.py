"""Small states with random weights and moments, for tests of checkpoints."""

from dataclasses import replace

import torch

from arplus.config import ExampleRules, TrainConfig
from arplus.model.network import PersonaTransformer
from arplus.runs.checkpoint import TrainProgress, TrainState
from arplus.runs.folder import FinalMetrics
from arplus.text import Vocabulary, sizes
from helpers.small_models import smallest_run

CHARACTERS = Vocabulary(list("你好吗我很，"), [9, 8, 7, 6, 5, 4])
PERSONA_WORDS = Vocabulary(["性别", "地址", "兴趣", "男", "四川 成都"], [5, 5, 5, 3, 2])


def small_config(name: str = "arplus") -> TrainConfig:
    return replace(smallest_run(name), data="数据", run_name="small")


def final_metrics(preset: str = "arplus", **changes: object) -> FinalMetrics:
    """What a finished run leaves."""
    values: dict[str, object] = {
        "run_name": "first",
        "preset": preset,
        "fingerprint": "abc",
        "steps": 10,
        "examples": 80,
        "stopped_early": False,
        "best_response_ppl": None,
        "train_seconds": 1.5,
        "peak_memory_bytes": 2**30,
        "mlflow_run_id": "m",
        "valid": {},
    }
    return FinalMetrics(**(values | changes))


def state(step: int = 120, name: str = "arplus", seed: int = 0) -> TrainState:
    """A state with random weights and moments."""
    torch.manual_seed(seed)
    config = small_config(name)
    weights = PersonaTransformer(config.model, sizes(CHARACTERS, PERSONA_WORDS)).weights()
    moments = {f"{kind}.{n}": torch.rand_like(w) for kind in ("exp_avg", "exp_avg_sq") for n, w in weights.items()}
    return TrainState(
        config=config,
        progress=TrainProgress(
            fingerprint="abc", epoch=1, epoch_step=20, step=step, examples=640, best_response_ppl=61.5
        ),
        schedule={"lr": 0.001, "best": 3.25, "num_bad_epochs": 4},
        rules=ExampleRules(),
        characters=CHARACTERS,
        persona_words=PERSONA_WORDS,
        weights=weights,
        moments=moments,
        mlflow_run_id="0f" * 16,
    )


def step_of(uri: str) -> int:
    return int(uri.rsplit("-", 1)[1])
