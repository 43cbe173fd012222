"""Decides which tasks take connections, by the DNS of the containers on a network.

All containers of a host have the same DNS at 127.0.0.11, but a container can forge its answers, and
the decision holds for all of them. So each time another container is queried about everything, and
when its answers differ from the last decision, more are queried until most of them agree. Of the
containers of a service only one counts: an attacker inside one has them all. A container that is
alone on its network decides for itself only.

A missing answer changes nothing. Where DNS can't answer, the engine's list decides: see
`Decision.by_list`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from driver.model import NetworkView, Service
from driver.ports import TaskAnswers, TaskResolver
from driver.resolver import SMALL, answer_size, fits
from driver.vip_table import NetworkState

ASKERS: Final = 3
"""Containers that are tried until one answers."""
VOTERS: Final = 5
"""Containers that are queried about a change, at most."""
AGREED: Final = 2
"""Equal answers that are enough if none differs."""
MUTE_FOR: Final = 10.0
"""Seconds for which a container that answered nothing, or slowly, is queried after the others."""
REST_AFTER: Final = 5.0
"""Seconds after which a service without active tasks isn't queried again until its list changes.
Docker's DNS would forward the query, and a task that left is being stopped and doesn't return."""
SILENCES: Final = 3
"""Times in a row that DNS must know a service and not answer for its tasks until that means that it
has none. If the DNS servers outside don't answer, Docker's DNS doesn't either."""
LONGEST_REST: Final = 30.0
"""Most seconds between queries for a service whose answers are lost or late; doubled from one
on."""

Tasks = frozenset[IPv4Address]


@dataclass(frozen=True, slots=True)
class Decision:
    """`tasks` by service name, without services of which nothing is known.

    `by_list`: services that are too large for DNS, or for which no answers come.
    """

    tasks: dict[str, Tasks]
    by_list: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Trouble:
    """A service without answers: how often in a row, for which owners, until when it isn't
    queried."""

    count: int = 0
    silent: int = 0
    owners: set[str] = field(default_factory=set)
    until: float = float("-inf")


@dataclass(slots=True)
class _Memory:
    """A network: the last queried owner, the last decision, missing answers, containers that
    answered, how often in a row none did."""

    last: str = ""
    accepted: dict[str, Tasks] = field(default_factory=dict)
    trouble: dict[str, _Trouble] = field(default_factory=dict)
    mute: dict[Path, float] = field(default_factory=dict)
    spoken: set[Path] = field(default_factory=set)
    turns: int = 0
    unanswered: int = 0


