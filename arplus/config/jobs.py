"""The settings of every job but training."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from arplus.config.placement import PlacementConfig, accelerator_problem
from arplus.config.rules import ExampleRules
from arplus.config.settings import FREE_TEXT, INLINE, Required, RequiredText
from arplus.config.training import Device
from arplus.errors import UsageError

RESERVED_SPLITS = ("train", "valid", "test", "vocabulary", "rejects")
"""Names of folders in a prepared data set that no evaluation set can have."""
PersonaWeight = Literal["auto"] | Annotated[float, Ge(0), Le(1)]
DuplicateKey = Literal["exact_record", "dialogue_and_profiles", "dialogue"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turns raw records into an encoded data set.

    Of a profile it keeps the first 100 tags, and of a tag or place the first 50 characters. What is cut is counted.
    """

    input: Annotated[RequiredText, Required("the URI of a JSON-lines file or of a folder of them")] = ""
    """URI of a JSON-lines file of any name, or of a folder. Of a folder *.jsonl, *.json, *.ndjson and Spark's
    part-00000 are read, plain or with .gz, .zst, .bz2 or .xz. Its other files are listed as left out."""
    output: Annotated[RequiredText, Required("the URI of the data set to make")] = ""
    """URI of the data set to make."""
    evaluation_set: tuple[str, ...] = ()
    """Further records to evaluate on, as NAME=URI, such as the official random and biased test files. All of them
    become the split NAME, encoded with the training vocabularies. A session of the input that has the same dialogue is
    in no split."""
    duplicate_key: DuplicateKey = "dialogue_and_profiles"
    """What two records must share to be duplicates: the whole line; utterances, speakers and profiles; or only the
    utterances."""
    max_reject_share: Annotated[float, Ge(0), Le(1)] = 0.02
    """Stop, and make no data set, when more than this share of the records is rejected."""
    valid: Annotated[float, Ge(0)] = 20_000
    """Validation sessions: a share below 1, or a number. At most 5 % of the dialogues are taken, by their hash."""
    test: Annotated[float, Ge(0)] = 20_000
    """Test sessions: a share below 1, or a number. At most 5 % of the dialogues are taken, by their hash."""
    rules: Annotated[ExampleRules, INLINE] = field(default_factory=ExampleRules)
    """What the data set, and every model trained on it, is made by."""
    min_character_count: Annotated[int, Gt(0)] = 5
    """Characters that the training sessions have less often than this become [UNK]."""
    min_persona_word_count: Annotated[int, Gt(0)] = 2
    """Persona words that the training sessions have less often than this become [UNK]."""
    max_characters: Annotated[int, Gt(0)] = 9_489
    """Size of the character vocabulary: so many of the most frequent are kept, and the special tokens besides."""
    max_persona_words: Annotated[int, Gt(0)] = 10_002
    """Size of the persona vocabulary: so many of the most frequent words are kept, the three keys among them, and the
    special tokens besides."""
    character_vocabulary: str | None = None
    """URI of a character vocabulary to use instead of a counted one, with one token and its count per line."""
    persona_vocabulary: str | None = None
    """URI of a persona vocabulary to use instead of a counted one, in the same form."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        names = [item.partition("=")[0] for item in self.evaluation_set]
        for name, item in zip(names, self.evaluation_set, strict=True):
            if not item.partition("=")[2]:
                yield "evaluation_set", f"must be NAME=URI (got {item!r})"
            elif not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", name) or name in RESERVED_SPLITS:
                yield (
                    "evaluation_set",
                    f"needs a name of letters, digits, - and _, none of {', '.join(RESERVED_SPLITS)} (got {name!r})",
                )
            elif names.count(name) > 1:
                yield "evaluation_set", f"names {name!r} twice"
        for name in ("valid", "test"):
            wanted = getattr(self, name)
            if wanted >= 1 and not float(wanted).is_integer():
                yield name, f"must be a share below 1 or a whole number of sessions (got {wanted})"


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """Writes generated records in PersonalDialog's raw form, with planted duplicates and broken lines."""

    output: Annotated[RequiredText, Required("the URI of the folder or file to write")] = ""
    """URI of a new folder of part files, or of one file that ends in .jsonl, .jsonl.gz or .jsonl.zst."""
    records: Annotated[int, Gt(0), Le(400_000_000)] = 10_000
    """Lines in all, duplicates and broken ones among them."""
    duplicates: Annotated[int, Ge(0)] = 0
    """Lines that repeat an earlier record: half of them exactly, the others with more white space."""
    broken: Annotated[int, Ge(0)] = 0
    """Lines that are not a valid record: truncated, of wrong types, not UTF-8, …"""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of everything. The same settings give the same bytes."""
    persona_answers: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the exchanges in which one speaker asks for place, gender or hobby and the other answers from the
    profile. In real data it is near zero (0 of 179 replies). A higher share makes the use of personas measurable."""
    chatterbot: bool = False
    """Append the Chinese part of chatterbot-corpus (real text, random personas) to the records."""
    part_records: Annotated[int, Gt(0)] = 100_000
    """Lines per part file, if the output is a folder."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if self.duplicates + self.broken > self.records:
            yield (
                "records",
                f"counts all lines, so it must be at least duplicates + broken = {self.duplicates} + {self.broken} "
                f"(got {self.records})",
            )
        elif self.duplicates and self.duplicates + self.broken == self.records:
            yield "duplicates", f"leave no record to be repeated (records = {self.records}, broken = {self.broken})"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are drawn: nucleus sampling (Holtzman et al. 2019). The defaults are the paper's."""

    temperature: Annotated[float, Ge(0)] = 0.7
    """What the logits are divided by. 0 takes the likeliest character each time (greedy)."""
    top_p: Annotated[float, Ge(0), Le(1)] = 0.9
    """Draw from the nucleus, the fewest likeliest characters whose probabilities exceed this sum. 0 draws from all."""
    top_k: Annotated[int, Ge(0)] = 0
    """Keep at most this many of the likeliest characters before the nucleus is taken. 0 keeps all."""
    max_characters: Annotated[int, Gt(0)] | None = None
    """Longest reply, in characters. By default as long as an utterance may be in the model's training data."""
    min_characters: Annotated[int, Ge(0)] = 1
    """Shortest reply, in characters. Until then no special token can be drawn, so the reply cannot end."""

    def of(self, rules: ExampleRules) -> "Sampling":
        """The same for a model of these rules: the longest reply is filled in.

        Raises :class:`UsageError` where the shortest reply would be longer.
        """
        filled = replace(self, max_characters=self.max_characters or rules.max_utterance_characters)
        for name, problem in filled.check():
            raise UsageError(f"--sampling.{name.replace('_', '-')}: {problem}")
        return filled

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if self.max_characters is not None and self.min_characters > self.max_characters:
            yield (
                "min_characters",
                f"must be at most max_characters = {self.max_characters} (got {self.min_characters})",
            )


