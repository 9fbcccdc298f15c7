"""The whole road at other rules than the paper's, and without validation: prepare, train, evaluate, reply."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.prepared import random_state

from arplus.config import (
    AblateConfig,
    EvaluateConfig,
    ExampleRules,
    PrepareConfig,
    Sampling,
    TrainConfig,
    TuneConfig,
    preset,
    tiny,
)
from arplus.data.dataset import Dataset
from arplus.errors import UsageError
from arplus.evaluation.evaluate import evaluate
from arplus.evaluation.replies import Responder, raw_profile
from arplus.prepare.pipeline import prepare
from arplus.runs import checkpoint
from arplus.runs.checkpoint import TrainState
from arplus.runs.folder import FinalMetrics
from arplus.study import ablate, tune
from arplus.training.trainer import train

CHARACTERS = [chr(0x4E00 + i) for i in range(200)]
PROFILE = {"tag": ["骑行;看书"], "loc": "四川 成都", "gender": "male"}


def records(n: int) -> str:
    """Sessions of two utterances of 40 characters each."""
    lines = []
    for i in range(n):
        said = ["".join(CHARACTERS[(7 * i + 3 * j + k * k) % 200] for k in range(40)) for j in range(2)]
        lines.append(json.dumps({"dialog": [[text] for text in said], "profile": [PROFILE] * 2, "uid": [0, 1]}))
    return "\n".join(lines)


@dataclass(frozen=True)
class Road:
    """A data set, and a run that was trained on it."""

    data: Dataset
    config: TrainConfig
    final: FinalMetrics
    warnings: list[str]

    @property
    def run(self) -> str:
        return f"{self.config.storage}/{self.config.run_name}"

    @property
    def state(self) -> TrainState:
        return checkpoint.load(self.run)


@pytest.fixture(scope="module")
def roads(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Road]:
    """At 30 characters with validation, and at 7 without."""
    folder = tmp_path_factory.mktemp("rules")
    (folder / "raw.jsonl").write_text(records(300))
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    found = {}
    for longest, utterances, valid in ((30, 3, 0.05), (7, 1, 0.0)):
        heard.clear()
        logging.getLogger("arplus").addHandler(handler)
        data = prepare_at(folder, longest, utterances, valid)
        config = replace(tiny(preset("arplus")), data=data.uri, storage=str(folder), run_name=f"at-{longest}")
        config = replace(config, batch_size=32, max_steps=3, log_every=1, checkpoint_every=1, keep_checkpoints=1)
        final = train(config)
        logging.getLogger("arplus").removeHandler(handler)
        found[longest] = Road(data, config, final, list(heard))
    return found


def prepare_at(folder: Path, longest: int, utterances: int, valid: float) -> Dataset:
    rules = ExampleRules(max_utterance_characters=longest, max_context_utterances=utterances)
    settings: dict[str, Any] = {"min_character_count": 1, "test": 0.05, "valid": valid}
    output = folder / f"data-{longest}"
    prepare(PrepareConfig(input=str(folder / "raw.jsonl"), output=str(output), rules=rules, **settings))
    return Dataset.open(str(output))


def test_data_and_checkpoint_carry_the_rules(roads: dict[int, Road]) -> None:
    expected = {
        30: ExampleRules(max_utterance_characters=30, max_context_utterances=3),
        7: ExampleRules(max_utterance_characters=7, max_context_utterances=1),
    }
    for longest, road in roads.items():
        assert road.data.rules == road.state.rules == expected[longest]


@pytest.mark.parametrize(("longest", "least"), [(30, 16), (7, 7)])
def test_replies_and_metrics_are_as_long_as_the_rules_say(roads: dict[int, Road], longest: int, least: int) -> None:
    road = roads[longest]
    sampling = Sampling(temperature=2.0, top_p=0, min_characters=least)
    responder = Responder(road.state, raw_profile("女", "四川 成都", "看书"), sampling, seed=0)
    lengths = [len(responder.reply(["".join(CHARACTERS[:20])])) for _ in range(8)]
    assert least <= max(lengths) <= longest
    assert max(lengths) > 15 or longest == 7

    asked = EvaluateConfig(checkpoint=road.run, data=road.data.uri, sampling=Sampling(min_characters=longest))
    standard = evaluate(asked)["splits"]["test"]["standard"]
    assert standard["mean_length"] == longest
    with pytest.raises(UsageError, match=rf"--sampling.min-characters: .* max_characters = {longest} \(got 99\)"):
        evaluate(replace(asked, sampling=Sampling(min_characters=99)))


def test_data_of_other_rules_is_refused(roads: dict[int, Road], tmp_path: Path) -> None:
    state = replace(roads[30].state, rules=ExampleRules(max_context_utterances=3, incomplete_personas="keep"))
    other = checkpoint.write(str(tmp_path / "other"), state)
    named = r"max_utterance_characters 15, not 30; incomplete_personas keep, not drop"
    with pytest.raises(UsageError, match=rf"--data .*: was prepared by other rules than the checkpoint .*{named}"):
        evaluate(EvaluateConfig(checkpoint=other, data=roads[30].data.uri))


def test_a_conversation_is_read_as_long_as_the_rules_say() -> None:
    """What is cut off, of an utterance or of a conversation, changes nothing; what is kept does."""

    def reply(rules: ExampleRules, *utterances: str) -> str:
        state = replace(random_state(), rules=rules)
        sampling = Sampling(temperature=2.0, top_p=0, min_characters=5)
        return Responder(state, raw_profile("男", "", ""), sampling, seed=1).reply(utterances)

    long, other = "".join(CHARACTERS[:28]), "".join(CHARACTERS[:20] + CHARACTERS[30:38])
    at_20, at_30 = (ExampleRules(max_utterance_characters=n, max_context_utterances=3) for n in (20, 30))
    assert reply(at_20, long) == reply(at_20, other)
    assert reply(at_30, long) != reply(at_30, other)
    told = ("一", "丁", "七", "万", "丈")
    assert reply(at_20, *told) == reply(at_20, "上", "下", *told[2:])
    assert reply(at_20, *told) != reply(at_20, *told[:2], "上", *told[3:])


def test_a_run_without_validation_ends_and_keeps_its_last_checkpoint(roads: dict[int, Road]) -> None:
    with_, without = roads[30], roads[7]
    assert with_.final.best_response_ppl > 1
    assert not any("validation" in line for line in with_.warnings)
    assert without.final.best_response_ppl is None
    assert without.final.valid == {}
    assert without.final.steps == without.state.progress.step == 3
    assert any("has no validation example" in line and "last one takes its place" in line for line in without.warnings)


def test_a_study_needs_validation(roads: dict[int, Road]) -> None:
    run = roads[7].config
    for config, begin in ((TuneConfig, tune.sweep), (TuneConfig, tune.plan), (AblateConfig, ablate.ablate)):
        settings: Any = config(run=replace(run, max_steps=None, run_name="study"))
        with pytest.raises(UsageError, match=r"has no example in the split valid, and .*; prepare .* --valid"):
            begin(settings)
