"""A checkpoint's metrics on exactly all examples of a split, computed window by window through Ray Data."""

import json
import logging
import pickle
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext

from arplus import checkpoint, storage, tracking
from arplus.checkpoint import build_model
from arplus.config import EvaluateConfig, special_ids
from arplus.data.collate import Draws, Layout, Window
from arplus.data.dataset import Dataset
from arplus.data.feed import Order, as_batch
from arplus.data.personas import Persona, agrees, askable, persona_question
from arplus.errors import ResourceError, UserError
from arplus.evaluation.metrics import HonestMetrics, PaperMetrics
from arplus.model.batch import Batch
from arplus.model.generate import generate
from arplus.text import Vocabulary

log = logging.getLogger(__name__)

WINDOW_BATCHES = 64
"""Batches a task evaluates at a time."""


@dataclass
class PersonaMetrics:
    """Answers to questions about the responder's place, gender or hobby (:mod:`arplus.data.personas`)."""

    questions: int = 0
    """Examples that ask for something that the responder's profile has."""
    agreeing: int = 0
    """Replies that answer as the profile would."""
    agreeing_when_shuffled: int = 0
    """The same when the model is given another example's persona: what agrees by chance."""

    def __add__(self, other: "PersonaMetrics") -> "PersonaMetrics":
        return PersonaMetrics(
            self.questions + other.questions,
            self.agreeing + other.agreeing,
            self.agreeing_when_shuffled + other.agreeing_when_shuffled,
        )

    def result(self) -> dict[str, float]:
        """Number of questions and, where there are any, the shares of replies that agree."""
        if not self.questions:
            return {"questions": 0}
        return {
            "questions": self.questions,
            "agreement": self.agreeing / self.questions,
            "agreement_with_shuffled_personas": self.agreeing_when_shuffled / self.questions,
        }