CHECKPOINT = Required("the URI of a run's folder or of one of its checkpoints")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Computes the metrics of a checkpoint on splits of a prepared data set. It can compare two checkpoints."""

    checkpoint: Annotated[RequiredText, CHECKPOINT] = ""
    """URI of a checkpoint, or of a run's folder, which stands for its best checkpoint. MLflow's models:/NAME/VERSION,
    models:/NAME@ALIAS and runs:/ID/checkpoint are taken too."""
    data: Annotated[RequiredText, Required("the URI of a prepared data set")] = ""
    """URI of a prepared data set with the checkpoint's vocabularies."""
    split: tuple[str, ...] = ()
    """A split to evaluate on. By default test and all evaluation sets."""
    against: str | None = None
    """URI of another checkpoint, run or model with the same vocabularies. Both are evaluated, and a paired bootstrap
    tells which differences are more than noise."""
    json: str | None = None
    """URI of a JSON file to write the metrics to."""
    replies: str | None = None
    """URI of a .csv or .jsonl file to write every reply to, with its context, persona, reference, and loss in nats per
    target. --against adds two files: NAME.sheet.csv (or .jsonl) has pairs of replies in random order for people to
    rate, and NAME.key.csv says whose they are."""
    device: Device = "auto"
    """auto takes the GPUs that the cluster has at that moment, or CPUs if it has none. gpu takes at least one GPU and
    waits until the cluster has started it. cpu takes no GPU."""
    placement: Annotated[PlacementConfig, INLINE] = field(default_factory=PlacementConfig)
    """The GPUs and nodes that workers may have."""
    persona_weight: PersonaWeight = "auto"
    """The persona's weight in a reply (a of Eq. 1), from 0, which leaves it without effect, to 1. auto is what the
    model predicts, or 1 if it predicts none. Every model takes every weight."""
    batch_size: Annotated[int, Gt(0)] | None = None
    """Examples that a worker takes at a time. They do not change the metrics. By default 512 on a GPU, 64 on a CPU."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of the replies."""
    mlflow: str | None = None
    """MLflow tracking URI. By default that of the training run. The metrics go into that run's MLflow run."""
    sampling: Sampling = field(default_factory=Sampling)
    """The replies."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if self.replies is not None and not self.replies.endswith((".csv", ".jsonl")):
            yield "replies", f"must end with .csv or .jsonl, which says how it is written (got {self.replies!r})"
        kind = self.placement.accelerator_type
        if problem := self.placement.device_problem(self.device) or accelerator_problem(kind):
            yield "accelerator_type", problem


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Talks with a checkpoint, which answers as the person it is told to be. With --say it gives one reply."""

    checkpoint: Annotated[RequiredText, CHECKPOINT] = ""
    """URI of a checkpoint, or of a run's folder, which stands for its best checkpoint. MLflow's models:/NAME/VERSION,
    models:/NAME@ALIAS and runs:/ID/checkpoint are taken too."""
    gender: Literal["男", "女", "male", "female", ""] = ""
    """Gender of the person that the model is. Empty is unknown."""
    location: Annotated[str, FREE_TEXT] = ""
    """Place of that person, such as "四川 成都". Empty is unknown."""
    tags: Annotated[str, FREE_TEXT] = ""
    """Interests of that person, joined by ";". Empty is unknown."""
    persona_weight: PersonaWeight = "auto"
    """The persona's weight in a reply (a of Eq. 1), from 0, which leaves it without effect, to 1. auto is what the
    model predicts, or 1 if it predicts none."""
    say: Annotated[str | None, FREE_TEXT] = None
    """Answer this utterance and stop; here the word None is a text too. Without it there is a conversation on the
    terminal."""
    mlflow: str | None = None
    """MLflow tracking URI, for a checkpoint of MLflow's. By default MLFLOW_TRACKING_URI, or else runs/mlflow.db."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of the replies."""
    sampling: Sampling = field(default_factory=Sampling)
    """The replies."""


