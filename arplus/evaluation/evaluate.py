"""A checkpoint's metrics on exactly all examples of a split, computed window by window through Ray Data.

Each worker holds the model, one per GPU, or per CPU where there is none (``--device``). How many examples it takes at a
time changes nothing but rounding.
"""

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext
from ray.util.annotations import RayDeprecationWarning
from torch import Tensor
from torch.nn.functional import cross_entropy

from arplus import storage, tracking
from arplus.cluster import nodes, placement
from arplus.config import EvaluateConfig, ExampleRules, SpecialIds, special_ids
from arplus.data.collate import BatchSpec, ExampleRng, Window
from arplus.data.dataset import Dataset, Split
from arplus.data.personas import Persona
from arplus.data.sampler import EpochSampler
from arplus.errors import ArplusError, ResourceError, RunError, UsageError
from arplus.evaluation import compare, sheets
from arplus.evaluation.compare import Sample
from arplus.evaluation.consistency import PersonaMetrics, asks
from arplus.evaluation.metrics import PredictorMetrics, StandardMetrics
from arplus.evaluation.paper_metrics import PaperMetrics
from arplus.evaluation.replies import readable, ready_model
from arplus.kernels.gpu import has_bf16, leave_cudnn_out
from arplus.model.batch import Batch
from arplus.model.generate import generate
from arplus.model.network import PersonaTransformer
from arplus.runs import checkpoint
from arplus.sums import Sums

log = logging.getLogger(__name__)

PAPER_BATCH = 64
"""Examples of a batch of the paper's code. Its metrics are means over batches, so these are of its size, whatever the
device takes at a time."""
WINDOW_BATCHES = 64
"""Such batches that a task evaluates."""
BATCH_SIZES = {"cpu": 64, "cuda": 512}
"""Examples taken at a time by default, by type of device. On a GPU most of the time of 64 is launching kernels."""
MOST_RESTARTS, MOST_RETRIES = 8, 3
"""How often a worker that died, and a window that it died of, are tried again."""
GROUPS = ("standard", "paper_compatible", "persona", "predictor")
"""The groups of metrics of a split; the last one is of models that predict a persona weight."""


@dataclass
class Tally(Sums):
    """All metrics of some examples; the tallies of parts add up to that of the whole."""

    standard: StandardMetrics
    paper: PaperMetrics
    persona: PersonaMetrics = field(default_factory=PersonaMetrics)
    predictor: PredictorMetrics = field(default_factory=PredictorMetrics)
    examples: int = 0
    samples: list[Sample] = field(default_factory=list)
    """What is compared with another checkpoint, if it is."""
    replies: list[dict[str, Any]] = field(default_factory=list)
    """What ``--replies`` writes, if it is given: a row per example."""

    @classmethod
    def empty(cls, special: SpecialIds, rules: ExampleRules) -> "Tally":
        """Metrics of no example."""
        return cls(StandardMetrics(special), PaperMetrics(special, width=rules.max_utterance_characters + 1))

    def result(self) -> dict[str, Any]:
        """The metrics by group and name."""
        predictor = self.predictor.result()
        return {
            "examples": self.examples,
            "standard": self.standard.result(),
            "paper_compatible": self.paper.result(),
            "persona": self.persona.result(),
            **({"predictor": predictor} if predictor else {}),
        }


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The metrics of a checkpoint on splits, each in three named groups; needs a connected Ray.

    ``standard``, ``paper_compatible`` (never to be compared with each other) and ``persona``; and ``predictor`` of a
    model that predicts a weight. With ``--against`` also those of the other checkpoint, and the comparison
    (:mod:`arplus.evaluation.compare`). Raises :class:`UsageError` where the data set has other vocabularies than a
    checkpoint, or was prepared by other rules.
    """
    config = replace(config, data=storage.absolute(config.data))
    dataset = Dataset.open(config.data)
    splits = _splits(dataset, config)
    asked = [uri for uri in (config.checkpoint, config.against) if uri is not None]
    for uri in asked:  # workers do not have this job's variables
        config = replace(config, mlflow=tracking.server_of(uri, config.mlflow))
    uris = [_usable(uri, dataset, config) for uri in asked]
    nodes.check_workers()
    tallies = [
        {split.name: _evaluate(replace(config, checkpoint=uri), dataset, split) for split in splits} for uri in uris
    ]
    results: list[dict[str, Any]] = [
        {"checkpoint": uri, "splits": {name: tally.result() for name, tally in found.items()}}
        for uri, found in zip(uris, tallies, strict=True)
    ]
    result, *others = results
    result |= {"data": config.data, "fingerprint": dataset.fingerprint, "persona_weight": config.persona_weight}
    for other, found in zip(others, tallies[1:], strict=True):
        result["against"] = other
        result["comparison"] = {
            name: compare.compare(Sample.together(tally.samples), Sample.together(found[name].samples), config.seed)
            for name, tally in tallies[0].items()
        }
    if config.replies is not None:
        sheets.write(config, *([row for t in found.values() for row in t.replies] for found in tallies))
    return result


def _splits(dataset: Dataset, config: EvaluateConfig) -> list[Split]:
    names = config.split or [name for name in dataset.manifest.splits if name not in ("train", "valid")]
    splits = [dataset.split(name) for name in names]
    for split in splits:
        if not split.examples and config.split:
            raise UsageError(f"--split {split.name}: has no examples in {config.data}")
    splits = [split for split in splits if split.examples]
    if not splits:
        raise UsageError(f"--data {config.data}: has no test examples; name another split with --split")
    return splits


def _usable(uri: str, dataset: Dataset, config: EvaluateConfig) -> str:
    """The checkpoint's URI as the actors, which may run elsewhere, understand it."""
    pinned = tracking.pin(uri, config.mlflow)
    with tracking.fetched(pinned, config.mlflow) as folder:
        found, state = checkpoint.load_found(folder)
    dataset.check_vocabularies(state.characters, state.persona_words, of=f"the checkpoint {uri}")
    if different := state.rules.differences(dataset.rules):
        raise UsageError(
            f"--data {config.data}: was prepared by other rules than the checkpoint {uri} was trained on "
            f"({'; '.join(different)}); prepare the data with the checkpoint's rules (flags of jobs/prepare.py)"
        )
    dataset.check_labels(state.config.model, training=False)
    config.sampling.of(state.rules)
    return pinned if tracking.is_model_uri(pinned) else found


