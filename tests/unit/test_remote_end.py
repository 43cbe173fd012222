"""The state machine of an end of a connection to another host: each event in each phase."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import pytest

from dataplane.router.reasons import Reason
from dataplane.router.remote_end import TABLE, Go, Ignored, Invalid, rule_for, step
from dataplane.router.remote_events import (
    FOLLOWER,
    LEADER,
    LIVE,
    Action,
    Do,
    Drop,
    EndState,
    Event,
    On,
    Phase,
    RefuseRequest,
    Tell,
)

COLUMNS: Final = {
    "new": Phase.NEW,
    "lpl": Phase.LEADER_PLACING,
    "off": Phase.OFFERED,
    "lpa": Phase.LEADER_PAIRING,
    "aba": Phase.ABANDONED,
    "fpl": Phase.FOLLOWER_PLACING,
    "fpa": Phase.FOLLOWER_PAIRING,
    "unc": Phase.UNCONFIRMED,
    "gra": Phase.GRANTED,
    "dro": Phase.DROPPING,
    "ove": Phase.OVER,
}

EXPECTED: Final = """
                    new lpl off lpa aba fpl fpa unc gra dro ove
LEAD                lpl  !   !   !   !   !   !   !   !   !   !
FOLLOW              fpl  !   !   !   !   !   !   !   !   !   !

PLACED               !  off  !   !   !  fpa  !   !   !   .   .
PLACE_FAILED         !  dro  !   !   !  dro  !   !   !   .   .
PAIRED               !   !   !  gra aba  !  fpa  !   !   .   .
PAIR_FAILED          !   !   !  dro dro  !  dro  !   !   .   .
ALL_RECEIVED         !   !  off lpa dro  !   !  gra gra  .   .
ALL_SENT             !   !   !   !   !   !   !  unc gra  .   .
PATH_BROKEN          !  lpl off lpa dro fpl fpa gra gra  .   .
PATH_LEFT            !   !   !   !  dro  !   !  dro dro  .   .
DROPPED              !   !   !   !   !   !   !   !   !  ove  .
RELAY_DIED           !  dro dro dro dro dro dro dro dro  .   .

ACCEPTED             !   !  off  .  aba  !   !   !  gra  .   .
CONFIRMED            !   !   !   !   !   !   !  gra  .   .   .
DECLINED             !   !   !   !   !  dro dro dro  .   .   .
WITHDRAWN            !  dro dro aba  .   !   !   !   .   .   .
PEER_DROPPED         !  dro dro dro dro dro dro dro dro  .   .
PEER_DROPPED/gone    !  dro dro dro dro dro dro dro dro  .   .
PEER_DROPPED/broken  !  dro dro dro dro dro dro dro dro  .   .

SESSION_UP           !   .   .   .   .   .   .  unc  .   .   .
SESSION_DOWN         !  dro dro  .   .  dro dro  .   .   .   .
SESSION_EXPIRED      !   .   .   .   .   .   .  dro  .   .   .
LINK_LOST            !  dro dro dro dro dro dro dro dro  .   .

SOCKET_OPEN          !   !  lpa  !   !   !  fpa  !   !   !   .
SOCKET_GONE          !   !  dro  !   !   !  dro  !   !   !   .
ACCEPT_SENT          !   !   !   !   !   !  unc  .   !   !   .
ACCEPT_UNSENT        !   !   !   !   !   !  dro  .   !   !   .
REQUEST_GONE         !  dro dro aba  !  dro dro  !   !   !   .
RELEASED             !   .   .   .   .   .   .  unc gra  .   .
LEAVE_PATH           !  dro dro aba  .  dro dro unc gra  .   .
STEP_TIMEOUT         !  dro dro aba  !  dro dro unc  !   !   .
"""
"""Event by phase, to the next phase, of an end that isn't closed. `.`: ignored. `!`: invalid."""

REASONS: Final = {"": Reason.LIMIT, "gone": Reason.NOT_FOUND, "broken": Reason.BROKEN}


def event_of(name: str) -> Event:
    kind, _, reason = name.partition("/")
    return Event(On[kind], peer_number=7, place=b"theirs", reason=REASONS[reason])


def cells() -> Iterator[tuple[str, Phase, str]]:
    """Event, phase, and what the table above says."""
    head, *rows = [line.split() for line in EXPECTED.strip().splitlines() if line]
    for name, *row in rows:
        assert len(row) == len(head)
        for column, cell in zip(head, row, strict=True):
            yield name, COLUMNS[column], cell


CELLS: Final = list(cells())


