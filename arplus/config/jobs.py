"""The settings of every job but training, and the rules by which sessions become examples."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from arplus.config.placement import PlacementConfig, accelerator_problem
from arplus.config.settings import FREE_TEXT, INLINE, Required
from arplus.config.training import Device
from arplus.errors import UsageError

RESERVED_SPLITS = ("train", "valid", "test", "vocabulary", "rejects")
"""Names of folders in a prepared data set that no evaluation set can have."""
PersonaWeight = Literal["auto"] | Annotated[float, Ge(0), Le(1)]
DuplicateKey = Literal["exact_record", "dialogue_and_profiles", "dialogue"]
LARGEST_RULE = 1_000_000
"""Utterances, and characters of one: more is a slip of the hand, and at some point beyond what arrays can count."""


@dataclass(frozen=True, kw_only=True)
class ExampleRules:
    """How sessions become examples. ``jobs/prepare.py`` decides it; the data set and every checkpoint carry it."""

    max_utterance_characters: Annotated[int, Gt(0), Le(LARGEST_RULE)] = 15
    """Characters kept of an utterance, so of a response too; models trained on the data reply with at most as many."""
    max_context_utterances: Annotated[int, Gt(0), Le(LARGEST_RULE)] = 7
    """Utterances kept of a context: three turns of two and the question."""
    incomplete_personas: Literal["drop", "keep"] = "drop"
    """What to do with an example in which a speaker lacks gender or location."""

    @property
    def max_context_ids(self) -> int:
        """Ids of the longest context: every utterance is followed by [SEP]."""
        return self.max_context_utterances * (self.max_utterance_characters + 1)

    @property
    def max_response_ids(self) -> int:
        """Ids of the longest response, [BOS] and [EOS] included."""
        return self.max_utterance_characters + 2

    def differences(self, other: "ExampleRules") -> list[str]:
        """What differs in ``other``, a line for each rule: its name, the value here and the value there."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [f"{name} {mine}, not {theirs}" for name, mine, theirs in pairs if mine != theirs]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turns raw records into an encoded data set.

    Of a profile, the first 100 tags are kept, and 50 characters of a tag and of a place; what is cut off is counted.
    """

    input: Annotated[str, Required("the URI of a JSON-lines file or of a folder of them")] = ""
    """URI of a JSON-lines file of any name, or of a folder: its *.jsonl, *.json, *.ndjson and Spark's part-00000 are
    read, plain or with .gz, .zst, .bz2 or .xz, and its other files are listed as left out."""
    output: Annotated[str, Required("the URI of the data set to make")] = ""
    """URI of the data set to make."""
    evaluation_set: tuple[str, ...] = ()
    """NAME=URI of further records (repeatable), such as the official random and biased test files: encoded with the
    training vocabularies as a split NAME, complete; sessions of the input with the same dialogue are in no split."""
    duplicate_key: DuplicateKey = "dialogue_and_profiles"
    """What makes two records duplicates: the raw line; utterances, speakers and profiles; the utterances alone."""
    max_reject_share: Annotated[float, Ge(0), Le(1)] = 0.02
    """Stop, with nothing committed, when more than this share of the records is rejected."""
    valid: Annotated[float, Ge(0)] = 20_000
    """Validation sessions: a share below 1, or a number; at most 5 % of the dialogues (by their hash)."""
    test: Annotated[float, Ge(0)] = 20_000
    """Test sessions: a share below 1, or a number; at most 5 % of the dialogues (by their hash)."""
    rules: Annotated[ExampleRules, INLINE] = field(default_factory=ExampleRules)
    """What the data set, and every model trained on it, is made by."""
    min_character_count: Annotated[int, Gt(0)] = 5
    """Rarer characters of the training sessions become [UNK]."""
    min_persona_word_count: Annotated[int, Gt(0)] = 2
    """Rarer persona words of the training sessions become [UNK]."""
    max_characters: Annotated[int, Gt(0)] = 9_489
    """Most frequent characters kept, special tokens not counted."""
    max_persona_words: Annotated[int, Gt(0)] = 10_002
    """Most frequent persona words kept, the three keys included, special tokens not counted."""
    character_vocabulary: str | None = None
    """URI of a given character vocabulary (one token and its count a line) instead of one that is counted."""
    persona_vocabulary: str | None = None
    """URI of a given persona vocabulary instead of one that is counted."""

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

    output: Annotated[str, Required("the URI of the folder or file to write")] = ""
    """URI of a new folder of part files, or of one file that ends in .jsonl, .jsonl.gz or .jsonl.zst."""
    records: Annotated[int, Gt(0), Le(400_000_000)] = 10_000
    """Lines in all, duplicates and broken ones among them."""
    duplicates: Annotated[int, Ge(0)] = 0
    """Lines that repeat an earlier record: half of them exactly, the others with more white space."""
    broken: Annotated[int, Ge(0)] = 0
    """Lines that hold no valid record: truncated, of wrong types, not UTF-8, …"""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of everything; the same settings give the same bytes."""
    persona_answers: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the exchanges in which one asks for place, gender or hobby and the reply answers from the responder's
    profile. Near zero in the real data (0 of 179 replies); turned up, it makes the use of personas measurable."""
    chatterbot: bool = False
    """Append the Chinese part of chatterbot-corpus (real text, random personas) to the records."""
    part_records: Annotated[int, Gt(0)] = 100_000
    """Lines a part file, when the output is a folder."""

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
    """Divides the logits; 0 takes the likeliest character each time (greedy)."""
    top_p: Annotated[float, Ge(0), Le(1)] = 0.9
    """Nucleus: the likeliest characters up to this probability, the first past it included; 0 keeps all."""
    top_k: Annotated[int, Ge(0)] = 0
    """Keep at most this many characters, before the nucleus is taken; 0 keeps all."""
    max_characters: Annotated[int, Gt(0)] | None = None
    """Longest reply; by default as long as an utterance of the data on which the model was trained."""
    min_characters: Annotated[int, Ge(0)] = 1
    """Shortest reply: until then no special token, which would end it, can be drawn."""

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
    """Computes the metrics of a checkpoint on splits of a prepared data set, and compares it with another one's."""

    checkpoint: Annotated[str, CHECKPOINT] = ""
    """URI of a checkpoint, or of a run's folder, which stands for its best one; or MLflow's models:/NAME/VERSION,
    models:/NAME@ALIAS or runs:/ID/checkpoint."""
    data: Annotated[str, Required("the URI of a prepared data set")] = ""
    """URI of a prepared data set with the checkpoint's vocabularies."""
    split: tuple[str, ...] = ()
    """Split of the data set (repeatable); by default test and all evaluation sets."""
    against: str | None = None
    """URI of another checkpoint, run or model of the same vocabularies: both are evaluated, and a paired bootstrap
    tells which differences are more than noise."""
    json: str | None = None
    """URI of a JSON file to write the metrics to."""
    replies: str | None = None
    """URI of a .csv or .jsonl file to write every reply to, with its context, persona, reference, and loss in nats per
    target. With --against also NAME.sheet.csv (or .jsonl), pairs of replies in random order for people to rate, and
    NAME.key.csv, which says whose they are."""
    device: Device = "auto"
    """auto takes GPUs where the cluster has any alive, else CPUs; gpu takes at least one and waits until the cluster
    has started it; cpu takes none."""
    placement: Annotated[PlacementConfig, INLINE] = field(default_factory=PlacementConfig)
    """The GPUs and nodes that workers may have."""
    persona_weight: PersonaWeight = "auto"
    """a of Eq. 1, from 0 (the persona that a reply is given has no effect) to 1, whatever the model was trained with;
    auto is what the model predicts, or 1."""
    batch_size: Annotated[int, Gt(0)] | None = None
    """Examples that a worker takes at a time, which does not change the metrics; by default 512 on a GPU, 64 on a CPU.
    """
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of the replies."""
    mlflow: str | None = None
    """MLflow tracking URI; by default that of the training run, whose MLflow run takes the metrics."""
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
    """A conversation with a checkpoint under a chosen persona; with --say one reply."""

    checkpoint: Annotated[str, CHECKPOINT] = ""
    """URI of a checkpoint, or of a run's folder, which stands for its best one; or MLflow's models:/NAME/VERSION,
    models:/NAME@ALIAS or runs:/ID/checkpoint."""
    gender: Literal["男", "女", "male", "female", ""] = ""
    """Gender of the model's persona; empty is unknown."""
    location: Annotated[str, FREE_TEXT] = ""
    """Place of the model's persona, as in "四川 成都"; empty is unknown."""
    tags: Annotated[str, FREE_TEXT] = ""
    """Interests of the model's persona, joined by ";"."""
    persona_weight: PersonaWeight = "auto"
    """a of Eq. 1, from 0 (the persona has no effect) to 1; auto is what the model predicts, or 1."""
    say: Annotated[str | None, FREE_TEXT] = None
    """Answer this utterance and stop, be it the word None; without it, a conversation on the terminal."""
    mlflow: str | None = None
    """MLflow tracking URI for a checkpoint of MLflow's; by default MLFLOW_TRACKING_URI, or runs/mlflow.db."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of the replies."""
    sampling: Sampling = field(default_factory=Sampling)
    """The replies."""