def _evaluate(config: EvaluateConfig, dataset: Dataset, split: Split) -> Tally:
    tally = sum(_tallies(windows_of(split), config), Tally.empty(dataset.characters.special, dataset.rules))
    assert tally.examples == split.examples, "evaluation must see every example exactly once"
    return tally


def windows_of(split: Split) -> EpochSampler:
    """The windows in which a split is evaluated."""
    return EpochSampler(split=split, batch_size=PAPER_BATCH, window_batches=WINDOW_BATCHES, seed=0, shuffled=False)


def _tallies(sampler: EpochSampler, config: EvaluateConfig) -> list[Tally]:
    chosen = config.placement
    cpus, gpus, within = placement.find_room(config.device, chosen, 1)
    free = min(cpus - 1, within)
    if not gpus and free < 1:
        there = f", {within:g} of them where a model may be ({chosen.flags})" if within < cpus else ""
        raise ResourceError(
            f"evaluation needs 2 CPUs (one for a model, one for Ray Data); the cluster has {cpus:g}{there}"
        )
    context = DataContext.get_current()
    context.enable_progress_bars = False
    n = sampler.windows
    where: dict[str, Any] = {"accelerator_type": chosen.accelerator_type, "label_selector": chosen.labels}
    # Of itself Ray Data starts one that dies again for ever, as where its node has too little memory. It calls all
    # arguments that set a limit deprecated.
    with warnings.catch_warnings(action="ignore", category=RayDeprecationWarning):
        dataset = ray.data.range(n, override_num_blocks=n).map_batches(
            EvaluationWorker,
            fn_constructor_args=(sampler, config, gpus > 0),
            batch_size=1,  # a window; Ray Data refuses None beside a GPU
            compute=ActorPoolStrategy(size=min(gpus * chosen.runs_per_gpu or int(free), n)),
            # Beside a GPU none: with as many GPUs as CPUs Ray Data's own tasks would wait for ever (ray#64588).
            num_cpus=0 if gpus else 1,
            num_gpus=chosen.gpus_per_worker if gpus else 0,
            max_restarts=MOST_RESTARTS,
            max_task_retries=MOST_RETRIES,
            **{name: value for name, value in where.items() if value},
        )
    tallies = []
    try:
        for row in dataset.iter_rows():
            found: Tally | ArplusError = pickle.loads(row["tally"])
            if isinstance(found, ArplusError):
                raise found
            tallies.append(found)
    except ray.exceptions.RayActorError as error:
        log.error("%s", error)
        raise RunError(
            "a worker of the evaluation died again and again (how is above), perhaps for want of memory: a lower "
            "--batch-size needs less"
        ) from error
    return tallies


