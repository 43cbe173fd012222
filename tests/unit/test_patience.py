"""Tests wait the longer the busier the machine is."""

from __future__ import annotations

import os
import time

import pytest

from testbed import patience as module
from testbed import process


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured yet, and the machine works fast."""
    monkeypatch.setattr(module, "_measured", (float("-inf"), 1.0))
    monkeypatch.setattr(module, "_work", lambda: 0.0)
    monkeypatch.setattr(module, "_runnable", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


def test_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a quiet machine a promised time is that time, and what must happen at all may take some
    times longer.
    """
    monkeypatch.setattr(os, "getloadavg", lambda: (0.3, 0.0, 0.0))
    assert module.within(2) == 2
    assert module.patience(2) == 2 * module.GENEROUS


def test_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With five programs for each core everything may take some times longer, but a hang still
    ends.
    """
    monkeypatch.setattr(os, "getloadavg", lambda: (10.0, 0.0, 0.0))
    assert module.within(2) > 10
    assert module.patience(2) > 10
    monkeypatch.setattr(module, "_measured", (float("-inf"), 1.0))
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    assert module.patience(2) == 2 * module.MOST


def test_busy_since_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that have just started count, although the average of the last minute is low."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.0, 0.0))
    monkeypatch.setattr(module, "_runnable", lambda: 10)
    assert module.within(2) > 10


def test_a_condition_that_becomes_true_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short wait survives a machine that stands still, and one that is never over ends."""
    now = iter(range(0, 10_000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(process, "patience", lambda seconds: 4 * seconds)
    late = iter([False, False, True])
    assert process.wait_until("it", lambda: next(late), 1, 0)
    with pytest.raises(TimeoutError, match="it: not within 80 s; last: False"):
        process.wait_until("it", lambda: False, 1, 0)
    with pytest.raises(TimeoutError, match="it: not within 420 s"):
        process.wait_until("it", lambda: False, 100, 0)


def test_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A promise holds as soon as it is true, and is broken by the first answer after its time."""
    now = iter(range(10_000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(process, "within", lambda seconds: 2 * seconds)
    answers = iter([False, False, False, True])
    assert process.promised("it", lambda: next(answers), 2, 0)
    answers = iter([False, False, False, False, False, True])
    with pytest.raises(TimeoutError, match=r"it: not after 5\.0 s; last: False"):
        process.promised("it", lambda: next(answers), 2, 0)


def test_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is slow without any load is seen by what work takes."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(module, "_work", lambda: 8 * module._REFERENCE)
    assert module.within(2) == pytest.approx(16)
