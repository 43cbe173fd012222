"""The threads of the driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from driver.worker import OnDemandWorker, Worker
from testbed.patience import patience


def soon(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + patience(10)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_worker_repeats_its_step() -> None:
    """Steps follow each other until `stop`, and none comes after it."""
    steps: list[float] = []

    def step() -> float:
        steps.append(time.monotonic())
        return 0.01

    worker = Worker("test", step)
    worker.start()
    soon(lambda: len(steps) >= 3)
    worker.stop()
    count = len(steps)
    time.sleep(0.1)
    assert len(steps) == count


def test_a_worker_is_woken() -> None:
    """`wake` ends a long pause, also the one before the first step."""
    steps: list[int] = []

    def step() -> float:
        steps.append(1)
        return 3600.0

    worker = Worker("test", step)
    worker.start(after=3600.0)
    worker.wake()
    soon(lambda: len(steps) == 1)
    worker.wake()
    soon(lambda: len(steps) == 2)
    worker.stop()


def test_a_worker_outlives_its_step() -> None:
    """A step that raises is tried again."""
    steps: list[int] = []

    def step() -> float:
        steps.append(1)
        raise ZeroDivisionError

    worker = Worker("test", step, retry=0.01)
    worker.start()
    soon(lambda: len(steps) >= 3)
    worker.stop()


def test_a_worker_that_never_started_can_be_stopped() -> None:
    """`stop` without `start` does nothing."""
    Worker("test", lambda: 1.0).stop()


def test_work_on_demand_is_never_missed() -> None:
    """Work that is added while the thread is just ending is done, and the thread ends each time."""
    lock = threading.Lock()
    pending: list[int] = []
    done: list[int] = []

    def step() -> None:
        with lock:
            taken = list(pending)
            pending.clear()
        done.extend(taken)

    worker = OnDemandWorker("test", lock, lambda: bool(pending), step)
    for number in range(500):
        with lock:
            pending.append(number)
            worker.start()
    soon(lambda: len(done) == 500)
    assert done == list(range(500))
    assert worker.join(patience(10))