def states(phase: Phase) -> Iterator[EndState]:
    """All states that an end can be in, in a phase."""
    for closed, received, sent, leaving in itertools.product((False, True), repeat=4):
        if closed and received and sent and phase in LIVE:
            # It is dropped at that moment.
            continue
        yield EndState(
            phase, peer_number=7, closed=closed, received=received, sent=sent, leaving=leaving
        )


def every_step() -> Iterator[tuple[EndState, Event, EndState, tuple[Action, ...]]]:
    """Each event in each state: state, event, next state, actions."""
    for name, phase, _ in CELLS:
        for state in states(phase):
            event = event_of(name)
            yield state, event, *step(state, event)


def test_every_event_has_a_rule_in_every_phase() -> None:
    """Each pair of event and phase has a transition, or a reason why it has none."""
    assert set(TABLE) == set(On)
    for row in TABLE.values():
        assert set(row) == set(Phase)
    for event, phase in itertools.product(On, Phase):
        rule = rule_for(phase, event)
        assert isinstance(rule, Go) or callable(rule) or rule.why
    named = {name.partition("/")[0] for name, _, _ in CELLS}
    assert named == {event.name for event in On}


@pytest.mark.parametrize(("name", "phase", "cell"), CELLS)
def test_phases(name: str, phase: Phase, cell: str) -> None:
    """An event leads to the expected phase, or has no effect."""
    event = event_of(name)
    rule = rule_for(phase, event.on)
    state = EndState(phase, peer_number=7)
    after, actions = step(state, event)
    if cell in (".", "!"):
        assert isinstance(rule, Invalid if cell == "!" else Ignored)
        assert (after, actions) == (state, ())
    else:
        assert after.phase is COLUMNS[cell]


def test_what_has_no_effect_changes_nothing() -> None:
    """An ignored or invalid event changes nothing, in any state."""
    for before, event, after, actions in every_step():
        if isinstance(rule_for(before.phase, event.on), Ignored | Invalid):
            assert (after, actions) == (before, ())


def test_phases_go_on() -> None:
    """No end returns to an earlier phase."""
    order = list(Phase)
    for before, _, after, _ in every_step():
        assert order.index(after.phase) >= order.index(before.phase)


def test_one_drop() -> None:
    """The relay is told to drop a connection once: at the start of DROPPING, unless it has died."""
    for before, event, after, actions in every_step():
        drops = [action for action in actions if isinstance(action, Drop)]
        begins = after.phase is Phase.DROPPING and before.phase is not Phase.DROPPING
        assert len(drops) == (begins and event.on is not On.RELAY_DIED)


def test_one_grant() -> None:
    """Our process gets the ring exactly when a phase begins in which it may have it."""
    for before, _, after, actions in every_step():
        begins = before.phase not in LIVE and after.phase in LIVE
        assert actions.count(Do.GRANT) == begins


def test_one_answer() -> None:
    """A request is granted, refused, or goes on waiting when its connection leaves these phases."""
    waiting = (*LEADER, *FOLLOWER)
    for before, _, after, actions in every_step():
        answers: list[Action] = [each for each in actions if each in (Do.GRANT, Do.KEEP_REQUEST)]
        answers += [each for each in actions if isinstance(each, RefuseRequest)]
        if before.phase in waiting:
            assert len(answers) == (after.phase not in waiting)
        else:
            assert not answers


def test_back_to_tcp_alone() -> None:
    """Our end goes back to TCP alone only while nobody has said that the peer's end was granted."""
    for before, event, _, actions in every_step():
        if Do.UNDO_GRANT in actions:
            assert before.phase is Phase.UNCONFIRMED
            assert event.on in (On.DECLINED, On.PEER_DROPPED)
            assert event.reason is not Reason.BROKEN or event.on is On.DECLINED


def test_reset() -> None:
    """Ends are reset only after a grant, and each reset is noted."""
    for before, _, _, actions in every_step():
        if Drop(broken=True) in actions or Do.SEVER in actions:
            assert before.phase in LIVE
            assert Do.COUNT_BROKEN in actions


def test_the_slot_is_freed() -> None:
    """Our process's side of the slot is freed by us if and only if it never had the ring."""
    for before, _, after, actions in every_step():
        fails = before.phase in (*LEADER, *FOLLOWER)
        gone = after.phase in (Phase.DROPPING, Phase.ABANDONED)
        assert (Do.FREE_SIDE in actions) == (fails and gone)


