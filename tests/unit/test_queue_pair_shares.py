"""How much of the time the relay works for queue pairs that use it too much."""

from __future__ import annotations

from typing import Any, Final

import pytest

from dataplane.router import relay_wire
from dataplane.router.queue_pair_shares import (
    BURST,
    LEAST,
    WHOLE,
    QueuePairShares,
    QueuePairUse,
)
from dataplane.router.relay_wire import RelayKind
from tests.unit.remote_world import World
from tests.unit.test_verbs_remote import paired

ARENAS: Final = frozenset({7, 8})


class Model:
    """A relay that does for the arenas what the share leaves of what their process wants."""

    def __init__(self, limit: float) -> None:
        self.shares = QueuePairShares()
        self.limit = limit
        self.now = 100.0
        self.part = WHOLE
        self.used = 0.0

    def run(self, wants: float, seconds: int) -> list[float]:
        """What is used in each second."""
        found = []
        for _ in range(seconds):
            self.now += 1
            self.used = min(wants, self.part / WHOLE)
            use = QueuePairUse(self.limit, self.used, ARENAS)
            told = self.shares.divide({1: use}, 1.0, self.now)
            assert set(told) in (set(), set(ARENAS))
            self.part = told.get(7, self.part)
            found.append(self.used)
        return found


def test_within_the_limit() -> None:
    """Who keeps to the limit is not held back, and may use more for a while."""
    model = Model(0.5)
    model.run(0.5, 100)
    assert model.part == WHOLE
    model.run(0.1, 20)
    model.run(1.0, int(BURST * 0.9))
    assert model.part == WHOLE


@pytest.mark.parametrize("limit", [0.05, 0.25, 0.5])
def test_too_much(limit: float) -> None:
    """Who wants more gets the limit, not less; and all of it once less is wanted."""
    model = Model(limit)
    model.run(1.0, 20)
    assert sum(model.run(1.0, 50)) / 50 == pytest.approx(limit, rel=0.25)
    model.run(limit / 4, 60)
    assert model.part == WHOLE


def test_never_nothing() -> None:
    """Something is always done."""
    model = Model(0.0001)
    model.run(1.0, 100)
    assert model.part == LEAST


def test_gone() -> None:
    """An arena of which nothing is said any more is not held back, nor is one of another relay
    told twice.
    """
    model = Model(0.25)
    model.run(1.0, 20)
    part = model.part
    assert part < WHOLE
    model.shares.forget()
    assert model.shares.divide({1: QueuePairUse(0.25, 0.25, ARENAS)}, 1.0, model.now + 1) == {
        7: part,
        8: part,
    }
    one = QueuePairUse(0.25, 0.25, frozenset({7}))
    assert model.shares.divide({1: one}, 1.0, model.now + 2) == {8: WHOLE}
    assert model.shares.divide({}, 1.0, model.now + 3) == {7: WHOLE}


def test_relay_is_told() -> None:
    """A container whose queue pairs use the relay too much is held back there; connections of
    others, and its own, are not.
    """
    world = World(cards=(), tcp=range(9))
    told: list[relay_wire.RelayArena] = []
    world.connect_all()
    world.loop.run(1)
    world.quota = 0.5
    one, other = paired(world)
    use, relay = one.host.ruling.use, one.host.relay
    hear = relay.hear

    def listen(message: relay_wire.Message, descriptors: tuple[Any, ...]) -> None:
        if isinstance(message, relay_wire.RelayArena) and message.kind == RelayKind.SHARE:
            told.append(message)
        hear(message, descriptors)

    relay.hear = listen  # type: ignore[method-assign]
    assert one.grant is not None
    for second in range(1, 12):
        use.answered()
        use.counted(one.grant.arena, 0, {"cpu": second * 1_000_000_000})
        world.loop.run(1)
    assert {message.arena for message in told} == {one.grant.arena}
    assert told[-1].value < WHOLE // 2
    assert not one.broken
    assert not other.broken