@dataclass
class Tally:
    """All metrics of some examples; the tallies of parts add up to that of the whole."""

    honest: HonestMetrics
    paper: PaperMetrics
    persona: PersonaMetrics = field(default_factory=PersonaMetrics)
    examples: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.honest.merge(other.honest),
            self.paper.merge(other.paper),
            self.persona + other.persona,
            self.examples + other.examples,
        )


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The metrics of a checkpoint on a split, in three named groups; needs a connected Ray.

    ``honest``, ``paper_compatible`` (never to be compared with each other) and ``persona``. Raises
    :class:`UserError` where the data set has other vocabularies than the checkpoint.
    """
    # As the actors, which may run elsewhere, understand them.
    found = checkpoint.find(storage.absolute(config.checkpoint))
    config = replace(config, checkpoint=found, data=storage.absolute(config.data))
    state = checkpoint.load(config.checkpoint)
    dataset = Dataset.open(config.data)
    _same_vocabulary("characters", state.characters, dataset.characters, config)
    _same_vocabulary("persona words", state.persona_words, dataset.persona_words, config)
    order = Order(
        split=dataset.split(config.split),
        batch_size=config.batch_size,
        window_batches=WINDOW_BATCHES,
        seed=config.seed,
        shuffled=False,
    )
    if not order.split.examples:
        raise UserError(f"--split {config.split}: has no examples in {config.data}")
    tally = Tally(HonestMetrics(state.characters.special), PaperMetrics(state.characters.special))
    for part in _tallies(order, config):
        tally += part
    assert tally.examples == order.split.examples, "evaluation must see every example exactly once"
    return {
        "checkpoint": config.checkpoint,
        "data": config.data,
        "fingerprint": dataset.fingerprint,
        "split": config.split,
        "examples": tally.examples,
        "honest": tally.honest.result(),
        "paper_compatible": tally.paper.result(),
        "persona": tally.persona.result(),
    }


def _tallies(order: Order, config: EvaluateConfig) -> list[Tally]:
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if cpus < 2:
        raise ResourceError(f"evaluation needs 2 CPUs (one for a model, one for Ray Data); the cluster has {cpus}")
    context = DataContext.get_current()
    context.enable_progress_bars = False
    n = order.windows
    dataset = ray.data.range(n, override_num_blocks=n).map_batches(
        Evaluator,
        fn_constructor_args=(order, config),
        batch_size=None,
        compute=ActorPoolStrategy(size=min(gpus or cpus - 1, n)),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    return [pickle.loads(row["tally"]) for row in dataset.iter_rows()]


class Evaluator:
    """Holds the model in a Ray Data actor and tallies windows of examples."""

    def __init__(self, order: Order, config: EvaluateConfig) -> None:
        # Read here, not handed in: an actor that Ray starts again must not depend on an object that may be gone.
        self.state = checkpoint.load(config.checkpoint)
        self.order = order
        self.config = config
        self.layout = Layout.of(self.state.config.model, self.state.sizes)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build_model(self.state).to(self.device)
        self.special = special_ids(self.state.sizes.characters)

    def __call__(self, item: dict[str, Any]) -> pa.Table:
        """The tally of the window that ``item`` names."""
        (window,) = item["id"]
        tally = self.tally(int(window))
        return pa.table({"tally": [pickle.dumps(tally)]})

    @torch.inference_mode()
    def tally(self, index: int) -> Tally:
        """The tally of one window of the split."""
        columns = self.layout.columns
        table = self.order.read(0, index, [*columns, *({"target_words"} - set(columns))])
        window = Window(table, self.layout)
        tally = Tally(HonestMetrics(self.special), PaperMetrics(self.special))
        random = torch.Generator().manual_seed(self.config.seed * 1_000_003 + index)
        for rows in self.order.batches(0, index, window.lengths):
            arrays = window.batch(rows, np.ones(len(rows), bool), Draws(self.config.seed, 0))
            batch = as_batch(arrays).to(self.device)
            losses = self.model(batch)
            replies = generate(self.model, batch, self.config.sampling, random).cpu()
            references = arrays["response_BT"][:, 1:]
            targets = int(losses.count_dialogue)
            tally.honest.add_loss(float(losses.sum_dialogue), targets)
            tally.honest.add(replies.tolist(), references.tolist())
            tally.paper.add_loss(float(losses.sum_dialogue) / targets, float(losses.sum_auxiliary) / targets)
            tally.paper.add(replies.tolist(), references.tolist())
            tally.persona += self._persona(batch, replies, table.take(rows), random)
            tally.examples += len(rows)
        return tally

    def _persona(
        self, batch: Batch, replies: torch.Tensor, examples: pa.Table, random: torch.Generator
    ) -> PersonaMetrics:
        asked = []
        for i, row in enumerate(examples.select(["context", "target_words"]).to_pylist()):
            kind = persona_question(self._last_utterance(row["context"]))
            persona = self._persona_of(row["target_words"])
            if kind is not None and kind in askable(persona):
                asked.append((i, kind, persona))
        if not asked:
            return PersonaMetrics()
        # Every example gets its neighbour's persona, as responder in the memory and as speaker in the context.
        other = batch.target_persona_BK.roll(1, 0)
        profiles = batch.profiles_BPW.clone()
        profiles[:, 0] = profiles[:, 0].roll(1, 0)
        shuffled = generate(
            self.model, replace(batch, target_persona_BK=other, profiles_BPW=profiles), self.config.sampling, random
        )
        decode = self.state.characters.decode
        return PersonaMetrics(
            len(asked),
            sum(agrees(kind, decode(replies[i].tolist()), persona) for i, kind, persona in asked),
            sum(agrees(kind, decode(shuffled[i].tolist()), persona) for i, kind, persona in asked),
        )

    def _last_utterance(self, context: list[int]) -> str:
        sep = self.special.sep
        start = max((i + 1 for i, c in enumerate(context[:-1]) if c == sep), default=0)
        return self.state.characters.decode(context[start:])

    def _persona_of(self, target_words: list[int]) -> Persona:
        # 性别 g 地址 l 兴趣 t t …: keys stand at 0, 2 and 4.
        words = [self.state.persona_words.token(i) for i in target_words]
        return Persona.from_words([words[1], words[3], *words[5:]])


def track(result: dict[str, Any], config: EvaluateConfig) -> None:
    """Logs the metrics to the MLflow run that trained the checkpoint, as ``test/honest/bleu`` and so on."""
    state = checkpoint.load(config.checkpoint)
    run = tracking.start_run(
        config.mlflow or state.config.mlflow or tracking.default_uri(state.config.storage),
        state.config.experiment,
        state.config.run_name,
        tags={},
        params={},
        resume_run_id=state.mlflow_run_id,
    )
    groups = ("honest", "paper_compatible", "persona")
    metrics = {f"{config.split}/{group}/{k}": v for group in groups for k, v in result[group].items()}
    with tempfile.TemporaryDirectory() as folder:
        tracker = tracking.Tracker(run, record=Path(folder) / "tracking.jsonl")
        tracker.log(metrics, step=state.progress.examples)
        tracker.log_text(f"evaluation_{config.split}.json", json.dumps(result, ensure_ascii=False, indent=2))
        tracker.close("FINISHED")


def table(result: dict[str, Any]) -> str:
    """The metrics as a readable table."""
    lines = [f"{result['split']}: {result['examples']} examples"]
    for group in ("honest", "paper_compatible", "persona"):
        lines += ["", group.replace("_", "-")]
        lines += [f"  {name:36} {value:12.4f}" for name, value in result[group].items()]
    return "\n".join(lines)


def _same_vocabulary(kind: str, mine: Vocabulary, theirs: Vocabulary, config: EvaluateConfig) -> None:
    if mine.tokens != theirs.tokens:
        raise UserError(
            f"--data {config.data}: its {len(theirs.tokens)} {kind} are not the {len(mine.tokens)} of --checkpoint "
            f"{config.checkpoint}; prepare the data with the checkpoint's vocabularies "
            "(jobs/prepare.py --character-vocabulary … --persona-vocabulary …)"
        )