def test_the_follower_is_not_reset() -> None:
    """A leader whose end was never granted says so to a follower that was, and drops its slot only
    when the relays can't reset the follower's process by it.
    """
    harmless = {
        On.PAIR_FAILED: "the follower's relay never heard of us",
        On.ALL_RECEIVED: "the follower's end is closed",
        On.PATH_BROKEN: "the follower's end is reset or taken back",
        On.PATH_LEFT: "the follower's end is on TCP",
        On.PEER_DROPPED: "the follower has given up",
        On.LINK_LOST: "the relays don't reach each other",
        On.RELAY_DIED: "the relays don't reach each other",
    }
    for before, event, after, actions in every_step():
        if before.phase not in (Phase.LEADER_PAIRING, Phase.ABANDONED):
            continue
        told = [action for action in actions if isinstance(action, Tell)]
        assert Reason.BROKEN not in [each.dropped for each in told]
        if after.phase is Phase.DROPPING:
            assert event.on in harmless or (before.phase in LEADER and before.received)
        if after.phase is Phase.ABANDONED and before.phase is not Phase.ABANDONED:
            assert told


@pytest.mark.parametrize(
    ("before", "event", "phase", "actions"),
    [
        (EndState(Phase.GRANTED), "RELEASED", Phase.GRANTED, (Do.CLOSE,)),
        (EndState(Phase.GRANTED, closed=True), "RELEASED", Phase.GRANTED, ()),
        (
            EndState(Phase.GRANTED, received=True, sent=True),
            "RELEASED",
            Phase.DROPPING,
            (Drop(),),
        ),
        (
            EndState(Phase.GRANTED, closed=True, received=True),
            "ALL_SENT",
            Phase.DROPPING,
            (Drop(),),
        ),
        (
            EndState(Phase.UNCONFIRMED, closed=True),
            "PATH_BROKEN",
            Phase.DROPPING,
            (Do.COUNT_BROKEN, Drop()),
        ),
        (EndState(Phase.GRANTED), "LEAVE_PATH", Phase.GRANTED, (Do.LEAVE,)),
        (EndState(Phase.GRANTED, leaving=True), "LEAVE_PATH", Phase.GRANTED, ()),
        (EndState(Phase.GRANTED), "PATH_LEFT", Phase.DROPPING, (Do.COUNT_LEFT, Drop())),
        (EndState(Phase.GRANTED, closed=True), "PATH_LEFT", Phase.DROPPING, (Drop(),)),
        (EndState(Phase.ABANDONED), "PAIRED", Phase.ABANDONED, (Do.LEAVE,)),
        (EndState(Phase.ABANDONED), "PATH_BROKEN", Phase.DROPPING, (Drop(),)),
        (
            EndState(Phase.LEADER_PAIRING, received=True),
            "REQUEST_GONE",
            Phase.DROPPING,
            (RefuseRequest(Reason.NOT_FOUND), Tell(Reason.NOT_FOUND), Do.FREE_SIDE, Drop()),
        ),
        (
            EndState(Phase.LEADER_PLACING),
            "LINK_LOST",
            Phase.DROPPING,
            (
                RefuseRequest(Reason.NO_LINK),
                Tell(Reason.NO_LINK, Reason.NO_LINK),
                Drop(),
                Do.FREE_SIDE,
            ),
        ),
        (
            EndState(Phase.GRANTED),
            "LINK_LOST",
            Phase.DROPPING,
            (Do.COUNT_BROKEN, Tell(Reason.BROKEN), Drop(broken=True)),
        ),
    ],
)
def test_actions(before: EndState, event: str, phase: Phase, actions: tuple[Action, ...]) -> None:
    """What is done depends on how far the connection's end has come."""
    after, done = step(before, event_of(event))
    assert (after.phase, done) == (phase, actions)


def test_an_accept_of_another_connection() -> None:
    """The leader confirms only the follower's connection that it has paired."""
    granted = EndState(Phase.GRANTED, peer_number=7)
    assert step(granted, event_of("ACCEPTED"))[1] == (Do.SEND_PAIRED,)
    assert step(replace(granted, peer_number=8), event_of("ACCEPTED"))[1] == ()


def test_an_accept_of_an_abandoned_connection() -> None:
    """A leader that has abandoned a connection says so again to a follower that hasn't heard it."""
    abandoned = EndState(Phase.ABANDONED, peer_number=7)
    assert step(abandoned, event_of("ACCEPTED"))[1] == (Tell(Reason.NOT_FOUND),)
    assert step(replace(abandoned, peer_number=8), event_of("ACCEPTED"))[1] == ()
