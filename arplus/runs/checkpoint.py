"""Checkpoints: the whole train state as plain files, complete or not there.

Each is a folder, ``RUN/checkpoints/step-00000120-attempt-1/``, which holds::

    weights.safetensors             fp32, by parameter name
    optimizer.safetensors           AdamW's moments, exp_avg.NAME and exp_avg_sq.NAME
    state.json                      progress, schedule, rules and fingerprint of the data, MLflow run id
    config.json  characters.txt  persona_words.txt
    manifest.json                   size and SHA-256 of every file; written last

Weights and moments are full tensors, so a checkpoint fits any number of workers and any ZeRO stage. Nothing in it is
a pickle. A folder without a manifest is not a checkpoint: a save that died is passed over. Every attempt has folders
of its own, so that one that lives on after it was replaced cannot touch its successor's.

Nothing here waits for storage that is away: :class:`arplus.runs.folder.RunFolder` does.
"""

import functools
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from arplus import storage
from arplus.config import ExampleRules, TrainConfig, VocabularySizes, from_dict, to_dict
from arplus.documents import Document
from arplus.errors import UsageError
from arplus.model.network import PersonaTransformer
from arplus.pretrained import features
from arplus.text import Vocabulary, sizes

log = logging.getLogger(__name__)

FORMAT = 4
WEIGHTS, MOMENTS, STATE, CONFIG = "weights.safetensors", "optimizer.safetensors", "state.json", "config.json"
CHARACTERS, PERSONA_WORDS, MANIFEST = "characters.txt", "persona_words.txt", "manifest.json"
FILES = (WEIGHTS, MOMENTS, STATE, CONFIG, CHARACTERS, PERSONA_WORDS, MANIFEST)
"""Names of a checkpoint's files."""
_NAME = re.compile(r"step-(\d+)(?:-attempt-(\d+))?(-unvalidated)?")
"""Names of checkpoints' folders."""


@dataclass(kw_only=True)
class TrainProgress:
    """Where a run is: what has been consumed of the one global order, and what was best so far."""

    fingerprint: str
    """Fingerprint of the data set that the run trains on."""
    epoch: int = 0
    """Epochs finished."""
    epoch_step: int = 0
    """Optimizer steps done within the current epoch."""
    step: int = 0
    """Optimizer steps done in all: AdamW's update count."""
    examples: int = 0
    """Examples trained on in all; the unit in which steps are tracked."""
    train_seconds: float = 0.0
    """Time of these steps, waits for data included, without validations, checkpoints and starts."""
    best_response_ppl: float | None = None
    """Lowest perplexity on validation so far, of what :func:`compared` gives."""
    validation: dict[str, int | float] = field(default_factory=dict)
    """Metrics of the newest validation."""
    validations_since_best: int = 0
    """Validations since the one with the lowest perplexity."""
    unvalidated: bool = False
    """Whether the run was stopped in a validation: it is due before the next step."""

    def add_validation(self, metrics: dict[str, float]) -> None:
        """Notes a validation, and whether it is the best one."""
        self.validation = metrics
        self.unvalidated = False
        self.validations_since_best += 1
        lowest = math.inf if self.best_response_ppl is None else self.best_response_ppl
        ppl = compared(metrics)
        if ppl is not None and ppl < lowest:  # one that is not a number is never the best
            self.set_best(ppl)

    def set_best(self, response_ppl: float | None) -> None:
        """Sets the lowest perplexity; another one than before is the newest validation's, or none yet."""
        if response_ppl != self.best_response_ppl:
            self.validations_since_best = 0
        self.best_response_ppl = response_ppl


def compared(validation: Mapping[str, float]) -> float | None:
    """The perplexity that the best checkpoint has the lowest of: the response's, or with λ0 = 0 that of L_LM."""
    return validation.get("auxiliary_ppl", validation.get("response_ppl"))


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a checkpoint holds."""

    config: TrainConfig
    progress: TrainProgress
    schedule: dict[str, float]
    """Learning rate and the schedule's counters."""
    rules: ExampleRules
    """Those of the data set: how long utterances and contexts are that the model knows."""
    characters: Vocabulary
    persona_words: Vocabulary
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    mlflow_run_id: str | None = None

    @property
    def sizes(self) -> VocabularySizes:
        """Sizes of the vocabularies."""
        return sizes(self.characters, self.persona_words)


def save(run_uri: str, state: TrainState, *, attempt: int = 0, check: Callable[[], object] = lambda: None) -> str:
    """Writes a checkpoint of an attempt (0: none in particular) and returns its URI; ``check`` as in :func:`write`."""
    name = f"step-{state.progress.step:08d}" + (f"-attempt-{attempt}" if attempt else "")
    if state.progress.unvalidated:
        name += "-unvalidated"  # another folder than the same step's after its validation, which must not overwrite it
    return write(storage.join(run_uri, "checkpoints", name), state, check=check)


