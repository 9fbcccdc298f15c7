"""Replies for people's eyes (``evaluate --replies``): all of them, and of two checkpoints a blind sheet to rate."""

import csv
import io
import json
import logging
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from arplus import storage
from arplus.config import EvaluateConfig

log = logging.getLogger(__name__)


def write(
    config: EvaluateConfig, mine: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]] | None = None
) -> None:
    """Writes a row per example, and with ``--against`` a blind sheet and its key, of which no rater is to know.

    Each row has ``split`` and ``example``, what :func:`arplus.evaluation.replies.readable` gives, and ``loss``, L_D in
    nats per target. With ``others``, those of the same examples, ``against_reply`` and ``against_loss`` stand beside.
    """
    assert config.replies is not None
    # In one order, whichever worker was first.
    rows = sorted(({**row, "seed": config.seed} for row in mine), key=lambda row: (row["split"], row["example"]))
    if others is not None:
        theirs = {(row["split"], row["example"]): row for row in others}
        for row in rows:
            other = theirs[row["split"], row["example"]]
            row |= {"against_reply": other["reply"], "against_loss": other["loss"]}
    _write(config.replies, rows)
    if others is not None:
        sheet, key = blind(rows, config.seed, (config.checkpoint, str(config.against)))
        for kind, found in (("sheet", sheet), ("key", key)):
            file = PurePosixPath(config.replies.rsplit("/", 1)[-1])
            _write(config.replies.removesuffix(file.name) + f"{file.stem}.{kind}{file.suffix}", found)


def blind(
    rows: Sequence[dict[str, Any]], seed: int, checkpoints: tuple[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs in random order, each in a random order too, and the key that says which reply is whose.

    Two replies that are the same tell nothing, and are left out. The column ``better`` is for the rater.
    """
    random = np.random.default_rng(seed)
    pairs = [row for row in rows if row["reply"] != row["against_reply"]]
    sheet, key = [], []
    for number, index in enumerate(random.permutation(len(pairs)), 1):
        row, swapped = pairs[index], int(random.integers(2))
        replies = (row["reply"], row["against_reply"])
        shown = {"context": row["context"], "persona": row["persona"]}
        sheet.append({"pair": number, **shown, "a": replies[swapped], "b": replies[1 - swapped], "better": ""})
        whose = {"a": checkpoints[swapped], "b": checkpoints[1 - swapped]}
        key.append({"pair": number, "split": row["split"], "example": row["example"], **whose})
    return sheet, key


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as comma-separated values; a column that a row lacks is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _write(uri: str, rows: Sequence[dict[str, Any]]) -> None:
    if uri.endswith(".csv"):
        text = "\ufeff" + as_csv(rows)  # without this mark, Excel takes Chinese for Latin
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    storage.with_retries(uri, storage.write_bytes, uri, text.encode())  # after hours, perhaps
    log.info("%d rows: %s", len(rows), uri)
