"""What is said of workers that fail: one line, the worker that was first, and what to do about a GPU's memory."""

from pathlib import Path

import pytest
import torch
from ray.exceptions import ActorDiedError

from arplus.errors import RunError
from arplus.runs import attempt
from arplus.training import failure

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of 22 GiB")
CLOSED = RuntimeError("[../third_party/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
PLACES = ["one/10.0.0.1 /logs/worker-a.err", "two/10.0.0.2 /logs/worker-b.err"]


def test_the_first_to_fail_is_named_and_not_who_waited_for_it() -> None:
    found = failure.describe({0: CLOSED, 1: ValueError("a\n  b")}, PLACES)
    assert found == {"reason": "ValueError: a b", "rank": "1", "node": "two/10.0.0.2", "log": "/logs/worker-b.err"}
    assert failure.describe({0: CLOSED}, [])["rank"] == "0", "better than nothing, and without a place"
    assert failure.sentence(failure.describe({}, [])) == "a worker: hangs, as Ray Train says in the log"
    assert failure.sentence(found) == "worker 1 on two/10.0.0.2: ValueError: a b (its log: /logs/worker-b.err)"


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, RuntimeError(f"{'x' * 500} {OUT_OF_MEMORY}")])
def test_the_flags_that_lower_a_gpus_memory_are_named(error: Exception) -> None:
    said = failure.reason(error)
    assert all(flag in said for flag in ("--gradient-accumulation-steps", "--zero-stage", "--batch-size"))
    assert "\n" not in said
    assert "--batch-size" not in failure.reason(ValueError("x"))


def test_a_reason_is_one_short_line_without_credentials() -> None:
    assert failure.reason(ValueError("s3://key:secret@bucket/x")) == "ValueError: s3://***@bucket/x"
    assert len(failure.reason(ValueError("x" * 10_000))) <= 400
    assert failure.reason(RunError("stopped")) == "stopped", "ours are sentences"
    assert failure.reason(ActorDiedError()) == "The actor died unexpectedly before finishing this task."


def test_tags_say_all_that_is_known() -> None:
    error = failure.WorkersFailedError("run x: …", {"reason": "ValueError: a", "rank": "1"})
    assert failure.tags(error) == {"failure.reason": "ValueError: a", "failure.rank": "1"}
    assert failure.in_words(error) == "worker 1: ValueError: a"
    assert failure.in_words(RunError("diverged")) == "diverged"
    assert failure.tags(RunError("diverged")) == {"failure.reason": "diverged"}


def test_a_failure_is_noted_beside_the_run_and_only_of_the_attempt_before(tmp_path: Path) -> None:
    run = str(tmp_path)
    job = attempt.take_over(run, "m")
    assert attempt.start(run, job, PLACES).workers == tuple(PLACES)
    failure.FailureNotes(run, job).after_exception(None, {1: OUT_OF_MEMORY})
    first = attempt.read(run)
    assert first is not None
    assert first.failed
    second = attempt.start(run, job)
    assert second.restarted_by_failure
    assert not second.failed, "what it ends of, if it does, is not known yet"
    assert second.failure["node"] == "two/10.0.0.2"
    assert not attempt.start(run, job).restarted_by_failure, "that one had another reason"
    other = attempt.take_over(run, "m")
    failure.FailureNotes(run, job).after_exception(None, {0: CLOSED})
    assert attempt.read(run) == other, "it is another job's run now"
