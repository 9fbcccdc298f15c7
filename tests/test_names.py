"""Names that MLflow or a file system refuses are refused before a run, by the flag, as MLflow's own rules have it."""

import itertools

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_experiment_name, _validate_model_name, _validate_tag

from arplus import cli
from arplus.config import AblateConfig, LrFindConfig, TrainConfig, TuneConfig
from arplus.config.names import experiment_name_problem, model_name_problem, tag_problem
from arplus.errors import UsageError
from arplus.training.start import resolve

PARTS = ("", ".", "..", "/", ":", " ", "a", "é", "实验", "　", "%", "?", "#", "@", "'", '"', "\\", "..a", "-", "~", "*")
NAMES = ["".join(parts) for n in (1, 2, 3) for parts in itertools.product(PARTS, repeat=n)]


def command(kind, *arguments):
    """The settings that a job's command line makes."""
    only = "arplus" if kind is AblateConfig else None
    arguments = arguments if only else ("arplus", *arguments)
    widen = (lambda run: run) if kind is TrainConfig else (lambda run: kind(run=run))
    return cli.preset_command(arguments, widen, prog="job", description="Does it.", only=only).config


def refuses(validate, *arguments):
    try:
        validate(*arguments)
    except MlflowException:
        return True
    return False


def test_the_rules_are_those_of_mlflow():
    for name in filter(None, {*NAMES, "x" * 500, "x" * 501}):
        longest = len(name) > 250
        assert longest or bool(model_name_problem(name)) == refuses(_validate_model_name, name), name
        assert bool(experiment_name_problem(name)) == refuses(_validate_experiment_name, name), name
        if key := name.strip():
            assert bool(tag_problem(f"{key} = value")) == refuses(_validate_tag, key, "value"), name


@pytest.mark.parametrize("kind", [TuneConfig, AblateConfig])
@pytest.mark.parametrize("name", ["team/sweep", "sweep:1", " ", "..", "../up", ".", "/root", "a//b", "a/", "x" * 251])
def test_a_study_whose_model_mlflow_would_refuse_does_not_start(kind, name):
    with pytest.raises(UsageError, match=r"^--run-name: [^;]*$"):
        command(kind, "--run-name", name)


@pytest.mark.parametrize("kind", [TrainConfig, LrFindConfig])
@pytest.mark.parametrize(
    "name", ["..", "../up", ".", "/root", "a//b", "a/", "a/../b", "a\nb", "a\0", "x" * 251, "字" * 84, "\udcff"]
)
def test_a_run_whose_folder_cannot_be_does_not_start(kind, name):
    with pytest.raises(UsageError, match=r"^(--run-name: must [^;]*|.* is not UTF-8; .*)$"):
        command(kind, "--run-name", name)
    with pytest.raises(UsageError, match=r"^--run-name: must "):
        resolve(TrainConfig(data="data", run_name=name))


@pytest.mark.parametrize("name", ["first", "team/first", "a:b", "第一 次", "x" * 250, "字" * 83, "it's"])
def test_other_runs_do(name):
    assert command(TrainConfig, "--run-name", name).run_name == name


def test_an_experiment_that_mlflow_would_refuse_is_not_begun():
    for name in ("x" * 501, "a\tb", "\udcff"):
        with pytest.raises(UsageError, match=r"^(--experiment: must |.* is not UTF-8; )"):
            command(TrainConfig, "--experiment", name)
    assert command(TrainConfig, "--experiment", "团队/实验").experiment == "团队/实验"
    assert resolve(TrainConfig(data="data", experiment="")).experiment == "arplus"
