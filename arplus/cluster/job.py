"""What an MLflow run says of the job that it is of: code, command line, Ray's ids, image, and the user's own tags."""

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import ray

from arplus.cluster import node, ray_private
from arplus.errors import redact

IMAGE = "ARPLUS_IMAGE"
"""Variable of the images of ``docker/`` that holds the image's own name."""


def tags(own: Iterable[str] = ()) -> dict[str, str]:
    """Tags of the MLflow run of this process's job, and the user's ``own`` (``--tag``); unknown ones are left out."""
    script = Path(sys.argv[0])
    script = Path(*script.parts[-2:]) if script.parent.name == "jobs" else script
    found = {
        **node.code_tags(),
        "mlflow.source.name": str(script),
        "mlflow.source.type": "LOCAL",
        "command": redact(shlex.join([str(script), *sys.argv[1:]])),
        "image": os.environ.get(IMAGE, ""),
    }
    if ray.is_initialized():
        found["ray.job_id"] = ray.get_runtime_context().get_job_id()
        found["ray.submission_id"] = ray_private.submitted_job().get("submission_id", "")
    for item in own:
        name, _, value = item.partition("=")
        found[name.strip()] = value.strip()
    return {name: value for name, value in found.items() if value}
