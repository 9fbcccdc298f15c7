"""MLflow's models: a folder that ``mlflow.pyfunc`` loads, its versions in the registry, and reading them back.

Apart from ``client`` because each is long enough by itself; these two alone import mlflow.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from arplus import storage
from arplus.config import TrainConfig
from arplus.errors import UsageError
from arplus.tracking.client import connect, explain
from arplus.tracking.run import RunRef, absolute_uri, default_uri

_FORMS = re.compile("models:/[^/]+(/([0-9]+|latest)|@[^/@]+)|runs:/[^/]+/.+")
_MOVES = re.compile("(models:/[^/]+)(?:@[^/@]+|/latest)")
"""What names another version from one day to the next, and the model."""


class Flavor(NamedTuple):
    """How MLflow loads a model, and what goes into it and comes out of it: a table of strings each."""

    loader: str
    """Module whose ``_load_pyfunc`` is given the folder."""
    columns: Mapping[str, bool]
    """Columns of the input, and whether each is required."""
    output: str
    """The column of the output."""
    params: Mapping[str, int | float]
    """What may be set with a request, and the defaults."""
    example: Sequence[Mapping[str, str]]
    """Rows of an input."""
    packages: Sequence[str]
    """What must be installed beside this package, which is on no index; as installed here."""


def flavor_files(flavor: Flavor, facts: Mapping[str, str]) -> dict[str, bytes]:
    """The files that make a folder a model of MLflow's, by name: MLmodel, example, requirements.

    ``facts`` are kept in MLmodel.
    """
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from pandas import DataFrame

    types = {int: DataType.long, float: DataType.double}
    signature = ModelSignature(
        Schema([ColSpec(DataType.string, name, required) for name, required in flavor.columns.items()]),
        Schema([ColSpec(DataType.string, flavor.output)]),
        ParamSchema([ParamSpec(name, types[type(value)], value) for name, value in flavor.params.items()]),
    )
    with tempfile.TemporaryDirectory(prefix="arplus-flavor-") as folder:
        pyfunc.save_model(
            f"{folder}/model",
            loader_module=flavor.loader,
            signature=signature,
            input_example=DataFrame(list(flavor.example), columns=list(flavor.columns)),
            # Without torch's +cpu or +cu130, which no index has.
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in flavor.packages],
            metadata=dict(facts),
        )
        return {file.name: file.read_bytes() for file in Path(folder, "model").iterdir() if file.is_file()}


def register_model(
    run: RunRef, artifact: str, name: str, alias: str | None, tags: Mapping[str, str], description: str
) -> str:
    """Registers the artifact folder of a run as a version of the model ``name``, and points ``alias`` to it.

    Gives the version. A folder that is one already stays that one.
    """
    from mlflow.exceptions import MlflowException

    with explain(run.uri):
        client = connect(run.uri)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(run.run_id).info.artifact_uri}/{artifact}"
        versions = [v for v in _versions(client, run) if v.name == name and v.source == source]
        if not versions:
            # Without a wait, of which MLflow writes a line: a version of a folder that is there is ready at once.
            asked = {"description": description, "await_creation_for": 0}
            versions = [client.create_model_version(name, source, run.run_id, dict(tags), **asked)]
        if alias is not None:
            client.set_registered_model_alias(name, alias, versions[0].version)
        return str(versions[0].version)


def registered(run: RunRef, name: str) -> str | None:
    """The URI of the newest version of a run's model under that name; None where there is none."""
    with explain(run.uri):
        versions = [int(v.version) for v in _versions(connect(run.uri), run) if v.name == name]
    return f"models:/{name}/{max(versions)}" if versions else None