@dataclass(frozen=True, kw_only=True)
class VectorsConfig:
    """Trains character vectors on the training split of a prepared data set, for --init.character-vectors."""

    data: Annotated[str, Required("the URI of a prepared data set")] = ""
    """URI of a prepared data set."""
    output: Annotated[str, Required("the URI of the file to write")] = ""
    """URI of the file to write, in word2vec's text form."""
    size: Annotated[int, Gt(0)] = 200
    """Components of a vector: --model.embedding-size of the run that starts from them."""
    window: Annotated[int, Gt(0)] = 5
    """Characters on either side that a character is predicted from."""
    negative: Annotated[int, Gt(0)] = 5
    """Random characters that each one is told from."""
    epochs: Annotated[int, Gt(0)] = 5
    """Passes over the text."""
    skip_gram: bool = False
    """Predict the characters around from the one between, instead of the other way round (CBOW)."""
    workers: Annotated[int, Gt(0)] = 1
    """Threads. With one, the same seed gives the same vectors."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seed of the vectors."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a model for others: a checkpoint without its optimizer state, or the paper code's weights in our form."""

    checkpoint: str | None = None
    """URI of a checkpoint, or of a run's folder, which stands for its best one; or MLflow's models:/NAME/VERSION,
    models:/NAME@ALIAS or runs:/ID/checkpoint."""
    mlflow: str | None = None
    """MLflow tracking URI for a checkpoint of MLflow's; by default MLFLOW_TRACKING_URI, or runs/mlflow.db."""
    from_reference: str | None = None
    """URI of a state_dict of the paper's code (torch.save or .safetensors) instead."""
    output: Annotated[str, Required("the URI of the folder to write")] = ""
    """URI of the folder to write."""
    preset: str = "arplus"
    """With --from-reference: the row that the weights are of."""
    layers: Annotated[int, Gt(0)] | None = None
    """With --from-reference: layers applied, where they are shared and not the preset's number."""
    heads: Annotated[int, Gt(0)] | None = None
    """With --from-reference: attention heads, where not the preset's number."""
    memory_hops: Annotated[int, Gt(0)] | None = None
    """With --from-reference: hops of a layer-wise memory, where not the preset's number."""
    character_vocabulary: str | None = None
    """With --from-reference: URI of the characters (one token and its count a line) that the weights were made for."""
    persona_vocabulary: str | None = None
    """With --from-reference: URI of the persona words that the weights were made for."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if (self.checkpoint is None) == (self.from_reference is None):
            yield "checkpoint", "or --from-reference is required, and only one of them"
        if self.from_reference is not None:
            for name in ("character_vocabulary", "persona_vocabulary"):
                if getattr(self, name) is None:
                    yield name, "is required with --from-reference"