class DnsTasks:
    """Queries containers and remembers the decisions. One thread per network at a time."""

    def __init__(self, resolver: TaskResolver, clock: Callable[[], float]) -> None:
        self._resolver = resolver
        self._clock = clock
        self._memories: dict[str, _Memory] = {}

    def forget(self, network_id: str) -> None:
        """The network has no endpoints here any more."""
        self._memories.pop(network_id, None)

    def ask(
        self, view: NetworkView, before: NetworkState, sandboxes: Mapping[Path, str]
    ) -> Decision:
        """`sandboxes` are those on the network, each with its owner; those of one owner count as
        one."""
        now = self._clock()
        memory = self._memories.setdefault(view.id, _Memory())
        resting = before.resting(now - REST_AFTER)
        services = [service for service in view.services if service.vip is not None]
        decided: dict[str, Tasks] = {item.name: frozenset() for item in services if item in resting}
        awake = [item for item in services if item not in resting]
        names = {item.name for item in awake}
        memory.accepted = {name: memory.accepted[name] for name in memory.accepted.keys() & names}
        memory.trouble = {name: memory.trouble[name] for name in memory.trouble.keys() & names}
        asked = [
            item
            for item in awake
            if fits(item, view.name)
            and not (item.name in memory.trouble and memory.trouble[item.name].until > now)
        ]
        order = self._order(memory, sandboxes, now)
        if asked and not self._decide(view, asked, order, sandboxes, memory, decided):
            memory.unanswered += 1
        else:
            memory.unanswered = 0
        by_list = {item.name for item in awake if not fits(item, view.name)}
        by_list |= {name for name, trouble in memory.trouble.items() if trouble.count >= SILENCES}
        if memory.unanswered >= SILENCES:
            by_list |= {item.name for item in asked}
        return Decision(decided, frozenset(by_list - decided.keys()))

    # --- which containers are queried

    def _order(self, memory: _Memory, sandboxes: Mapping[Path, str], now: float) -> list[Path]:
        """One container of each owner, starting after the last owner; mute containers come last."""
        memory.spoken &= sandboxes.keys()
        memory.mute = {path: until for path, until in memory.mute.items() if until > now}
        memory.turns += 1
        groups: dict[str, list[Path]] = {}
        for path in sorted(sandboxes):
            if path.exists():
                groups.setdefault(sandboxes[path], []).append(path)
        chosen = []
        for owner in sorted(groups, key=lambda name: (name <= memory.last, name)):
            speaking = [path for path in groups[owner] if path not in memory.mute]
            candidates = speaking or groups[owner]
            chosen.append(candidates[memory.turns % len(candidates)])
        return sorted(chosen, key=lambda path: path in memory.mute)

    # --- the decision

    def _decide(
        self,
        view: NetworkView,
        asked: list[Service],
        order: list[Path],
        sandboxes: Mapping[Path, str],
        memory: _Memory,
        decided: dict[str, Tasks],
    ) -> bool:
        """Query containers and add to `decided`. Returns whether any answered."""
        first, answers = self._first(view, asked, order, memory)
        if first is None:
            return False
        owner = memory.last = sandboxes[first]
        owners = len({sandboxes[path] for path in memory.spoken})
        changed = []
        for service in asked:
            name = service.name
            if name not in answers.known:
                if self._note_silence(memory, name, owner, owners, name in answers.silent):
                    memory.accepted[name] = decided[name] = frozenset()
                continue
            memory.trouble.pop(name, None)
            if memory.accepted.get(name) == answers.known[name]:
                decided[name] = answers.known[name]
            else:
                changed.append(service)
        votes = {service.name: [answers.known[service.name]] for service in changed}
        # Containers before it have just given no answer.
        others = order[order.index(first) + 1 :]
        self._query_others(view, changed, votes, others, memory)
        # Containers that have never answered, such as those that are starting, aren't needed.
        needed = min(AGREED, len({sandboxes[path] for path in memory.spoken}))
        for service in changed:
            before = memory.accepted.get(service.name)
            if len(votes[service.name]) >= needed:
                listed = frozenset(task.address for task in service.tasks)
                found = _majority(votes[service.name], listed if before is None else before)
                memory.accepted[service.name] = decided[service.name] = found
            elif before is not None:
                decided[service.name] = before
        return True

    def _first(
        self, view: NetworkView, asked: list[Service], order: list[Path], memory: _Memory
    ) -> tuple[Path | None, TaskAnswers]:
        """The first container that answers, and its answers."""
        answers = TaskAnswers({})
        for path in order[:ASKERS]:
            patient = any(memory.trouble[s.name].count for s in asked if s.name in memory.trouble)
            answers = self._resolver.tasks(path, view.name, asked, patient=patient)
            self._note(memory, path, answers)
            if answers.known or answers.silent:
                return path, answers
            # Docker's DNS may be slow with large answers: no second query for those.
            asked = [item for item in asked if answer_size(item, view.name) <= SMALL]
            if not asked:
                break
        return None, answers

    def _note_silence(
        self, memory: _Memory, name: str, owner: str, owners: int, known: bool
    ) -> bool:
        """Note that a service got no answer; returns whether that means that it has no tasks."""
        trouble = memory.trouble.setdefault(name, _Trouble())
        trouble.count += 1
        trouble.silent = trouble.silent + 1 if known else 0
        trouble.owners.add(owner)
        if trouble.silent >= SILENCES and len(trouble.owners) >= min(AGREED, owners):
            return True
        if trouble.count >= SILENCES:
            rest = min(LONGEST_REST, 2.0 ** (trouble.count - SILENCES))
            trouble.until = self._clock() + rest
        return False

    def _query_others(
        self,
        view: NetworkView,
        changed: list[Service],
        votes: dict[str, list[Tasks]],
        others: list[Path],
        memory: _Memory,
    ) -> None:
        """Add to `votes` until enough answers about each service agree, or enough containers were
        queried."""
        for path in others[: VOTERS - 1]:
            changed = [item for item in changed if not _agree(votes[item.name])]
            if not changed:
                return
            answers = self._resolver.tasks(path, view.name, changed)
            self._note(memory, path, answers)
            for name, addresses in answers.known.items():
                votes[name].append(addresses)

    def _note(self, memory: _Memory, path: Path, answers: TaskAnswers) -> None:
        """Remember whether a container answers, and fast enough to be queried before others."""
        answered = bool(answers.known or answers.silent)
        if answered:
            memory.spoken.add(path)
        if answers.slow or not answered:
            memory.mute[path] = self._clock() + MUTE_FOR
        else:
            memory.mute.pop(path, None)


def _agree(votes: list[Tasks]) -> bool:
    return len(votes) >= AGREED and len(set(votes)) == 1


def _majority(votes: list[Tasks], before: Tasks) -> Tasks:
    """Addresses in more than half of the votes; with exactly half, the earlier decision counts."""
    found = set()
    for address in frozenset().union(*votes):
        doubled = 2 * sum(address in vote for vote in votes)
        if doubled > len(votes) or (doubled == len(votes) and address in before):
            found.add(address)
    return frozenset(found)
