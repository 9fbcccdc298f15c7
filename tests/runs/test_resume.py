"""Where a run goes on, and with which settings it may."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.prepared import CHARACTERS, PERSONA_WORDS, write_dataset

from arplus import storage
from arplus.config import PAPER_ROWS, ExampleRules, TrainConfig, preset, tiny
from arplus.errors import RefusedError, ResourceError, UsageError
from arplus.model.cost import component_of
from arplus.model.network import PersonaTransformer
from arplus.runs import attempt, checkpoint
from arplus.runs.checkpoint import TrainProgress, TrainState
from arplus.runs.folder import RunFolder
from arplus.runs.resume import ResumePoint, find_resume_point
from arplus.training.start import load


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), {"train": [[40]], "valid": [[5]]})


@pytest.fixture
def config(data, tmp_path) -> TrainConfig:
    """Of 40 steps."""
    run = replace(tiny(preset("arplus")), data=data.uri, storage=str(tmp_path / "runs"), run_name="first")
    return replace(run, epochs=20)


def run_uri(config: TrainConfig) -> str:
    return storage.join(config.storage, config.run_name)


def save(config: TrainConfig, step: int, number: int = 1, **changes) -> str:
    """A checkpoint of a run with ``config``, as a job leaves it."""
    state = TrainState(
        config=config,
        progress=TrainProgress(fingerprint="test", step=step),
        schedule={"lr": 0.1},
        rules=ExampleRules(),
        characters=CHARACTERS,
        persona_words=PERSONA_WORDS,
        weights={"a": torch.tensor([float(step)])},
        moments={"exp_avg.a": torch.tensor([1.0])},
        mlflow_run_id=f"mlflow-{config.run_name}",
    )
    RunFolder(run_uri(config)).config.write(config)
    return checkpoint.save(run_uri(config), replace(state, **changes), attempt=number)


def start(config, data) -> ResumePoint:
    return find_resume_point(config, RunFolder(run_uri(config)), data)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_name_starts_at_the_beginning(config, data, resume):
    assert start(replace(config, resume=resume), data) == ResumePoint(None, None)


# --------------------------------------------------------------------------------------------------------------- auto


def test_auto_goes_on_and_says_so_in_one_line(config, data, caplog):
    caplog.set_level(logging.INFO)
    save(config, 10)
    newest = save(config, 20)
    assert start(config, data) == ResumePoint(newest, "mlflow-first")
    assert caplog.messages == ["going on with run first from step 20"]


def test_newer_attempts_come_before_higher_steps(config, data):
    save(config, 30, number=2)
    rewound = save(config, 20, number=10)
    assert start(config, data).checkpoint == rewound


def test_what_must_not_differ_is_listed_with_both_values(config, data):
    save(config, 20)
    other = replace(config, seed=3, optimizer=replace(config.optimizer, lr=0.5), preset="mine", workers=2)
    with pytest.raises(UsageError) as caught:
        start(other, data)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"{run_uri(config)}: this run has other settings (seed: 0 there, 3 here; preset: 'arplus' there, 'mine' here; "
        "optimizer.lr: 0.002 there, 0.5 here); take another --run-name"
    )


def test_what_may_differ_does_not_matter(config, data, tmp_path):
    newest = save(config, 20)
    other = replace(
        config,
        workers=4,
        cpus_per_worker=0.2,
        zero_stage=3,
        gradient_accumulation_steps=2,
        epochs=9,
        max_steps=99,
        mlflow="sqlite:///elsewhere.db",
        audit=True,
        log_every=1,
        checkpoint_every=5,
        checkpoint_minutes=None,
        keep_checkpoints=9,
        max_failures=0,
        data=write_dataset(tmp_path / "copy", {"train": [[40]], "valid": [[5]]}).uri,
    )
    assert start(other, data).checkpoint == newest


def test_other_data_is_refused_by_name(config, data, tmp_path):
    save(config, 20)
    other = write_dataset(tmp_path / "other", {"train": [[40]], "valid": [[5]]}, fingerprint="another")
    with pytest.raises(UsageError, match=r"fingerprint test, and .* has another; take another --run-name"):
        start(replace(config, data=other.uri), other)


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_truncated_checkpoint_is_passed_over_and_that_is_said(config, data, caplog, file):
    before, newest = save(config, 10), save(config, 20)
    path = Path(newest, file)
    path.write_bytes(path.read_bytes()[:-3])
    assert start(config, data).checkpoint == before
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith(f"this checkpoint is skipped, and the one before it is taken: {newest}/{file}: ")


def test_damage_alone_is_not_a_new_run(config, data):
    Path(save(config, 10), "state.json").write_text("{")
    with pytest.raises(UsageError, match=r"no checkpoint can be read \(.*/state.json: does not match its manifest"):
        start(config, data)


@pytest.mark.parametrize("error", [ResourceError("no answer"), RefusedError("asked too often")])
def test_storage_that_is_away_is_not_damage(config, data, monkeypatch, error):
    save(config, 10), save(config, 20)

    def away(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint, "load", away)
    with pytest.raises(type(error)):
        start(config, data)


def test_a_run_without_checkpoint_starts_again_in_its_mlflow_run(config, data):
    RunFolder(run_uri(config)).config.write(config)
    attempt.take_over(run_uri(config), "abc")
    assert start(config, data) == ResumePoint(None, "abc")
    assert start(replace(config, seed=1), data) == ResumePoint(None, None), "its parameters would be wrong there"


# -------------------------------------------------------------------------------------------------------------- never


def test_never_refuses_an_existing_name(config, data):
    save(config, 20)
    with pytest.raises(UsageError, match=r"--resume never: .*/runs/first exists; take another --run-name"):
        start(replace(config, resume="never"), data)


def test_never_refuses_a_run_that_has_only_begun(config, data):
    storage.write_json(storage.join(run_uri(config), "config.json"), {})
    with pytest.raises(UsageError, match="--resume never"):
        start(replace(config, resume="never"), data)


# ---------------------------------------------------------------------------------------------------------------- URI


def test_a_uri_starts_a_new_run_from_that_checkpoint(config, data):
    chosen = save(config, 10)
    save(config, 20)
    assert start(replace(config, run_name="second", resume=chosen, experiment="other"), data) == ResumePoint(
        chosen, None
    )


def test_a_runs_folder_stands_for_its_newest_checkpoint(config, data):
    best = save(config, 10)
    checkpoint.mark_best(run_uri(config), best, 5.0)
    newest = save(config, 20)
    assert start(replace(config, run_name="second", resume=run_uri(config)), data).checkpoint == newest


def test_a_run_can_be_rewound(config, data):
    chosen = save(config, 10)
    save(config, 20)
    assert start(replace(config, resume=chosen), data) == ResumePoint(chosen, "mlflow-first")


def test_a_uri_does_not_overwrite_another_run(config, data):
    chosen, second = save(config, 10), replace(config, run_name="second")
    save(second, 5)
    with pytest.raises(UsageError, match=r"second exists and is another run; take another --run-name"):
        start(replace(second, resume=chosen), data)


def test_the_same_command_goes_on_with_the_run_that_it_began(config, data):
    first = save(config, 20)
    second = replace(config, run_name="second", resume=first)
    RunFolder(run_uri(second)).config.write(second)
    assert start(second, data).checkpoint == first, "it had not come to a checkpoint of its own"
    own = save(second, 30)
    assert start(second, data) == ResumePoint(own, "mlflow-second")


def test_a_run_is_rewound_by_any_name_of_its_folder(config, data, caplog):
    caplog.set_level(logging.INFO)
    first = save(config, 10)
    save(config, 20)
    assert start(replace(config, resume=f"file://{first}"), data).mlflow_run_id == "mlflow-first"
    assert "--resume auto goes on" in caplog.messages[-1]


def test_a_run_does_not_go_on_without_its_optimizer(config, data):
    save(config, 10, moments={})
    with pytest.raises(UsageError, match="holds weights alone; --init-from"):
        start(config, data)


def test_a_uri_is_compared_too(config, data):
    chosen = save(config, 10)
    with pytest.raises(UsageError, match="batch_size: 32 there, 16 here"):
        start(replace(config, run_name="second", resume=chosen, batch_size=16), data)


def test_another_run_that_has_all_steps_already_is_refused(config, data):
    """A run without a step would have no checkpoint of its own."""
    chosen = save(replace(config, max_steps=10), 10)
    second = replace(config, run_name="second", resume=chosen)
    with pytest.raises(UsageError, match=r"is of step 10, .* has 10 steps: raise --epochs or --max-steps"):
        start(replace(second, max_steps=10), data)
    assert start(replace(second, max_steps=11), data).checkpoint == chosen


def test_weights_alone_are_not_a_state(config, data):
    chosen = save(config, 10, moments={})
    with pytest.raises(UsageError, match="holds weights alone; --init-from"):
        start(replace(config, run_name="second", resume=chosen), data)


@pytest.mark.parametrize("resume", ["nevr", "runs/there-is-none"])
def test_what_is_no_checkpoint_is_refused(config, data, tmp_path, resume):
    with pytest.raises(UsageError, match=r"must be auto, never, or the URI of a checkpoint or of a run's folder"):
        start(replace(config, resume=str(tmp_path / resume)), data)


def test_two_sources_of_weights_are_refused(config, data):
    chosen = save(config, 10)
    with pytest.raises(UsageError, match="--init-from: contradicts --resume"):
        start(replace(config, run_name="second", resume=chosen, init_from=chosen), data)


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", PAPER_ROWS)
def test_every_model_starts_from_what_it_left(config, data, name):
    """AR's generator is its table of characters, which a checkpoint holds once."""
    one = replace(tiny(preset(name)), data=data.uri, storage=config.storage, run_name=name)
    left = PersonaTransformer(one.model, data.sizes).weights()
    uri = save(one, 3, weights={key: value + 1 for key, value in left.items()})
    _, model, state = load(one, uri)
    assert state is not None
    assert state.progress.step == 3
    for key, value in model.weights().items():
        torch.testing.assert_close(value, left[key] + 1)


