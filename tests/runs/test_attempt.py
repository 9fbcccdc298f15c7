"""A newer job takes a run over, and the older one hears of it."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from arplus.runs import attempt
from arplus.runs.attempt import StoppedError, SupersededError, Watch


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "run")


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
