"""A newer job takes a run over, and the older one hears of it."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from arplus.errors import RunError, UsageError
from arplus.runs import attempt
from arplus.runs.attempt import StoppedError, SupersededError, Watch


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "run")


@pytest.fixture(params=["local", "s3"])
def any_run(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_server").uri(tmp_path.name)


def at_once(*calls):
    """What calls come to that are made at the same moment: results, or errors."""
    barrier = threading.Barrier(len(calls))

    def work(call):
        barrier.wait()
        try:
            return call()
        except RunError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(work, calls))


def wait_for(happened):
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_starts_are_counted_over_jobs(run):
    assert attempt.read(run) is None
    first = attempt.take_over(run, "m")
    assert [attempt.start(run, first).number for _ in range(2)] == [1, 2]
    second = attempt.take_over(run, "m")
    assert attempt.start(run, second).number == 3


def test_only_the_newest_start_may_write(run):
    job = attempt.take_over(run, "m")
    old = attempt.start(run, job)
    assert attempt.check(run, old) is False
    new = attempt.start(run, job)
    with pytest.raises(SupersededError, match="attempt 2 has replaced attempt 1"):
        attempt.check(run, old)
    assert attempt.check(run, new) is False


def test_a_job_that_was_replaced_cannot_take_the_run_back(run):
    old = attempt.take_over(run, "m")
    mine = attempt.start(run, old)
    attempt.take_over(run, "m")
    for call in (attempt.check, attempt.start, attempt.request_stop):
        with pytest.raises(SupersededError, match="another job has taken this run over"):
            call(run, mine)


def test_a_run_that_was_deleted_is_nobodys(run):
    mine = attempt.start(run, attempt.take_over(run, "m"))
    Path(run, "attempt.json").unlink()
    with pytest.raises(SupersededError):
        attempt.check(run, mine)


def test_the_word_to_stop_reaches_this_start_and_the_next(run):
    job = attempt.take_over(run, "m")
    mine = attempt.start(run, job)
    attempt.request_stop(run, job)
    assert attempt.check(run, mine) is True
    with pytest.raises(StoppedError):
        attempt.start(run, job)
    assert attempt.start(run, attempt.take_over(run, "m")).stop is False, "a new job begins afresh"


def test_starts_at_the_same_moment_are_all_counted(any_run):
    job = attempt.take_over(any_run, "m")
    found = at_once(*[lambda: attempt.start(any_run, job)] * 8)
    assert sorted(each.number for each in found) == list(range(1, 9))


@pytest.mark.parametrize("round", range(3))
def test_of_jobs_that_take_a_run_over_at_the_same_moment_one_has_it(any_run, round):
    """Also where the job before starts its workers meanwhile, which must not bring the run back to it."""
    old = attempt.take_over(any_run, "m")
    *jobs, start = at_once(*[lambda: attempt.take_over(any_run, "m")] * 3, lambda: attempt.start(any_run, old))
    owner = attempt.read(any_run)
    assert owner.owner in [job.owner for job in jobs]
    assert owner.number == (0 if isinstance(start, SupersededError) else 1)
    for job in jobs:
        if job.owner == owner.owner:
            assert attempt.start(any_run, job).number == owner.number + 1
        else:
            with pytest.raises(SupersededError):
                attempt.start(any_run, job)


@pytest.mark.parametrize("round", range(3))
def test_a_word_to_stop_is_not_lost_in_a_start_nor_a_start_in_it(any_run, round):
    job = attempt.take_over(any_run, "m")
    start, _ = at_once(lambda: attempt.start(any_run, job), lambda: attempt.request_stop(any_run, job))
    now = attempt.read(any_run)
    assert now.stop
    assert now.number == (0 if isinstance(start, StoppedError) else 1)


def test_what_another_version_wrote_is_refused_by_name(run):
    attempt.take_over(run, "m")
    path = Path(run, "attempt.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stop_": True}))
    with pytest.raises(UsageError, match=r"attempt.json: unknown key 'stop_' \(did you mean 'stop'\?\)"):
        attempt.read(run)
    path.write_text('["owner"]')
    with pytest.raises(UsageError, match=r"attempt.json: holds \['owner'\], not the names and values of Attempt"):
        attempt.read(run)


@pytest.mark.processes
def test_the_watch_sees_both(run):
    job = attempt.take_over(run, "m")
    watch = Watch(run, attempt.start(run, job))
    time.sleep(2 * attempt.WATCH_S)
    assert not watch.stop
    assert watch.error is None
    attempt.request_stop(run, job)
    wait_for(lambda: watch.stop)
    attempt.take_over(run, "m")
    wait_for(lambda: watch.error is not None)
    watch.close()


@pytest.mark.processes
def test_a_broken_file_does_not_end_the_watch(run):
    job = attempt.take_over(run, "m")
    watch = Watch(run, attempt.start(run, job))
    path = Path(run, "attempt.json")
    whole = path.read_text()
    path.write_text("{")
    time.sleep(2 * attempt.WATCH_S)
    assert watch.error is None
    path.write_text(json.dumps(json.loads(whole) | {"stop": True}))
    wait_for(lambda: watch.stop)
    watch.close()


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_acts_once_and_later(number):
    acted = threading.Event()
    before = handlers()
    with attempt.on_stop_signal(acted.set):
        assert not acted.wait(0.1)
        os.kill(os.getpid(), number)
        assert acted.wait(10)
        assert handlers() == before, "a second one ends the process"
    assert handlers() == before


def test_without_a_stop_signal_nothing_happens():
    acted = threading.Event()
    before = handlers()
    with attempt.on_stop_signal(acted.set):
        pass
    assert handlers() == before
    assert not acted.wait(0.2)


def test_only_the_main_thread_listens():
    before = handlers()

    def elsewhere():
        with attempt.on_stop_signal(lambda: None):
            assert handlers() == before

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