@pytest.mark.parametrize(
    ("added", "components"),
    [
        ({"adapter": 4}, {"adapters"}),
        ({"persona_weight": "predicted"}, {"predictor"}),
        ({"adapter": 4, "persona_weight": "predicted"}, {"adapters", "predictor"}),
    ],
)
def test_a_run_starts_from_weights_without_its_new_parts_and_says_so(config, data, caplog, added, components):
    caplog.set_level(logging.INFO)
    left = {key: value + 1 for key, value in PersonaTransformer(config.model, data.sizes).weights().items()}
    second = replace(config, model=replace(config.model, **added), init_from=save(config, 3, weights=left))
    _, model, state = load(second, None)
    assert state is None
    found = model.weights()
    assert all(found.pop(key).equal(value) for key, value in left.items())
    assert set(map(component_of, found)) == components
    assert f"has no {', '.join(found)}, which start afresh" in caplog.messages[-1]
    _, again, _ = load(second, None)
    assert all(again.weights()[key].equal(value) for key, value in found.items()), "the same on every worker"


@pytest.mark.parametrize(
    ("dropped", "kept", "named"),
    [("layers.0.r", None, "layers.0.r"), (None, "more", "more"), (None, "layers.0.attention_adapter.more", "more")],
)
def test_weights_that_lack_or_have_anything_else_are_refused(config, data, dropped, kept, named):
    left = PersonaTransformer(config.model, data.sizes).weights()
    left = {key: value for key, value in left.items() if key != dropped} | ({kept: torch.ones(1)} if kept else {})
    uri = save(config, 3, weights=left)
    with pytest.raises(UsageError, match=f"--init-from .*weights of another model.*{named}"):
        load(replace(config, model=replace(config.model, adapter=4), init_from=uri), None)


def test_weights_with_adapters_are_another_model_than_one_without(config, data):
    left = PersonaTransformer(replace(config.model, adapter=4), data.sizes).weights()
    with pytest.raises(UsageError, match=r"--init-from .*adapter"):
        load(replace(config, init_from=save(config, 3, weights=left)), None)
