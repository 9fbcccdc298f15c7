"""A checkpoint as ``mlflow.pyfunc`` loads and serves it: a table of contexts and personas in, replies out.

It is the loader module of the models that jobs register (:mod:`arplus.training.publish`); MLflow finds it by name.
"""

from typing import Any

import pandas as pd
import torch

from arplus.config import Sampling, with_values
from arplus.errors import UsageError
from arplus.evaluation.replies import Responder, raw_profile
from arplus.runs import checkpoint
from arplus.tracking import Flavor

ROWS = 64
"""Rows that are answered at a time."""
_DEFAULT = Sampling()
FLAVOR = Flavor(
    loader=__name__,
    columns={"context": True, "gender": False, "location": False, "tags": False},
    output="reply",
    params={
        "temperature": _DEFAULT.temperature,
        "top_p": _DEFAULT.top_p,
        "top_k": _DEFAULT.top_k,
        "min_characters": _DEFAULT.min_characters,
        "seed": 0,
    },
    example=[
        {"context": "你是男生还是女生？", "gender": "男", "location": "北京", "tags": "篮球;电影"},
        {"context": "你好\n你好呀\n你是哪里人", "gender": "女", "location": "广东 广州", "tags": "美食;旅游"},
    ],
    packages=(
        *("annotated-types", "boto3", "filelock", "mlflow", "numpy", "orjson", "pandas", "pyarrow", "pydantic"),
        *("safetensors", "torch", "tyro"),
    ),
)
"""A context has one utterance per line, the last of which is answered; a persona's columns are those of jobs/chat.py,
and may be empty or left out."""


class Served:
    """What ``mlflow.pyfunc.load_model`` wraps."""

    def __init__(self, responder: Responder) -> None:
        self.responder = responder

    def predict(self, table: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A reply to each row. The same table, parameters and seed give the same replies.

        Raises :class:`UsageError` for a row that cannot be answered, with its number, and for a parameter out of range.
        """
        given = {name: type(usual)((params or {}).get(name, usual)) for name, usual in FLAVOR.params.items()}
        random = torch.Generator().manual_seed(int(given.pop("seed")))
        sampling = with_values(_DEFAULT, given, source="params").of(self.responder.state.rules)
        rows = table.reindex(columns=list(FLAVOR.columns)).fillna("").astype(str).to_dict("records")
        examples = []
        for number, row in enumerate(rows):
            profile = raw_profile(row["gender"], row["location"], row["tags"])
            try:
                examples.append(self.responder.example(row["context"].splitlines(), profile))
            except UsageError as error:
                raise UsageError(f"row {number}: {error}") from None
        replies: list[str] = []
        for start in range(0, len(examples), ROWS):
            replies += self.responder.answer(examples[start : start + ROWS], sampling, random)
        return pd.DataFrame({FLAVOR.output: replies})


def _load_pyfunc(path: str) -> Served:
    """What MLflow calls with the folder of the model, which is a checkpoint."""
    return Served(Responder(checkpoint.load(path), raw_profile("", "", ""), _DEFAULT, seed=0))
