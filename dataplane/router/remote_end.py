"""The life of one end of a connection to another host, as a pure state machine.

`step` takes a state and an event, and returns the next state and the actions to execute. It does no
I/O, and no other code changes a phase. `TABLE` has an entry for every pair of event and phase: a
transition, or the reason why the event has no effect (`Ignored`) or can't happen (`Invalid`).
`remote_connections.py` makes events of messages and timers, and executes the actions.

The leader, of two hosts the one with the smaller node ID, matches the requests of both:

    leader                                         follower
    NEW              LEAD
    LEADER_PLACING   PLACED
    OFFERED                    -- Place ------->   NEW               FOLLOW
                                                   FOLLOWER_PLACING  PLACED
                                                   FOLLOWER_PAIRING  PAIRED
                               <------ Accept --   UNCONFIRMED       (its process has the ring)
    LEADER_PAIRING   PAIRED
    GRANTED                    -- Paired ------>   GRANTED

Either host may fail between any two steps. The invariant that makes this safe: an end writes to its
ring only after its peer has set `ready` there. An end whose peer was never granted therefore goes
back to TCP without loss (`Do.UNDO_GRANT`). If it is unknown whether the peer was granted, because
its router has died or can't be reached, both ends are reset.

In LEADER_PAIRING the follower's process has the ring, and the two relays are about to reach each
other. If the leader's relay dropped its slot then, the follower's relay would reset that process.
So a leader that gives up first has the follower's end taken back, and drops afterwards (ABANDONED).

One state machine describes one stay on a path. `On.LEAD` and `On.FOLLOW` choose the transport.
`On.LEAVE_PATH` brings both ends back to TCP, in any phase. When the connection enters a path again,
it does so as another state machine, with another connection number.

A question is an action too (`Do.CHECK_SOCKET`, `Do.SEND_ACCEPT`). Its answer is the next event.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from dataplane.router.reasons import Reason
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


@dataclass(frozen=True, slots=True)
class Ignored:
    """The event may happen in this phase, and has no effect."""

    why: str


@dataclass(frozen=True, slots=True)
class Invalid:
    """The event can't happen in this phase, unless a program doesn't keep to the protocol."""

    why: str


@dataclass(frozen=True, slots=True)
class Go:
    """The event always leads to this phase (None: the same), with these actions."""

    phase: Phase | None
    actions: tuple[Action, ...]


Step = tuple[EndState, tuple[Action, ...]]
Rule = Go | Callable[[EndState, Event], Step] | Ignored | Invalid


def step(state: EndState, event: Event) -> Step:
    """The next state, and what to do, in this order. Without effect: the same state, nothing."""
    rule = rule_for(state.phase, event.on)
    if isinstance(rule, Ignored | Invalid):
        return state, ()
    if isinstance(rule, Go):
        return replace(state, phase=rule.phase or state.phase), rule.actions
    return rule(state, event)


def rule_for(phase: Phase, on: On) -> Rule:
    """What an event means in a phase."""
    return TABLE[on][phase]


# --- transitions that always do the same


def _go(phase: Phase, *actions: Action) -> Go:
    return Go(phase, actions)


def _stay(*actions: Action) -> Go:
    return Go(None, actions)


def _fail(reason: Reason, *, tell: bool = True) -> Go:
    """Before our end is granted: both ends stay on TCP."""
    told = (Tell(dropped=reason, declined=reason),) if tell else ()
    return _go(Phase.DROPPING, RefuseRequest(reason), *told, Drop(), Do.FREE_SIDE)


def _relay_died(declined: Reason | None) -> Go:
    """Before our end is granted: the peer's may be, and has nothing in its rings."""
    told = Tell(dropped=Reason.PEER_NO_RDMA, declined=declined)
    return _go(Phase.DROPPING, told, RefuseRequest(Reason.NO_RDMA), Do.FREE_SIDE)


def _drop_abandoned(*told: Tell) -> Go:
    """The follower's process does not need the relays any more, or they can't reach each other."""
    return _go(Phase.DROPPING, *told, Drop())


_WAIT_AGAIN: Final = _go(Phase.DROPPING, Do.KEEP_REQUEST, Drop(), Do.FREE_SIDE)
"""The leader's end will not be granted. The request waits for another match."""
_UNDO: Final = _go(Phase.DROPPING, Drop(), Do.UNDO_GRANT)
"""The peer's end was never granted."""
_BREAK: Final = _go(Phase.DROPPING, Do.COUNT_BROKEN, Drop(broken=True))
"""Bytes may be lost: both ends are reset."""
_BREAK_AND_TELL: Final = _go(
    Phase.DROPPING, Do.COUNT_BROKEN, Tell(dropped=Reason.BROKEN), Drop(broken=True)
)
_RELAY_DIED_LIVE: Final = _go(
    Phase.DROPPING, Do.COUNT_BROKEN, Do.SEVER, Tell(dropped=Reason.BROKEN)
)
"""Only an end that may have bytes in its rings is reset. All others have left them."""
_ACCEPT_AGAIN: Final = _stay(Do.SEND_ACCEPT, Do.RESTART_TIMER)


