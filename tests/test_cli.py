"""Command lines: what sets what, and what is refused in which words."""

import json
import re
import sys
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import docstring_parser
import pytest

from arplus import cli
from arplus.benchmark import options
from arplus.config import (
    PRESETS,
    ChatConfig,
    EvaluateConfig,
    OptimizerConfig,
    PrepareConfig,
    SynthesizeConfig,
    TrainConfig,
    dotted_names,
    flag,
    preset,
    tiny,
    to_dict,
)
from arplus.errors import UsageError

REPOSITORY = Path(__file__).parents[1]
ENDINGS = ("Config", "Benchmark", "Rules", "Sampling", "Output", "Command")
"""Of the names of classes whose fields are flags."""


def train(*arguments: str) -> TrainConfig:
    return cli.train_command(arguments, prog="jobs/train.py").config


def parse(default: Any, *arguments: str) -> Any:
    return cli.parse(default, arguments, prog="job", description=None)


def message_of(*arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        train(*arguments)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    """Writes values to a JSON file and gives its path."""

    def write(values: Any) -> str:
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(values))
        return str(path)

    return write


# ------------------------------------------------------------------------------------------------------------- parse


def test_without_flags_the_default_stays() -> None:
    default = SynthesizeConfig(output="somewhere", records=77)
    assert parse(default) == default


def test_flags_override_the_default_in_both_spellings() -> None:
    default = SynthesizeConfig(output="somewhere", records=77)
    config = parse(default, "--part-records", "5", "--persona_answers=0.5", "--chatterbot", "True")
    assert config == SynthesizeConfig(
        output="somewhere", records=77, part_records=5, persona_answers=0.5, chatterbot=True
    )


@pytest.mark.parametrize(
    ("arguments", "audit", "rezero"),
    [
        (["--audit"], True, True),
        (["--audit", "--epochs", "2"], True, True),
        (["--epochs", "2", "--model.rezero", "False", "--audit"], True, False),
        (["--audit", "--model.rezero=False"], True, False),
        (["--audit", "True", "--model.rezero", "False"], True, False),
        (["--audit", "False", "--model.rezero"], False, True),
        (["--run-name", "audit"], False, True),
    ],
)
def test_a_bools_flag_may_stand_alone(arguments: list[str], audit: bool, rezero: bool) -> None:
    config = train("arplus", *arguments)
    assert (config.audit, config.model.rezero) == (audit, rezero)


def test_a_bools_flag_takes_no_other_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train("arplus", "--audit", "yes")
    assert caught.value.code == 2
    assert "audit" in capsys.readouterr().err


def test_an_unknown_flag_is_named_with_the_nearest_one() -> None:
    with pytest.raises(
        UsageError, match=r"^unknown flag '--record'; did you mean --records\? \(--help lists all flags\)$"
    ):
        parse(SynthesizeConfig(output="o"), "--record", "3")


@pytest.mark.parametrize("word", ["stray", "-x", "--Records", "--output.x=3", "--http://me:secret@host"])
def test_any_other_word_is_named_without_its_value(word: str) -> None:
    with pytest.raises(UsageError, match=r"^unknown (flag|argument) '[^=]*'") as caught:
        parse(SynthesizeConfig(output="o"), "--records", "3", word)
    assert "secret" not in str(caught.value)


def test_a_value_that_fails_a_check_names_the_flag() -> None:
    with pytest.raises(UsageError, match=r"^--records: must be greater than 0 \(got 0\)$"):
        parse(SynthesizeConfig(output="o"), "--records", "0")
    with pytest.raises(UsageError, match=r"^--output: is required"):
        parse(PrepareConfig(), "--input", "somewhere")


@pytest.mark.parametrize("said", ["None", "none", "null", "True", "", "你好", "=None", "--say=None"])
def test_an_utterance_is_always_text(said: str) -> None:
    default = ChatConfig(checkpoint="run")
    assert parse(default, f"--say={said}").say == said
    assert parse(default).say is None
    assert parse(default, "--tags=--say", "--say", "None").say == "None"
    if not said.startswith("--"):
        assert parse(default, "--seed", "1", "--say", said, "--tags", "None").say == said