def artifact_of(run: RunRef, checkpoint: str, artifact: str) -> str:
    """The artifact folder for a run's model, ``artifact`` unless a registered version has another checkpoint there.

    What is registered stays what it is, also where its run goes on and comes to a better checkpoint.
    """
    with explain(run.uri):
        versions = _versions(connect(run.uri), run)
    same = (v.source.rpartition("/")[2] for v in versions if v.tags.get("checkpoint") == checkpoint)
    return next(same, f"{artifact}-{checkpoint}" if versions else artifact)


def _versions(client: Any, run: RunRef) -> list[Any]:
    """The registered versions of a run's models. Not by their name, which may hold quotes."""
    return list(client.search_model_versions(f"run_id = '{run.run_id}'"))


def is_model_uri(uri: str) -> bool:
    """Whether ``uri`` is one of MLflow's: ``models:/NAME/VERSION``, ``models:/NAME@ALIAS`` or ``runs:/ID/ARTIFACT``."""
    return uri.startswith(("models:", "runs:"))


def server_of(uri: str, mlflow: str | None) -> str | None:
    """The tracking URI by which a model's URI is read: ``mlflow`` where given, else as jobs have it by default.

    Other URIs need none. Raises :class:`UsageError` where the default is a sqlite file that is not there.
    """
    if mlflow is not None or not is_model_uri(uri):
        return mlflow
    found = default_uri(TrainConfig().storage)
    if found.startswith("sqlite:///") and not Path(found.removeprefix("sqlite:///")).exists():
        raise UsageError(
            f"{uri}: is a model of MLflow, and {found} does not exist; name the server or file in --mlflow or "
            "MLFLOW_TRACKING_URI"
        )
    return found


def pin(uri: str, mlflow: str | None) -> str:
    """``uri`` as all processes understand it, whenever they read it: absolute, and a version instead of an alias."""
    if not is_model_uri(uri):
        return storage.absolute(uri)
    if not _FORMS.fullmatch(uri):
        raise UsageError(f"{uri}: must be models:/NAME/VERSION, models:/NAME@ALIAS or runs:/ID/checkpoint")
    if not _MOVES.fullmatch(uri):
        return uri
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    with _asked(uri, mlflow) as (client, _):
        return "models:/" + "/".join(map(str, get_model_name_and_version(client, uri)))


def as_begun(uri: str, pinned: str | None) -> str:
    """``uri``, or where it is an alias of the model that a run began with what that was ``pinned`` to.

    The run goes on, wherever the alias points by now.
    """
    model = _MOVES.fullmatch(uri)
    return pinned if model and pinned and pinned.rpartition("/")[0] == model[1] else uri


@contextlib.contextmanager
def fetched(uri: str, mlflow: str | None) -> Iterator[str]:
    """Where the checkpoint ``uri`` can be read within the block: there, or for MLflow's URIs in a temporary copy.

    Raises :class:`UsageError` for what MLflow does not have and :class:`ResourceError` where it does not answer.
    """
    if not is_model_uri(uri):
        yield uri
        return
    with tempfile.TemporaryDirectory(prefix="arplus-model-") as folder:
        pinned = pin(uri, mlflow)
        with _asked(uri, mlflow) as (client, server):
            from mlflow.artifacts import download_artifacts

            name, _, number = pinned.removeprefix("models:/").rpartition("/")
            source = pinned if pinned.startswith("runs:/") else client.get_model_version_download_uri(name, number)
            copy = download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=server)
        if not Path(copy, "manifest.json").exists():
            raise UsageError(f"{uri}: is not a checkpoint of arplus; a run has its best one as runs:/ID/checkpoint")
        yield copy


@contextlib.contextmanager
def _asked(uri: str, mlflow: str | None) -> Iterator[tuple[Any, str]]:
    """A client, and its address, with errors that name ``uri``."""
    from mlflow.exceptions import MlflowException

    server = absolute_uri(str(server_of(uri, mlflow)))
    client = connect(server)
    with explain(server):
        try:
            yield client, server
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UsageError(f"{uri}: MLflow at {server} does not have it ({' '.join(str(error).split())})") from None