# --- transitions that depend on the state, or on what the event carries


def _lead(state: EndState, event: Event) -> Step:
    after = replace(state, phase=Phase.LEADER_PLACING, transport=event.transport)
    return after, (Do.MAKE_PLACE,)


def _follow(state: EndState, event: Event) -> Step:
    after = replace(
        state,
        phase=Phase.FOLLOWER_PLACING,
        transport=event.transport,
        peer_number=event.peer_number,
        peer_place=event.place,
    )
    return after, (Do.MAKE_PLACE,)


def _placed_leader(state: EndState, event: Event) -> Step:
    return replace(state, phase=Phase.OFFERED, place=event.place), (Do.SEND_PLACE,)


def _placed_follower(state: EndState, event: Event) -> Step:
    return replace(state, phase=Phase.FOLLOWER_PAIRING, place=event.place), (Do.PAIR,)


def _accepted(state: EndState, event: Event) -> Step:
    after = replace(state, peer_number=event.peer_number, peer_place=event.place)
    return after, (Do.CHECK_SOCKET,)


def _accepted_again(state: EndState, event: Event) -> Step:
    """The follower hasn't got our confirmation."""
    return state, (Do.SEND_PAIRED,) if state.peer_number == event.peer_number else ()


def _give_up_pairing(state: EndState, reason: Reason) -> Step:
    """Leader: our end won't be granted, and the follower's is. Have that one taken back."""
    answered = (RefuseRequest(reason), Tell(dropped=reason), Do.FREE_SIDE)
    if state.received:
        # The follower's end is closed or reset already.
        return replace(state, phase=Phase.DROPPING), (*answered, Drop())
    return replace(state, phase=Phase.ABANDONED), answered


def _abandon(state: EndState, _: Event) -> Step:
    return _give_up_pairing(state, Reason.NOT_FOUND)


def _abandon_late(state: EndState, _: Event) -> Step:
    return _give_up_pairing(state, Reason.NO_LINK)


def _accepted_in_vain(state: EndState, event: Event) -> Step:
    """The follower hasn't heard that our end won't be granted."""
    told = (Tell(dropped=Reason.NOT_FOUND),) if state.peer_number == event.peer_number else ()
    return state, told


def _released(state: EndState, _: Event) -> Step:
    if state.closed:
        return state, ()
    if state.received and state.sent:
        return replace(state, phase=Phase.DROPPING, closed=True), (Drop(),)
    return replace(state, closed=True), (Do.CLOSE,)


def _ended(state: EndState, *actions: Action) -> Step:
    """The peer's direction has ended, or both. Only a granted peer can end it."""
    if state.closed and state.received and state.sent:
        return replace(state, phase=Phase.DROPPING), (*actions, Drop())
    return replace(state, phase=Phase.GRANTED), actions


def _all_received(state: EndState, _: Event) -> Step:
    return _ended(replace(state, received=True))


def _all_sent(state: EndState, _: Event) -> Step:
    """The peer's relay has it all. Its end need not be granted yet: see `_received_early`."""
    after = replace(state, sent=True)
    return _ended(after) if state.received else (after, ())


def _broken(state: EndState, _: Event) -> Step:
    after, actions = _broken_early(state, _)
    return _ended(after, *actions)


def _received_early(state: EndState, _: Event) -> Step:
    """The follower's process has used and closed its end before ours is granted."""
    return replace(state, received=True), ()


def _broken_early(state: EndState, _: Event) -> Step:
    counted = () if state.received and state.sent else (Do.COUNT_BROKEN,)
    return replace(state, received=True, sent=True), counted


def _left(state: EndState, _: Event) -> Step:
    counted = () if state.closed or state.received else (Do.COUNT_LEFT,)
    return replace(state, phase=Phase.DROPPING), (*counted, Drop())


def _leave(state: EndState, _: Event) -> Step:
    return replace(state, leaving=True), () if state.leaving else (Do.LEAVE,)


def _leave_early(state: EndState, event: Event) -> Step:
    if state.phase is Phase.LEADER_PAIRING:
        return _give_up_pairing(state, event.reason)
    rule = _fail(event.reason)
    return replace(state, phase=Phase.DROPPING), rule.actions


def _peer_dropped(state: EndState, event: Event) -> Step:
    if state.phase is Phase.UNCONFIRMED:
        # The reason is BROKEN if the peer's end was granted.
        rule = _BREAK if event.reason is Reason.BROKEN else _UNDO
    else:
        rule = _fail(event.reason, tell=False)
    return replace(state, phase=rule.phase or state.phase), rule.actions


