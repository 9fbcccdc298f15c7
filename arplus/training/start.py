"""What a run starts from: its settings with every name filled in, its data, its weights."""

import logging
from dataclasses import replace

import torch
import torch.distributed as dist

from arplus import storage, tracking
from arplus.config import TrainConfig, VocabularySizes, flag
from arplus.data.dataset import Dataset
from arplus.errors import UsageError
from arplus.model.cost import ADDED_LATER, component_of, outline
from arplus.model.network import PersonaTransformer
from arplus.pretrained import features
from arplus.pretrained import start as pretrained
from arplus.runs import checkpoint
from arplus.runs.checkpoint import TrainState
from arplus.runs.folder import RunFolder
from arplus.tracking.run import absolute_uri

log = logging.getLogger(__name__)


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with every name and path filled in, as it is written beside the run.

    Raises :class:`UsageError` for names, models and components that cannot be.
    """
    config.require_data()
    for field, problem in config.name_problems():
        raise UsageError(f"--{flag(field)}: {problem}")
    config = replace(
        config,
        data=storage.absolute(config.data),
        storage=storage.absolute(config.storage),
        # Ray Train and Tune have their workers and trials work in folders of their own.
        resume=config.resume if config.resume in ("auto", "never") else storage.absolute(config.resume),
        mlflow=config.mlflow and absolute_uri(config.mlflow),
        run_name=config.run_name or config.preset,
        experiment=config.experiment or "arplus",
    )
    before, mlflow, init_from = None, config.mlflow, config.init_from
    from_mlflow = init_from is not None and tracking.is_model_uri(init_from)
    if from_mlflow or config.init.pretrained is not None or config.model.features.path is not None:
        before = RunFolder(storage.join(config.storage, config.run_name)).config.find()
    if from_mlflow:  # the workers do not have this job's variables
        mlflow = mlflow or tracking.default_uri(config.storage)
    if init_from is not None:
        init_from = tracking.pin(tracking.as_begun(init_from, before.init_from if before else None), mlflow)
    config = replace(
        config,
        init_from=init_from,
        mlflow=mlflow,
        init=pretrained.resolve(config.init, before.init if before else None),
        model=features.resolved(config.model, before.model if before else None),
    )
    if config.optimizer.only:
        outline(config.model, VocabularySizes(), config.optimizer.only)  # an error is told before anything starts
    return config


def check_start(config: TrainConfig, dataset: Dataset, *, new: bool = True) -> None:
    """Logs what the weights of a new run start from. Raises :class:`UsageError` at once for what does not fit."""
    model = outline(config.model, dataset.sizes)
    features.attach(model, dataset.characters, dataset.rules)
    for line in pretrained.initialise(model, dataset.characters, config.init) if new else ():
        log.info("%s", line)


def load(config: TrainConfig, start: str | None) -> tuple[Dataset, PersonaTransformer, TrainState | None]:
    """The data set, the model with its weights, and the state that it starts from; without a collective call."""
    dataset = storage.with_retries(config.data, Dataset.open, config.data)
    torch.manual_seed(config.seed)
    model = features.attach(PersonaTransformer(config.model, dataset.sizes), dataset.characters, dataset.rules)
    state = checkpoint.load(start, moments=True) if start else None
    if state is not None:
        model.load_weights(state.weights)
    elif config.init_from is not None:
        _initialise(model, config, dataset)
    if state is None:
        pretrained.initialise(model, dataset.characters, config.init)
    return dataset, model, state


def _initialise(model: PersonaTransformer, config: TrainConfig, dataset: Dataset) -> None:
    uri = str(config.init_from)
    with tracking.fetched(uri, config.mlflow) as folder:
        state = checkpoint.load(folder)
    dataset.check_vocabularies(state.characters, state.persona_words, of=f"--init-from {uri}")
    added = {
        name: value
        for name, value in model.weights().items()
        if name not in state.weights and component_of(name) in ADDED_LATER
    }
    try:
        model.load_weights(added | state.weights)
    except UsageError as error:
        raise UsageError(f"--init-from {uri}: {error}") from None
    if added and not (dist.is_initialized() and dist.get_rank()):
        log.info("--init-from %s: has no %s, which start afresh", uri, ", ".join(added))
