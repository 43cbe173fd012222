"""When keys change: pure decisions about time."""

from __future__ import annotations

import pytest

from driver.key_rotation import GRACE, KEPT, KeyAge, KeyStep, step

DAY = 86400.0


@pytest.mark.parametrize("ready", [True, False])
def test_nothing_before_the_period_ends(ready: bool) -> None:
    """A key that is younger than the period stays."""
    assert step(KeyAge(0), DAY - 1, DAY, ready=ready) is KeyStep.NONE


def test_rotation_when_due() -> None:
    """A key that has been used for the period is replaced by the standby key."""
    assert step(KeyAge(0), DAY, DAY, ready=True) is KeyStep.ROTATE


def test_rotation_waits_for_peers() -> None:
    """It waits for peers that have not used the standby key, but not for ever."""
    assert step(KeyAge(0), DAY + GRACE - 1, DAY, ready=False) is KeyStep.NONE
    assert step(KeyAge(0), DAY + GRACE, DAY, ready=False) is KeyStep.ROTATE


def test_former_key_is_kept_for_a_while() -> None:
    """The former key is replaced after its time, never at once, and before the next rotation."""
    assert step(KeyAge(0, former=True), KEPT - 1, DAY, ready=True) is KeyStep.NONE
    assert step(KeyAge(0, former=True), KEPT, DAY, ready=True) is KeyStep.RENEW
    assert step(KeyAge(0, former=True), 2 * DAY, DAY, ready=True) is KeyStep.RENEW


def test_former_key_waits_for_peers() -> None:
    """It waits for peers that may still send to it, but not for ever."""
    assert step(KeyAge(0, former=True), KEPT + GRACE - 1, DAY, ready=False) is KeyStep.NONE
    assert step(KeyAge(0, former=True), KEPT + GRACE, DAY, ready=False) is KeyStep.RENEW


def test_short_period_leaves_time_for_both() -> None:
    """With the shortest period the former key is kept for half of it."""
    assert step(KeyAge(0, former=True), 29, 60, ready=True) is KeyStep.NONE
    assert step(KeyAge(0, former=True), 30, 60, ready=True) is KeyStep.RENEW
    assert step(KeyAge(0), 60 + 60, 60, ready=False) is KeyStep.ROTATE


def test_no_period() -> None:
    """With 0 keys never change."""
    for age in (KeyAge(0), KeyAge(0, former=True)):
        assert step(age, 10 * DAY, 0, ready=True) is KeyStep.NONE