# --- the table

_NOT_BEGUN: Final = Invalid("the connection has no number yet")
_BEGUN: Final = Invalid("a state machine begins once")
_FORGOTTEN: Final = Ignored("the connection is forgotten")
_LATE: Final = Ignored("we have already given the connection up")
_GIVEN_UP: Final = Ignored(
    "the follower is told already, and the relays as soon as they are paired"
)
_ONE_ANSWER: Final = Invalid("the relay answers each message once")
_ANSWERED: Final = Invalid("the request is answered")
_UNKNOWN_TO_PEER: Final = Invalid("the peer's relay doesn't know our place yet")
_OPEN: Final = Invalid("our end is not closed")
_ASKED: Final = Invalid("the question is asked in another phase")
_FOR_LEADER: Final = Invalid("only the leader gets this message")
_FOR_FOLLOWER: Final = Invalid("only the follower gets this message")
_NO_TIMER: Final = Invalid("no timer runs in this phase")
_UNAFFECTED: Final = Ignored("the relays go on without a session")


def _row(
    rules: Mapping[Phase | tuple[Phase, ...], Rule],
    otherwise: Rule | None = None,
    *,
    new: Rule = _NOT_BEGUN,
    dropping: Rule = _LATE,
    over: Rule = _FORGOTTEN,
) -> Mapping[Phase, Rule]:
    """The rules of one event. A phase has one rule, its own or `otherwise`."""
    row: dict[Phase, Rule] = {Phase.NEW: new, Phase.DROPPING: dropping, Phase.OVER: over}
    for phases, rule in rules.items():
        for phase in phases if isinstance(phases, tuple) else (phases,):
            assert phase not in row, f"two rules for {phase}"
            row[phase] = rule
    if otherwise is not None:
        row = {phase: row.get(phase, otherwise) for phase in Phase}
    return row


