"""Replies of a checkpoint: in a conversation, and to examples of a data set."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import torch

from arplus import kernels
from arplus.config import Sampling
from arplus.data.collate import BatchSpec, ExampleRng, Window
from arplus.data.dataset import Dataset
from arplus.data.examples import encode_sessions
from arplus.data.records import Reject, parse_line
from arplus.data.sampler import EpochSampler
from arplus.data.sessions import to_table
from arplus.errors import UsageError
from arplus.model.generate import generate
from arplus.model.network import PersonaTransformer
from arplus.runs.checkpoint import TrainState, build_model
from arplus.text import GENDERS


def raw_profile(gender: str, location: str, tags: str) -> dict[str, object]:
    """A profile in PersonalDialog's raw form: 男, 女, male, female or empty; "省 市"; tags joined by ``;``."""
    raw = {word: raw for raw, word in GENDERS.items()}
    return {"gender": raw.get(gender, gender), "loc": location, "tag": [tags]}


def ready_model(state: TrainState, device: torch.device) -> PersonaTransformer:
    """A checkpoint's model as replies and evaluation take it: on its device, with its operations, folded."""
    model = build_model(state).to(device)
    kernels.use(model, device)
    model.fold()
    return model


class Responder:
    """Answers utterances under a chosen persona, in the form in which the model was trained.

    Raises :class:`UsageError` for a shortest reply that is longer than the model's longest.
    """

    def __init__(
        self,
        state: TrainState,
        profile: dict[str, object],
        sampling: Sampling,
        seed: int,
        persona_weight: float | None = None,
    ) -> None:
        self.state = state
        self.model = ready_model(state, torch.device("cpu"))
        self.model.persona_weight = persona_weight
        self.profile = profile
        self.sampling = sampling.of(state.rules)
        self.rng = torch.Generator().manual_seed(seed)

    def reply(self, utterances: Sequence[str]) -> str:
        """The reply to a conversation whose last utterance is the other's; speakers alternate.

        Raises :class:`UsageError` where there is nothing to answer or the persona is malformed.
        """
        return self.answer([self.example(utterances, self.profile)], self.sampling, self.rng)[0]

    def answer(self, examples: Sequence[pa.Table], sampling: Sampling, random: torch.Generator) -> list[str]:
        """The replies to what :meth:`example` made."""
        window = Window(pa.concat_tables(examples), BatchSpec.of(self.state.config.model, self.state.sizes))
        batch = window.batch(np.arange(len(window)), ExampleRng(0, 0))
        replies = generate(self.model, batch, sampling, random).tolist()
        return [self.state.characters.decode(ids) for ids in replies]

    def example(self, utterances: Sequence[str], profile: dict[str, object]) -> pa.Table:
        """A conversation and who is to reply, as one encoded example; raises as :meth:`reply` does."""
        # Of a conversation that the persona began the other said nothing first: an example is a pair of turns, and in
        # training each context begins with the other's. The reply to come is a stand-in; generation does not read it.
        turns = [*([""] if len(utterances) % 2 == 0 else []), *utterances, "。"]
        record = {
            "dialog": [[text] for text in turns],
            "profile": [raw_profile("", "", ""), profile],
            "uid": [i % 2 for i in range(len(turns))],
        }
        try:
            line = orjson.dumps(record)
        except orjson.JSONEncodeError:  # a lone surrogate: Python's way of keeping a byte that is not text
            raise UsageError("--say, --gender, --location or --tags: is not UTF-8 text; type it in UTF-8") from None
        session = parse_line(line)
        if isinstance(session, Reject):
            raise UsageError(f"this cannot be answered: {session.reason}")
        sessions = to_table([session], np.zeros(1, np.int64), session.record_hash)
        # Whoever talks need not say who they are, whatever was done with such examples in training.
        rules = replace(self.state.rules, incomplete_personas="keep")
        examples = encode_sessions(sessions, self.state.characters, self.state.persona_words, rules).table
        if not len(examples):
            raise UsageError("--say: there is nothing to answer in it")
        return examples.slice(len(examples) - 1)


def sample_replies(state: TrainState, dataset: Dataset, n: int = 12) -> str:
    """Readable replies to the first ``n`` validation examples: context, persona, reference and reply of each."""
    spec = BatchSpec.of(state.config.model, state.sizes)
    sampler = EpochSampler(split=dataset.split("valid"), batch_size=n, window_batches=1, seed=0, shuffled=False)
    if not sampler.split.examples:
        return "no validation examples\n"
    table = sampler.read(0, 0, [*spec.columns, *({"target_words"} - set(spec.columns))])
    batch = Window(table, spec).batch(np.arange(len(table)), ExampleRng(0, 0))
    model = ready_model(state, torch.device("cpu"))
    replies = generate(model, batch, Sampling().of(state.rules), torch.Generator().manual_seed(0))
    blocks = []
    for example, reply in zip(table.to_pylist(), replies.tolist(), strict=True):
        texts = readable(state, example, reply)
        blocks.append("".join(f"{name:10} {text}\n" for name, text in texts.items()))
    return "\n".join(blocks)


def readable(state: TrainState, example: dict[str, Any], reply: Sequence[int]) -> dict[str, str]:
    """Context, persona, reference and reply of an encoded example as text; a context's utterances with / between."""
    decode = state.characters.decode
    context = "".join(state.characters.token(i) for i in example["context"])
    return {
        "context": context.removesuffix("[SEP]").replace("[SEP]", " / "),
        "persona": " ".join(state.persona_words.token(i) for i in example["target_words"]),
        "reference": decode(example["response"]),
        "reply": decode(reply),
    }
