"""What a process sets for a while, and what it waits for in a thread."""

import os
import threading
from contextlib import suppress

import pytest

from arplus.process import environment, in_thread


def test_variables_are_set_for_a_while_and_then_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERE", "before")
    monkeypatch.delenv("NEW", raising=False)
    with suppress(ZeroDivisionError), environment({"THERE": "now", "NEW": "now"}):
        assert (os.environ["THERE"], os.environ["NEW"]) == ("now", "now")
        raise ZeroDivisionError
    assert (os.environ["THERE"], os.environ.get("NEW")) == ("before", None)


def test_what_a_thread_gives_or_raises_is_its_callers() -> None:
    def late() -> None:
        raise TimeoutError("the work's own")

    assert in_thread(lambda: threading.current_thread() is not threading.main_thread(), 60)
    with pytest.raises(TimeoutError, match=r"^the work's own$"):
        in_thread(late, 60)
    with pytest.raises(TimeoutError, match=r"^no answer within 0\.1 s$"):
        in_thread(threading.Event().wait, 0.1)