_P: Final = Phase
TABLE: Final[Mapping[On, Mapping[Phase, Rule]]] = {
    On.LEAD: _row({}, _BEGUN, new=_lead, dropping=_BEGUN, over=_BEGUN),
    On.FOLLOW: _row({}, _BEGUN, new=_follow, dropping=_BEGUN, over=_BEGUN),
    # Our relay.
    On.PLACED: _row(
        {
            _P.LEADER_PLACING: _placed_leader,
            _P.FOLLOWER_PLACING: _placed_follower,
        },
        _ONE_ANSWER,
    ),
    On.PLACE_FAILED: _row(
        {
            (_P.LEADER_PLACING, _P.FOLLOWER_PLACING): _fail(Reason.MEMORY),
        },
        _ONE_ANSWER,
    ),
    On.PAIRED: _row(
        {
            _P.LEADER_PAIRING: _go(_P.GRANTED, Do.SEND_PAIRED, Do.GRANT),
            _P.ABANDONED: _stay(Do.LEAVE),
            _P.FOLLOWER_PAIRING: _stay(Do.CHECK_SOCKET),
        },
        _ONE_ANSWER,
    ),
    On.PAIR_FAILED: _row(
        {
            (_P.LEADER_PAIRING, _P.FOLLOWER_PAIRING): _fail(Reason.NO_LINK),
            _P.ABANDONED: _drop_abandoned(Tell(dropped=Reason.NO_LINK)),
        },
        _ONE_ANSWER,
    ),
    On.ALL_RECEIVED: _row(
        {
            (_P.LEADER_PLACING, *FOLLOWER): _UNKNOWN_TO_PEER,
            (_P.OFFERED, _P.LEADER_PAIRING): _received_early,
            _P.ABANDONED: _drop_abandoned(),
            LIVE: _all_received,
        }
    ),
    On.ALL_SENT: _row({LIVE: _all_sent}, _OPEN),
    On.PATH_BROKEN: _row(
        {
            (*LEADER, *FOLLOWER): _broken_early,
            _P.ABANDONED: _drop_abandoned(),
            LIVE: _broken,
        }
    ),
    On.PATH_LEFT: _row({LIVE: _left, _P.ABANDONED: _drop_abandoned()}, _UNKNOWN_TO_PEER),
    On.DROPPED: _row(
        {},
        Invalid("the relay drops only what it was told to"),
        dropping=_go(_P.OVER, Do.FORGET),
    ),
    On.RELAY_DIED: _row(
        {
            LEADER: _relay_died(Reason.PEER_NO_RDMA),
            _P.ABANDONED: _go(_P.DROPPING, Tell(dropped=Reason.PEER_NO_RDMA)),
            FOLLOWER: _relay_died(None),
            LIVE: _RELAY_DIED_LIVE,
        },
        dropping=Ignored("the process may still read what is left in its ring"),
    ),
    # The peer's router.
    On.ACCEPTED: _row(
        {
            _P.LEADER_PLACING: Invalid("the follower doesn't know our place yet"),
            _P.OFFERED: _accepted,
            _P.LEADER_PAIRING: Ignored("our relay is being told already"),
            _P.ABANDONED: _accepted_in_vain,
            _P.GRANTED: _accepted_again,
        },
        _FOR_LEADER,
    ),
    On.CONFIRMED: _row(
        {
            FOLLOWER: Invalid("the leader confirms only what was accepted"),
            _P.UNCONFIRMED: _go(_P.GRANTED),
            _P.GRANTED: Ignored("it is confirmed already"),
        },
        _FOR_FOLLOWER,
    ),
    On.DECLINED: _row(
        {
            FOLLOWER: _fail(Reason.NOT_FOUND, tell=False),
            _P.UNCONFIRMED: _UNDO,
            _P.GRANTED: Ignored("the leader has confirmed that its end is granted"),
        },
        _FOR_FOLLOWER,
    ),
    On.WITHDRAWN: _row(
        {
            (_P.LEADER_PLACING, _P.OFFERED): _fail(Reason.NOT_FOUND, tell=False),
            _P.LEADER_PAIRING: _abandon,
            _P.ABANDONED: _GIVEN_UP,
            _P.GRANTED: Ignored("the offer was accepted"),
        },
        _FOR_LEADER,
    ),
    On.PEER_DROPPED: _row(
        {
            (*LEADER, *FOLLOWER, _P.UNCONFIRMED): _peer_dropped,
            _P.ABANDONED: _drop_abandoned(),
            _P.GRANTED: _BREAK,
        }
    ),
    # Sessions and links.
    On.SESSION_UP: _row(
        {_P.UNCONFIRMED: _ACCEPT_AGAIN}, Ignored("no message that matters can be lost")
    ),
    On.SESSION_DOWN: _row(
        {
            (_P.LEADER_PLACING, _P.OFFERED, *FOLLOWER): _WAIT_AGAIN,
            (_P.LEADER_PAIRING, _P.ABANDONED): Ignored("the follower's end is granted: go on"),
        },
        _UNAFFECTED,
    ),
    On.SESSION_EXPIRED: _row({_P.UNCONFIRMED: _BREAK}, _UNAFFECTED),
    On.LINK_LOST: _row(
        {
            (*LEADER, *FOLLOWER): _fail(Reason.NO_LINK),
            _P.ABANDONED: _drop_abandoned(Tell(dropped=Reason.NO_LINK)),
            LIVE: _BREAK_AND_TELL,
        }
    ),
    # This host.
    On.SOCKET_OPEN: _row(
        {
            _P.OFFERED: _go(_P.LEADER_PAIRING, Do.PAIR),
            _P.FOLLOWER_PAIRING: _stay(Do.SEND_ACCEPT),
        },
        _ASKED,
        dropping=_ASKED,
    ),
    On.SOCKET_GONE: _row(
        {(_P.OFFERED, _P.FOLLOWER_PAIRING): _fail(Reason.NOT_FOUND)}, _ASKED, dropping=_ASKED
    ),
    On.ACCEPT_SENT: _row(
        {
            _P.FOLLOWER_PAIRING: _go(_P.UNCONFIRMED, Do.GRANT),
            _P.UNCONFIRMED: Ignored("it was sent again"),
        },
        _ASKED,
        dropping=_ASKED,
    ),
    On.ACCEPT_UNSENT: _row(
        {
            # The leader doesn't know that our end was about to be granted.
            _P.FOLLOWER_PAIRING: _fail(Reason.NO_SESSION),
            _P.UNCONFIRMED: Ignored("it is sent again later"),
        },
        _ASKED,
        dropping=_ASKED,
    ),
    On.REQUEST_GONE: _row(
        {
            (_P.LEADER_PLACING, _P.OFFERED, *FOLLOWER): _fail(Reason.NOT_FOUND),
            _P.LEADER_PAIRING: _abandon,
        },
        _ANSWERED,
        dropping=_ANSWERED,
    ),
    On.RELEASED: _row({LIVE: _released}, Ignored("the process doesn't have the ring yet")),
    On.LEAVE_PATH: _row(
        {
            (*LEADER, *FOLLOWER): _leave_early,
            _P.ABANDONED: _GIVEN_UP,
            LIVE: _leave,
        }
    ),
    On.STEP_TIMEOUT: _row(
        {
            (_P.LEADER_PLACING, _P.OFFERED, *FOLLOWER): _fail(Reason.NO_LINK),
            _P.LEADER_PAIRING: _abandon_late,
            _P.UNCONFIRMED: _ACCEPT_AGAIN,
        },
        _NO_TIMER,
        dropping=_NO_TIMER,
    ),
}