def write(
    uri: str,
    state: TrainState,
    more: Mapping[str, bytes] | None = None,
    *,
    check: Callable[[], object] = lambda: None,
) -> str:
    """Writes a checkpoint, with ``more`` files in it, and returns its URI. The manifest comes last and makes it one.

    ``check`` is called at the last moment before that; what it raises leaves the checkpoint incomplete.
    """
    delete(uri)  # what a save that died may have left
    facts = {
        "format": FORMAT,
        "progress": asdict(state.progress),
        "schedule": state.schedule,
        "rules": to_dict(state.rules),
        "mlflow_run_id": state.mlflow_run_id,
    }
    files = {
        WEIGHTS: safetensors.torch.save(state.weights),
        MOMENTS: safetensors.torch.save(state.moments),
        STATE: _json(facts),
        CONFIG: _json(to_dict(state.config)),
        CHARACTERS: state.characters.to_bytes(),
        PERSONA_WORDS: state.persona_words.to_bytes(),
        **(more or {}),
    }
    for name, data in files.items():
        storage.write_bytes(storage.join(uri, name), data)
    described = {name: describe(data) for name, data in files.items()}
    check()
    storage.write_json(storage.join(uri, MANIFEST), {"format": FORMAT, "files": described})
    return uri


def describe(data: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def load(uri: str, *, moments: bool = False) -> TrainState:
    """Reads a checkpoint, every file checked against the manifest; ``uri`` is a checkpoint or a run's folder.

    A run's folder stands for its best checkpoint, or the newest where none was validated. Where the best one is lost
    or damaged it is the newest that is whole, with a warning. The optimizer's moments are read only on request. Raises
    :class:`UsageError` where there is no complete checkpoint, and for one that is named itself and damaged.
    """
    return load_found(uri, moments=moments)[1]


def load_found(uri: str, *, moments: bool = False) -> tuple[str, TrainState]:
    """The URI of the checkpoint that ``uri`` stands for, and its content; see :func:`load`."""
    found = find(uri)
    try:
        return found, _read(found, moments)
    except UsageError as error:
        if found == uri:
            raise
        problem = str(error)
    whole = newest(uri, moments=moments, but=found)
    if whole is None:
        raise UsageError(f"{problem}; {uri} has no other checkpoint that is whole")
    _say_once(f"{problem}; the newest checkpoint that is whole is taken instead, {whole[0]}")
    return whole


def _read(uri: str, moments: bool) -> TrainState:
    try:
        return _parse(uri, moments)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise UsageError(f"{uri}: is damaged ({type(error).__name__}: {error}); take another checkpoint") from error


def _parse(uri: str, moments: bool) -> TrainState:
    manifest = storage.read_json(storage.join(uri, MANIFEST))
    if manifest.get("format") != FORMAT:
        raise UsageError(f"{uri}: checkpoint format {manifest.get('format')!r}; this version reads {FORMAT}")

    def read(name: str) -> bytes:
        data = storage.read_bytes(storage.join(uri, name))
        expected = manifest["files"][name]
        if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise UsageError(f"{storage.join(uri, name)}: does not match its manifest; take another checkpoint")
        return data

    def vocabulary(name: str) -> Vocabulary:
        return Vocabulary.from_bytes(read(name), source=storage.join(uri, name))

    facts, state_uri = json.loads(read(STATE)), storage.join(uri, STATE)
    return TrainState(
        config=from_dict(TrainConfig, json.loads(read(CONFIG)), source=storage.join(uri, CONFIG)),
        progress=from_dict(TrainProgress, facts["progress"], source=state_uri),
        schedule=facts["schedule"],
        rules=from_dict(ExampleRules, facts["rules"], source=state_uri),
        mlflow_run_id=facts["mlflow_run_id"],
        characters=vocabulary(CHARACTERS),
        persona_words=vocabulary(PERSONA_WORDS),
        weights=safetensors.torch.load(read(WEIGHTS)),
        moments=safetensors.torch.load(read(MOMENTS)) if moments else {},
    )


def build_model(state: TrainState) -> PersonaTransformer:
    """The network of a checkpoint, in evaluation mode, on the CPU."""
    model = PersonaTransformer(state.config.model, state.sizes)
    model.load_weights(state.weights)
    return features.attach(model, state.characters, state.rules).eval()


def find(uri: str) -> str:
    """The URI of a checkpoint, for that of a checkpoint or of a run's folder; see :func:`load`, which reads it too."""
    if is_complete(uri):
        return uri
    best, problem = marked_best(uri)
    if best is not None:
        return best.checkpoint
    complete = list_complete(uri)
    if not complete and problem:
        kept = "a study keeps its best run's checkpoints alone, or with --keep-checkpoints all those of every run"
        raise UsageError(f"{problem}, and {uri} has no other; {kept}")
    if not complete:
        raise UsageError(f"{uri}: no complete checkpoint there; give a run's folder or one of its checkpoints/step-…")
    if problem:
        _say_once(f"{problem}; the newest checkpoint is taken instead, {complete[-1]}")
    return complete[-1]


def is_complete(uri: str) -> bool:
    """Whether ``uri`` is a complete checkpoint."""
    return storage.exists(storage.join(uri, MANIFEST))


def list_complete(run_uri: str) -> list[str]:
    """URIs of a run's complete checkpoints, oldest first: by attempt, then by step, then the validated."""
    return sorted((uri for uri, complete in folders(run_uri).items() if complete), key=age)


def newest(
    run_uri: str, *, after: int = -1, moments: bool = True, but: str | None = None
) -> tuple[str, TrainState] | None:
    """The newest checkpoint that is whole, and its URI; None where no attempt above ``after`` left one ``but`` one.

    One that is damaged is passed over with a warning.
    """
    for uri in reversed(list_complete(run_uri)):
        if age(uri)[0] <= after:
            break
        if uri == but:
            continue
        try:
            return uri, load(uri, moments=moments)
        except UsageError as error:
            log.warning("this checkpoint is skipped, and the one before it is taken: %s", error)
    return None


def mark_best(run_uri: str, checkpoint_uri: str, response_ppl: float) -> None:
    """Notes which checkpoint of the run is the best."""
    name = checkpoint_uri.rsplit("/", 1)[1]
    _mark(run_uri).write(BestMark(checkpoint=f"checkpoints/{name}", response_ppl=response_ppl))


def restore_best(run_uri: str, checkpoint_uri: str, progress: TrainProgress) -> float | None:
    """Sees to it that a run that goes on from a checkpoint of its own has a best one, and gives its perplexity.

    The save of the best one may have died before it could mark it. No later validation would, as they are compared with
    the lowest perplexity, which the checkpoint itself holds: it is marked now.

    The best one may have been lost since: deleted, damaged, or its mark. Then the checkpoint that the run goes on from
    is marked as the best, with the perplexity of its own validation, which is that of a checkpoint that exists; where
    it has none, the next validation is the best.
    """
    lowest = progress.best_response_ppl
    own = None if progress.unvalidated else compared(progress.validation)
    best, problem = marked_best(run_uri)
    if best is not None and best.checkpoint != checkpoint_uri:
        try:
            _read(best.checkpoint, moments=False)
        except UsageError as error:
            best, problem = None, str(error)
    if best is None and lowest is not None and lowest != own:
        lowest = own
        log.warning(
            "%s; %s",
            problem or f"{run_uri}: has no best checkpoint",
            f"{checkpoint_uri} is the best one from here on, with a response PPL of {own:.3f}"
            if own is not None
            else "the next validation is the best one",
        )
    # One that was marked already stays: a checkpoint after it may still hold the same validation.
    if own is not None and own == lowest and (best is None or best.response_ppl > own):
        mark_best(run_uri, checkpoint_uri, own)
    return lowest


@dataclass(frozen=True, kw_only=True)
class BestMark:
    """The content of ``best.json``."""

    checkpoint: str
    """Its path in the run's folder, which may be moved."""
    response_ppl: float


def _mark(run_uri: str) -> Document[BestMark]:
    return Document(storage.join(run_uri, "best.json"), BestMark, patient=False)


def marked_best(run_uri: str) -> tuple[BestMark | None, str | None]:
    """The mark, with the URI of a checkpoint that is there; else what is wrong with the mark, if there is one."""
    file = _mark(run_uri)
    try:
        mark = file.find()
    except UsageError as error:
        return None, str(error)
    if mark is None:
        return None, None
    folder, _, name = mark.checkpoint.rpartition("/")
    if folder != "checkpoints" or not _NAME.fullmatch(name):
        return None, f"{file.uri}: names no checkpoint of the run"
    uri = storage.join(run_uri, folder, name)
    if not is_complete(uri):
        return None, f"{file.uri}: the best checkpoint, {uri}, is not there any more, or not whole"
    return replace(mark, checkpoint=uri), None


@functools.cache
def _say_once(warning: str) -> None:
    """Warns, once per process."""
    log.warning("%s", warning)


def age(uri: str) -> tuple[int, int, bool]:
    """Attempt, step, and whether that step's validation is in it."""
    found = _NAME.fullmatch(uri.rsplit("/", 1)[1])
    assert found, uri
    return int(found[2] or 0), int(found[1]), found[3] is None


def folders(run_uri: str) -> dict[str, bool]:
    """A run's checkpoints, and whether each is complete; what else lies beside or in them does not count."""
    folder = storage.join(run_uri, "checkpoints")
    found: dict[str, bool] = {}
    for file in storage.list_files(folder, missing_ok=True):
        name, _, rest = file.removeprefix(f"{folder}/").partition("/")
        if rest and _NAME.fullmatch(name):
            uri = storage.join(folder, name)
            found[uri] = found.get(uri, False) or rest == MANIFEST
    return found


def delete(uri: str) -> None:
    """Deletes a checkpoint, or what a save that died has left of one."""
    # The manifest goes first: a half-deleted folder must not pass for a checkpoint.
    storage.delete(storage.join(uri, MANIFEST))
    storage.delete(uri)


def _json(value: Any) -> bytes:
    return storage.as_json(value).encode()
