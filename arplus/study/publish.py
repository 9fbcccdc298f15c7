"""A study's best model, where colleagues look for it: in its MLflow run and in the model registry."""

from arplus import tracking
from arplus.data.dataset import Dataset
from arplus.study.record import Study
from arplus.training.trainer import log_best

ALIAS = "best"
"""Alias of the registered model's version that is the best run's."""


def publish_best(study: Study, dataset: Dataset) -> str:
    """Logs the best run's model as its artifact and registers it under the study's name; gives the model's URI."""
    best = study.best
    assert best is not None
    assert best.score is not None
    run = study.tracked_run(best)
    assert run is not None
    kept = tracking.Tracker(run, record=study.record.with_name(f"{best.name}.jsonl"))
    log_best(kept, study.run_uri(best.name), dataset)
    kept.close("FINISHED")
    tags = {"study": study.name, "response_ppl": f"{best.score:.4f}"}
    tracking.register_model(run, "checkpoint", study.name, ALIAS, tags)
    return f"models:/{study.name}@{ALIAS}"