@dataclass(frozen=True, kw_only=True)
class VectorsConfig:
    """Trains character vectors on the training split of a prepared data set, for --init.character-vectors."""

    data: Annotated[RequiredText, Required("the URI of a prepared data set")] = ""
    """URI of a prepared data set."""
    output: Annotated[RequiredText, Required("the URI of the file to write")] = ""
    """URI of the file to write, in word2vec's text form."""
    size: Annotated[int, Gt(0)] = 200
    """Components of a vector. They must be as many as --model.embedding-size of the run that starts from them."""
    window: Annotated[int, Gt(0)] = 5
    """Characters on either side from which a character is predicted."""
    negative: Annotated[int, Gt(0)] = 5
    """Random characters from which each true one is told apart (negative sampling)."""
    epochs: Annotated[int, Gt(0)] = 5
    """Passes over the text."""
    skip_gram: bool = False
    """Predict the surrounding characters from the one in the middle (skip-gram). False predicts the one in the middle
    from the surrounding ones (CBOW)."""
    workers: Annotated[int, Gt(0)] = 1
    """Threads. With one, the same seed gives the same vectors."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seed of the vectors."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a model for others: a checkpoint without its optimizer state, or the paper code's weights in our form."""

    checkpoint: str | None = None
    """URI of a checkpoint, or of a run's folder, which stands for its best checkpoint. MLflow's models:/NAME/VERSION,
    models:/NAME@ALIAS and runs:/ID/checkpoint are taken too."""
    mlflow: str | None = None
    """MLflow tracking URI, for a checkpoint of MLflow's. By default MLFLOW_TRACKING_URI, or else runs/mlflow.db."""
    from_reference: str | None = None
    """URI of a state_dict of the paper's code (torch.save or .safetensors), instead of --checkpoint."""
    output: Annotated[RequiredText, Required("the URI of the folder to write")] = ""
    """URI of the folder to write."""
    preset: str = "arplus"
    """With --from-reference: the preset whose weights they are."""
    layers: Annotated[int, Gt(0)] | None = None
    """With --from-reference: layers applied, if they are shared and their number is not the preset's."""
    heads: Annotated[int, Gt(0)] | None = None
    """With --from-reference: attention heads, if their number is not the preset's."""
    memory_hops: Annotated[int, Gt(0)] | None = None
    """With --from-reference: hops of a layer-wise memory, if their number is not the preset's."""
    character_vocabulary: str | None = None
    """With --from-reference: URI of the character vocabulary of the weights, with one token and its count per line."""
    persona_vocabulary: str | None = None
    """With --from-reference: URI of the persona vocabulary of the weights, in the same form."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if (self.checkpoint is None) == (self.from_reference is None):
            yield "checkpoint", "give either this or --from-reference, and not both"
        if self.from_reference is not None:
            for name in ("character_vocabulary", "persona_vocabulary"):
                if getattr(self, name) is None:
                    yield name, "is required with --from-reference"
