"""What dies is remembered by those who outlive it, and said."""

from __future__ import annotations

import os
import threading

import pytest

from plugin.deaths import RECENT, ROUTER, THREAD, WORKER, Deaths
from plugin.status import PartStatus


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_nothing_has_died() -> None:
    """Without deaths the record is empty."""
    assert Deaths().all() == []


def test_what_another_process_noted() -> None:
    """Master and workers see each other's records, whenever the workers were forked."""
    deaths = Deaths()
    deaths.note(WORKER)
    child = os.fork()
    if child == 0:
        deaths.note(ROUTER)
        os._exit(0 if deaths.all()[0].deaths == 1 else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert [(each.part, each.deaths) for each in deaths.all()] == [(WORKER, 1), (ROUTER, 1)]


def test_count_and_age() -> None:
    """All deaths and those of the last ten minutes are counted, with the age of the last one."""
    clock = Clock()
    deaths = Deaths(clock)
    for _ in range(3):
        deaths.note(WORKER)
    clock.now += RECENT + 1
    for _ in range(2):
        deaths.note(WORKER)
    clock.now += 5
    assert deaths.all() == [PartStatus(WORKER, 5, 2, 5.0)]


def test_many() -> None:
    """The last times are kept, however many deaths there are."""
    clock = Clock()
    deaths = Deaths(clock)
    for _ in range(500):
        clock.now += 3
        deaths.note(ROUTER)
    (found,) = deaths.all()
    assert (found.deaths, found.ago) == (500, 0.0)
    assert found.recent >= 60


def test_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that ends by an exception is recorded by name, and still reported as before."""
    said: list[object] = []
    monkeypatch.setattr(threading, "excepthook", said.append)
    deaths = Deaths()
    deaths.watch_threads()

    def fail() -> None:
        raise RuntimeError

    thread = threading.Thread(target=fail, name="sync")
    thread.start()
    thread.join()
    assert [(each.part, each.name) for each in deaths.all()] == [(THREAD, "sync")]
    assert len(said) == 1