def test_none_unsets_what_may_be_none_and_is_text_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    chat = parse(ChatConfig(checkpoint="run"), "--tags", "None", "--location", "None")
    assert (chat.tags, chat.location, chat.say) == ("None", "None", None)
    with pytest.raises(SystemExit):
        parse(ChatConfig(checkpoint="run"), "--gender", "None")
    set_before = EvaluateConfig(checkpoint="a", data="b", against="c", json="d", mlflow="http://e")
    unset = parse(set_before, "--against", "None", "--json", "None", "--mlflow=None")
    assert unset == EvaluateConfig(checkpoint="a", data="b")
    assert train("ar", "--run-name", "None", "--experiment", "None", "--init-from", "None").run_name == "None"
    with pytest.raises(SystemExit):
        parse(ChatConfig(), "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "The word None unsets a setting that shows {None}." in shown


@pytest.mark.parametrize("arguments", [["--records", "many"], ["--records"], ["--records", "1.5"]])
def test_a_value_of_another_type_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(SynthesizeConfig(output="o"), *arguments)
    assert caught.value.code == 2
    assert arguments[0].lstrip("-") in capsys.readouterr().err


def test_help_shows_every_setting_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(SynthesizeConfig(), "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{flag(name)}" in text for name in dotted_names(SynthesizeConfig))


# ----------------------------------------------------------------------------------------------------- train_command


def test_a_preset_alone_is_that_preset() -> None:
    for name in PRESETS:
        command = cli.train_command([name], prog="jobs/train.py")
        assert (command.config, command.dry_run) == (preset(name), False)


def test_dry_run_is_a_switch_anywhere() -> None:
    command = cli.train_command(["ar", "--epochs", "2", "--dry-run", "--seed=1"], prog="jobs/train.py")
    assert command.dry_run
    assert (command.config.epochs, command.config.seed) == (2, 1)


def test_a_switch_takes_its_value_too() -> None:
    def command(*arguments: str) -> cli.Command:
        return cli.train_command(["ar", *arguments, "--seed", "1"], prog="jobs/train.py")

    small = tiny(preset("ar")).model
    for arguments in (["--tiny"], ["--tiny", "True"], ["--tiny=True"]):
        assert command(*arguments).config.model == small
    assert command("--tiny", "False", "--dry-run=False") == command()
    with pytest.raises(SystemExit):
        command("--tiny=yes")


def test_later_ones_win_preset_tiny_file_flags(file: Any) -> None:
    settings = file({"batch_size": 16, "epochs": 7, "optimizer": {"lr": 0.5, "max_grad_norm": 3.0}})
    row, small = preset("ar"), tiny(preset("ar"))
    assert row.batch_size != small.batch_size != 16
    config = train("ar", "--tiny", "--epochs", "9", "--config", settings, "--optimizer.max-grad-norm", "4")
    assert config.seed == row.seed  # the preset's, said nowhere else
    assert config.optimizer.eps == row.optimizer.eps != OptimizerConfig().eps  # not that of a section's own default
    assert config.model == small.model  # from --tiny
    assert (config.batch_size, config.optimizer.lr) == (16, 0.5)  # the file against --tiny
    assert (config.epochs, config.optimizer.max_grad_norm) == (9, 4.0)  # the flag against the file
    assert train("ar", "--tiny", f"--config={settings}") == train("ar", "--config", settings, "--tiny")


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_runs_config_fed_back_is_the_same_run(name: str, file: Any) -> None:
    flags = ["--data", "数据", "--run-name", "一", "--max-steps", "3", "--optimizer.lr", "1e-5", "--model.dropout", "0"]
    first = train(name, "--tiny", *flags)
    written = file(to_dict(first))
    assert train("--config", written) == first
    assert train(name, "--config", written) == first
    assert train("--config", written, "--max-steps", "None").max_steps is None


def test_a_file_need_only_fit_the_preset_it_changes(file: Any) -> None:
    # Neither file would pass with the defaults of AR+ at full size.
    assert train("ar", "--config", file({"model": {"tied_head": True}})) == preset("ar")
    assert train("ar", "--tiny", "--config", file({"model": {"d_model": 100, "embedding_size": 100}})).model.heads == 4


def test_a_file_of_another_preset_is_refused(file: Any) -> None:
    path = file({"preset": "ar"})
    assert message_of("arplus", "--config", path).startswith(f"{path}: is of preset 'ar', not 'arplus'")
    assert train("--config", path) == preset("ar")


def test_the_preset_cannot_be_renamed() -> None:
    assert "--preset: " in message_of("ar", "--preset", "arplus")


def test_a_job_of_one_preset_takes_none(file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def only(*arguments: str) -> TrainConfig:
        return cli.preset_command(arguments, lambda run: run, prog="job", description="Does it.", only="arplus").config

    assert only("--tiny", "--epochs", "2") == replace(tiny(preset("arplus")), epochs=2)
    for arguments, message in {
        ("arplus",): "job takes no preset; leave 'arplus' out",
        ("--config", file({"preset": "ar"})): "is of preset 'ar', not 'arplus'; job takes no other",
        ("--preset", "ar"): "--preset: only names what the defaults are; leave it out",
    }.items():
        with pytest.raises(UsageError) as caught:
            only(*arguments)
        assert message in str(caught.value)
    with pytest.raises(SystemExit):
        only("--help")
    assert "PRESET" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--epochs", "1"], ["--tiny"]])
def test_a_preset_is_required(arguments: list[str]) -> None:
    message = message_of(*arguments)
    assert message.startswith("a preset is required: jobs/train.py PRESET")
    assert message.endswith(", ".join(PRESETS))


def test_an_unknown_preset_lists_the_presets() -> None:
    assert ", ".join(PRESETS) in message_of("gpt")


def test_help_flows_whatever_the_lines_of_the_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        train("--help")
    assert "MIN:MAX is as many as the cluster has room" in capsys.readouterr().out


def test_help_needs_no_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("no-factor-ff", "--tiny", "--config", "--dry-run", "--optimizer.lr"))


def test_help_of_train_begins_with_what_is_changed_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train("--help")
    found = re.findall(r"^[│ ] (--[a-z0-9.-]+)", capsys.readouterr().out, re.MULTILINE)
    switches = ["--tiny", "--config", "--dry-run"]
    first = ["--data", "--run-name", "--storage", "--epochs", "--max-steps", "--batch-size", "--seed", "--workers"]
    assert found[:11] == switches + first
    sections = dict.fromkeys(name.partition(".")[0] for name in found if "." in name)
    assert list(sections) == [f"--{name}" for name in ("optimizer", "objective", "feed", "model", "init", "estimate")]


def test_every_setting_is_explained() -> None:
    modules = [module for name, module in sys.modules.items() if name.startswith(("arplus.config.", options.__name__))]
    found = {value for module in modules for value in vars(module).values() if is_dataclass(value)}
    kinds = [kind for kind in found if isinstance(kind, type) and kind.__doc__ and kind.__name__.endswith(ENDINGS)]
    assert len(kinds) > 20
    for kind in kinds:
        said = {p.arg_name for p in docstring_parser.parse_from_object(kind).params if p.description}
        assert set(kind.__annotations__) - said == set(), kind


def test_help_says_what_is_required_and_flows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(PrepareConfig(), "--help")
    shown = capsys.readouterr().out
    assert "an encoded data set. Of a profile" in shown
    assert "URI of the data set to make. (required)" in shown


def test_config_needs_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train("ar", "--config")
    assert caught.value.code == 2
    assert "Missing value for argument '--config'" in capsys.readouterr().err
    assert "is empty" in message_of("ar", "--config=")
    missing = str(tmp_path / "missing.json")
    assert message_of("ar", "--config", missing) == f"{missing}: no such file"


def test_config_must_be_a_json_object(tmp_path: Path, file: Any) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"epochs": ')
    assert message_of("ar", "--config", str(broken)).startswith(f"{broken}: not valid JSON")
    for values in ([1], 3, None, {"preset": [1]}, {"preset": None}):
        path = file(values)
        assert message_of("--config", path).startswith(f"{path}: must hold a JSON object")


def test_problems_of_a_file_name_the_file(file: Any) -> None:
    path = file({"optimizer": {"lrr": 1}})
    assert message_of("ar", "--config", path).startswith(f"{path}: unknown key 'optimizer.lrr'")
    path = file({"optimizer": {"lr": -1}})
    assert message_of("ar", "--config", path).startswith(f"{path}: --optimizer.lr: ")
    path = file({"workers": 65})
    assert message_of("ar", "--config", path).startswith(f"{path}: --batch-size: must be at least workers")


def test_tags_and_mlflows_names_are_taken_as_they_are() -> None:
    run = train("arplus", "--tag", "team=a", "--tag", "note=b=c", "--init-from", "models:/对话@best")
    assert (run.tag, run.init_from) == (("team=a", "note=b=c"), "models:/对话@best")
    for wrong in ("x", "=x", "x="):
        with pytest.raises(UsageError, match=rf"--tag: must be KEY=VALUE \(got '{wrong}'\)"):
            train("arplus", "--tag", wrong)
    with pytest.raises(UsageError, match=r"--tag: has a KEY that MLflow does not take: .* \(got 'team!'\)"):
        train("arplus", "--tag", "team!=a")
    with pytest.raises(UsageError, match=r"--register: .* must not be blank or hold / or :"):
        train("arplus", "--register", "a/1")


def test_an_unknown_flag_of_train_is_named_with_the_nearest_one() -> None:
    assert message_of("ar", "--opt.lr", "1").startswith("unknown flag '--opt.lr'; did you mean --optimizer.lr?")


def test_a_kind_of_gpu_is_named_as_ray_does() -> None:
    assert train("arplus", "--accelerator-type", "L4").placement.accelerator_type == "L4"
    assert "--accelerator-type: is not one of Ray's names of accelerators (got 'a100'; did you mean 'A100'?)" in (
        message_of("arplus", "--accelerator-type", "a100")
    )
    assert "did you mean 'H100'?" in message_of("arplus", "--accelerator-type", "NVIDIA H100")
