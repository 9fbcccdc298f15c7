"""What a study leaves: its files on storage and in MLflow, and its best model in the model registry."""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from arplus import storage, tracking
from arplus.data.dataset import Dataset
from arplus.errors import ArplusError
from arplus.study.record import Study
from arplus.training.publish import log_best, register

log = logging.getLogger(__name__)

ALIAS = "best"
"""Alias of the registered model's version that is the best run's."""


def conclude(
    study: Study, tracker: tracking.Tracker, dataset: Dataset, result: dict[str, Any], files: dict[str, str]
) -> None:
    """Writes files and ``result.json`` into the study's folder, registers the best model, and tracks it all."""
    for name, text in (files | {"result.json": storage.as_json(result)}).items():
        study.folder.write(name, text)
    result["model"] = publish_best(study, dataset)  # with the numbers safe: MLflow may be away
    files["result.json"] = storage.as_json(result)
    study.folder.write("result.json", files["result.json"])
    for name, text in files.items():
        tracker.log_text(name, text)


def publish_best(study: Study, dataset: Dataset) -> str | None:
    """Logs the best run's model as its artifact and registers it, by default under the study's name; the model's URI.

    None, with a warning, where that fails: it is the last that a study does, and can be done again.
    """
    best = study.best
    assert best is not None
    assert best.score is not None
    run = study.tracked_run(best)
    assert run is not None
    uri, tags = study.folder.run(best.name).uri, {"study": study.name, "response_ppl": f"{best.score:.4f}"}
    folder = Path(tempfile.mkdtemp(prefix="arplus-best-"))  # of the record, and of the files that it names
    kept = tracking.Tracker(run, record=folder / "tracking.jsonl", keep=tracking.keep_of(study.uri))
    try:
        model = storage.with_retries(uri, log_best, kept, uri, dataset)
        return register(run, model, study.config.run.register or study.name, ALIAS, tags, missing=kept.close())
    except ArplusError as error:
        kept.close()
        log.warning(
            "the best model, of run %s, is not registered in MLflow: %s; the same command again registers it",
            best.name,
            error,
        )
        return None
    finally:
        if not kept.dropped:
            shutil.rmtree(folder, ignore_errors=True)
