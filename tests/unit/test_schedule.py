"""The schedule of the sync loop, in virtual time."""

from __future__ import annotations

from pathlib import Path

import pytest

from driver.flood_list import REPAIR_EVERY
from driver.schedule import (
    COLLECT_EVERY,
    COLLECT_SOON,
    EAGER_FOR,
    ENGINE_EVERY,
    GAP,
    LABELS_EVERY,
    LABELS_RETRY,
    QUIET_AFTER,
    QUIET_INTERVAL,
    SANDBOX_RETRY,
    WRITE_BURST,
    WRITE_GAP,
    Due,
    Schedule,
)

INTERVAL = 0.5
BOX = Path("/box")


@pytest.fixture
def schedule() -> Schedule:
    """A schedule at time 0 that has read its endpoints, polled the engine and collected."""
    made = Schedule(0.0, INTERVAL)
    made.take_roster(0.0)
    due = take(made, 0.0)
    assert due.engine
    assert due.collection
    made.engine_polled(0.0, answered=True)
    made.collected(0.0)
    return made


def take(schedule: Schedule, now: float) -> Due:
    return schedule.take_due(now, [BOX], engine_answers=True)


def polls(schedule: Schedule, begin: float, end: float) -> list[float]:
    """When the network `n` is polled, if each poll is over at once and lists services when due."""
    times = []
    for step in range(round((end - begin) / 0.05)):
        now = begin + step * 0.05
        if "n" in take(schedule, now).networks:
            times.append(now)
            schedule.may_list("n", now)
            schedule.network_polled("n")
    return times


def test_a_changed_network_is_polled_every_interval(schedule: Schedule) -> None:
    """After a change a network is polled every interval, and more rarely once it is quiet."""
    schedule.add_network("n", 0.0)
    schedule.network_changed("n", 0.0)
    early = polls(schedule, 0.0, 10.0)
    assert len(early) == pytest.approx(10.0 / INTERVAL, abs=2)
    late = polls(schedule, QUIET_AFTER + 1, QUIET_AFTER + 11)
    assert len(late) == pytest.approx(10.0 / QUIET_INTERVAL, abs=1)


def test_after_a_join_a_network_is_polled_often(schedule: Schedule) -> None:
    """For some seconds after a Join its network is polled as often as is allowed."""
    schedule.add_network("n", 0.0)
    schedule.hint("n", 0.0, joined=True)
    assert len(polls(schedule, 0.0, EAGER_FOR)) == pytest.approx(EAGER_FOR / GAP, rel=0.4)


def test_a_network_is_polled_by_one_thread(schedule: Schedule) -> None:
    """A network whose poll isn't over is not due, however often it is hinted at."""
    schedule.add_network("n", 0.0)
    assert take(schedule, 0.0).networks == ("n",)
    for step in range(1, 100):
        schedule.hint("n", step * 0.1)
        assert take(schedule, step * 0.1).networks == ()
    schedule.network_polled("n")
    assert take(schedule, 10.0).networks == ("n",)


def test_hints_of_unknown_networks_are_ignored(schedule: Schedule) -> None:
    """A hint at a network without endpoints changes nothing."""
    before = schedule.next(1.0)
    schedule.hint("unknown", 1.0)
    assert schedule.next(1.0) == before


def test_writes_of_a_sandbox_are_limited(schedule: Schedule) -> None:
    """A sandbox that changes all the time is written in a burst, and then once per `WRITE_GAP`."""
    written = 0
    for step in range(100):
        schedule.dirty.add(BOX)
        written += BOX in take(schedule, step * 0.1).sandboxes
        schedule.sandbox_written(BOX)
    assert written == pytest.approx(WRITE_BURST + 10.0 / WRITE_GAP, abs=2)


def test_a_sandbox_is_written_by_one_thread(schedule: Schedule) -> None:
    """A sandbox that changes while it is written is written again afterwards."""
    schedule.dirty.add(BOX)
    assert take(schedule, 0.0).sandboxes == {BOX}
    schedule.dirty.add(BOX)
    assert take(schedule, 5.0).sandboxes == frozenset()
    schedule.sandbox_written(BOX)
    assert take(schedule, 5.0).sandboxes == {BOX}


def test_all_sandboxes_are_repaired(schedule: Schedule) -> None:
    """Each sandbox is written again after the repair interval, even if nothing has changed."""
    assert take(schedule, REPAIR_EVERY - 0.1).sandboxes == frozenset()
    assert take(schedule, REPAIR_EVERY).sandboxes == {BOX}


def test_the_engine_is_polled_soon_after_a_failure(schedule: Schedule) -> None:
    """The engine is polled rarely while it answers, and every interval while it doesn't."""
    assert not take(schedule, ENGINE_EVERY - 0.1).engine
    assert take(schedule, ENGINE_EVERY).engine
    assert not take(schedule, ENGINE_EVERY + 10).engine
    schedule.engine_polled(100.0, answered=False)
    assert take(schedule, 100.0 + INTERVAL).engine


def test_labels_are_read_while_there_are_networks(schedule: Schedule) -> None:
    """Labels are read regularly while a network has endpoints here, by one thread, and rarely
    without a leader."""
    assert not take(schedule, 0.0).labels
    schedule.add_network("n", 1.0)
    assert take(schedule, 1.0).labels
    assert not take(schedule, 100.0).labels
    schedule.labels_read(100.0)
    assert not take(schedule, 100.0 + LABELS_EVERY - 0.1).labels
    assert take(schedule, 100.0 + LABELS_EVERY).labels
    schedule.labels_read(200.0, leaderless=True)
    assert not take(schedule, 200.0 + LABELS_RETRY - 0.1).labels
    assert take(schedule, 200.0 + LABELS_RETRY).labels


def test_a_change_brings_the_collection_forward(schedule: Schedule) -> None:
    """After a wake-up the next collection is early, and never while the engine doesn't answer."""
    assert not take(schedule, COLLECT_EVERY - 1).collection
    schedule.wake()
    schedule.take_roster(1.0)
    assert not take(schedule, COLLECT_SOON - 0.1).collection
    assert not schedule.take_due(COLLECT_SOON, [], engine_answers=False).collection
    assert take(schedule, COLLECT_SOON).collection
    assert not take(schedule, COLLECT_SOON + 100).collection


def test_endpoints_are_read_after_a_wake_up(schedule: Schedule) -> None:
    """Endpoints are read at once after a wake-up, and otherwise every repair interval."""
    assert not schedule.roster_is_due(REPAIR_EVERY - 0.1)
    assert schedule.roster_is_due(REPAIR_EVERY)
    schedule.wake()
    assert schedule.roster_is_due(GAP)


def test_awaited_sandboxes_keep_the_loop_awake(schedule: Schedule) -> None:
    """While a sandbox is awaited, the loop runs again shortly."""
    assert schedule.next(1.0) > 1.0 + SANDBOX_RETRY
    schedule.awaited[BOX] = 30.0
    assert schedule.next(1.0) == 1.0 + SANDBOX_RETRY