class EvaluationWorker:
    """An :class:`Evaluator` as a Ray Data actor, with errors of ours as results: of others Ray Data keeps the text."""

    def __init__(self, sampler: EpochSampler, config: EvaluateConfig, has_gpu: bool) -> None:
        try:
            self.evaluator: Evaluator | ArplusError = Evaluator(sampler, config, has_gpu)
        except ArplusError as error:
            self.evaluator = error

    def __call__(self, item: dict[str, Any]) -> pa.Table:
        """The tally of the window that ``item`` names, or why there is none."""
        (window,) = item["id"]
        found: Tally | ArplusError
        if isinstance(self.evaluator, ArplusError):
            found = self.evaluator
        else:
            try:
                found = self.evaluator.tally(int(window))
            except ArplusError as error:
                found = error
            except torch.OutOfMemoryError:
                taken = self.evaluator.batch_size
                found = ResourceError(f"a GPU has too little memory for {taken} examples at a time; lower --batch-size")
        return pa.table({"tally": [pickle.dumps(found)]})


class Evaluator:
    """Holds the model, on a GPU or not, and tallies windows of examples."""

    def __init__(self, sampler: EpochSampler, config: EvaluateConfig, has_gpu: bool = False) -> None:
        # Read here, not handed in: an actor that Ray starts again must not depend on an object that may be gone.
        with tracking.fetched(config.checkpoint, config.mlflow) as folder:
            self.state = checkpoint.load(folder)
        self.sampler = sampler
        self.config = config
        self.sampling = config.sampling.of(self.state.rules)
        self.spec = BatchSpec.of(self.state.config.model, self.state.sizes)
        leave_cudnn_out()
        # A GPU that is not this actor's own is in sight too (ray#54868); and one that Ray counts may not be there.
        self.device = torch.device("cuda" if has_gpu and torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda" and (share := config.placement.gpus_per_worker) < 1:
            torch.cuda.set_per_process_memory_fraction(share)  # as in training: the others would run out of it
        self.batch_size = config.batch_size or BATCH_SIZES[self.device.type]
        self.model = ready_model(self.state, self.device)
        self.model.persona_weight = None if config.persona_weight == "auto" else config.persona_weight
        self.special = special_ids(self.state.sizes.characters)

    @torch.inference_mode()
    def tally(self, index: int) -> Tally:
        """The tally of one window of the split."""
        columns = self.spec.columns
        table = self.sampler.read(0, index, [*columns, *({"target_words"} - set(columns))])
        window = Window(table, self.spec)
        random, random_persona = (
            torch.Generator().manual_seed((self.config.seed * 1_000_003 + 2 * index + i) % 2**63) for i in range(2)
        )
        nats_GR = np.zeros((2, len(window)))
        tally = Tally.empty(self.special, self.state.rules)
        replies: list[list[int]] = [[]] * len(window)
        references = replies.copy()
        for rows, batch in self._batches(window, np.arange(len(window))):
            with autocast(self.device):
                nats_GB, z_B = nll_per_example(self.model, batch)
                nats_GR[:, rows] = nats_GB.cpu()
                drawn = generate(self.model, batch, self.sampling, random).tolist()
            ends = batch.response.sequences.offsets[1:-1].cpu()
            for row, reply, reference in zip(rows, drawn, batch.target_N.cpu().tensor_split(ends), strict=True):
                replies[row], references[row] = reply, reference.tolist()
            if z_B is not None and window.persona_related is not None:
                tally.predictor.add(z_B.cpu().numpy(), window.persona_related[rows])
        tally.examples += len(window)
        tally.standard.add_loss(nats_GR[0].sum(), int(window.targets.sum()))
        tally.standard.add(replies, references)
        # The paper's code takes random batches. Ours are of like lengths, and 4,096 perfect replies gave a BLEU of
        # 0.537 in such batches and of 0.552 in random ones.
        shuffled = np.random.default_rng([self.config.seed, index]).permutation(len(window))
        for rows in np.split(shuffled, range(PAPER_BATCH, len(window), PAPER_BATCH)):
            tally.paper.add_loss(*(nats_GR[:, rows].sum(1) / window.targets[rows].sum()))
            tally.paper.add([replies[row] for row in rows], [references[row] for row in rows])
        self._add_persona(tally.persona, table, window, replies, shuffled, random_persona)
        if self.config.against is not None:
            sample = Sample.of(self.special, window.example_id, nats_GR[0], window.targets, replies, references)
            tally.samples.append(sample)
        if self.config.replies is not None:
            split, losses = {"split": self.sampler.split.name}, nats_GR[0] / window.targets
            for i, example in enumerate(table.select(["context", "response", "target_words"]).to_pylist()):
                row = {**split, "example": int(window.example_id[i]), **readable(self.state, example, replies[i])}
                tally.replies.append(row | {"loss": float(losses[i])})
        return tally

    def _batches(self, window: Window, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Batch]]:
        """These rows of a window, in order of context length, batch by batch."""
        rows = rows[np.argsort(window.context.lengths[rows], kind="stable")]
        for first in range(0, len(rows), self.batch_size):
            part = rows[first : first + self.batch_size]
            yield part, window.batch(part, ExampleRng(self.config.seed, 0)).to(self.device)

    def _add_persona(
        self,
        metrics: PersonaMetrics,
        examples: pa.Table,
        window: Window,
        replies: list[list[int]],
        shuffled: NDArray[np.int64],
        random: torch.Generator,
    ) -> None:
        """Adds a window's replies; a question is also asked under the persona of its neighbour in ``shuffled``."""
        decode = self.state.characters.decode
        asked: dict[int, tuple[str, Persona]] = {}
        for i, row in enumerate(examples.select(["context", "response", "target_words"]).to_pylist()):
            question, persona = self._last_utterance(row["context"]), self._persona_of(row["target_words"])
            metrics.add(question, persona, decode(replies[i]), decode(row["response"]))
            if asks(question, persona):
                asked[i] = question, persona
        under_another: dict[int, str] = {}
        if len(window) > 1:  # else its neighbour would be itself
            other = np.empty_like(shuffled)
            other[shuffled] = np.roll(shuffled, 1)
            swapped = window.with_personas_of(other)
            for rows, batch in self._batches(swapped, np.array(list(asked), np.int64)):
                with autocast(self.device):
                    drawn = generate(self.model, batch, self.sampling, random).tolist()
                under_another |= {row: decode(reply) for row, reply in zip(rows.tolist(), drawn, strict=True)}
        for i, (question, persona) in asked.items():
            metrics.add_answer(question, persona, decode(replies[i]), under_another.get(i))

    def _last_utterance(self, context: list[int]) -> str:
        sep = self.special.sep
        start = max((i + 1 for i, c in enumerate(context[:-1]) if c == sep), default=0)
        return self.state.characters.decode(context[start:])

    def _persona_of(self, target_words: list[int]) -> Persona:
        # 性别 g 地址 l 兴趣 t t …: keys stand at 0, 2 and 4.
        words = [self.state.persona_words.token(i) for i in target_words]
        return Persona.from_words([words[1], words[3], *words[5:]])


def nll_per_example(model: PersonaTransformer, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """L_D and L_LM of each example of a batch, (2, B), in nats summed over its targets; and z of a predicted weight."""
    target_N = batch.target_N.long()
    hidden_GND, z_B = model.hidden_and_weigh(batch)
    nats_NG = torch.stack(
        [cross_entropy(model.head(hidden_ND).float(), target_N, reduction="none") for hidden_ND in hidden_GND],
        dim=-1,
    )
    return batch.response.sequences.sum(nats_NG).T, z_B


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 in the products on a GPU that has it; what is looked up, normed and summed stays in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))


def table(result: dict[str, Any]) -> str:
    """The metrics as a readable table."""
    lines: list[str] = []
    for name, found in result["splits"].items():
        lines += ["", f"{name}: {found['examples']} examples"]
        for group in filter(found.__contains__, GROUPS):
            lines += ["", group.replace("_", "-")]
            lines += [f"  {metric:36} {value:12.4f}" for metric, value in found[group].items()]
        if "comparison" in result:
            lines += ["", f"against {result['against']['checkpoint']}", *compare.lines(result["comparison"][name])]
    return "\n".join(lines[1:])
