"""Which tasks of a network's services take connections, by the DNS of the containers on the network.

All containers of a host have the same DNS behind 127.0.0.11; but a container can put answers of its own in its place, and
what is concluded holds for all of them. So one container, another one each time, is asked about everything; and when that
changes what is believed, others are asked until most of them agree. Of containers of one service only one counts: whoever
has broken into it has all of them. A container that is alone on its network decides for itself only.

An answer that doesn't come changes nothing. Where DNS can't say it, the engine's list has to: see `Decision.by_list`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from driver.model import NetworkView, Service
from driver.ports import TaskResolver, Told
from driver.resolver import SMALL, answer_size, fits
from driver.vip_table import NetworkState

ASKERS: Final = 3
"""So many containers are tried until one answers."""
VOTERS: Final = 5
"""So many are asked about what has changed, at most."""
AGREED: Final = 2
"""So many that say the same, and none that says otherwise, are enough."""
MUTE_FOR: Final = 10.0
"""Seconds for which a container that answered nothing, or slowly, is asked after the others."""
REST_AFTER: Final = 5.0
"""Seconds after which a service without active tasks isn't asked about again until its list changes. Asking would make
Docker's DNS ask outside, and a task that left doesn't come back: it is being stopped."""
SILENCES: Final = 3
"""So many times in a row DNS has to know a service and not to answer for its tasks to mean that there are none: engines
whose DNS servers outside don't answer don't either."""
LONGEST_REST: Final = 30.0
"""Seconds for which a service is left alone at most whose answers are lost or late; doubled from one on."""

Tasks = frozenset[IPv4Address]


@dataclass(frozen=True, slots=True)
class Decision:
    """`tasks` by service name; services of which nothing is known are absent. `by_list`: DNS can't say it of these, because they
    are too large or their answers don't come."""

    tasks: dict[str, Tasks]
    by_list: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Trouble:
    """A service whose answers don't come: how many times in a row, to whom, and until when it is left alone."""

    count: int = 0
    silent: int = 0
    owners: set[str] = field(default_factory=set)
    until: float = float("-inf")


@dataclass(slots=True)
class _Memory:
    """Of a network: who was asked last, what is believed, what doesn't come, which containers have ever answered."""

    last: str = ""
    believed: dict[str, Tasks] = field(default_factory=dict)
    trouble: dict[str, _Trouble] = field(default_factory=dict)
    mute: dict[Path, float] = field(default_factory=dict)
    spoken: set[Path] = field(default_factory=set)
    turns: int = 0


class DnsTasks:
    """Asks, and remembers what was concluded. For one thread per network."""

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
        """`sandboxes` are those on the network, each with its owner: containers of one owner count as one."""
        now = self._clock()
        memory = self._memories.setdefault(view.id, _Memory())
        resting = before.resting(now - REST_AFTER)
        services = [service for service in view.services if service.vip is not None]
        decided: dict[str, Tasks] = {item.name: frozenset() for item in services if item in resting}
        awake = [item for item in services if item not in resting]
        names = {item.name for item in awake}
        memory.believed = {name: memory.believed[name] for name in memory.believed.keys() & names}
        memory.trouble = {name: memory.trouble[name] for name in memory.trouble.keys() & names}
        asked = [
            item
            for item in awake
            if fits(item, view.name)
            and not (item.name in memory.trouble and memory.trouble[item.name].until > now)
        ]
        order = self._in_order(memory, sandboxes, now)
        if asked and order:
            self._decide(view, asked, order, sandboxes, memory, decided)
        by_list = {item.name for item in awake if not fits(item, view.name)}
        by_list |= {name for name, each in memory.trouble.items() if each.count >= SILENCES}
        return Decision(decided, frozenset(by_list - decided.keys()))

    # --- whom

    def _in_order(self, memory: _Memory, sandboxes: Mapping[Path, str], now: float) -> list[Path]:
        """One container of each owner, the owner after the last one first; those that are mute come last."""
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

    # --- what

    def _decide(
        self,
        view: NetworkView,
        asked: list[Service],
        order: list[Path],
        sandboxes: Mapping[Path, str],
        memory: _Memory,
        decided: dict[str, Tasks],
    ) -> None:
        """Add to `decided` what follows from the answers."""
        first, told = self._first(view, asked, order, memory)
        if first is None:
            return
        owner = memory.last = sandboxes[first]
        owners = len({sandboxes[path] for path in memory.spoken})
        changed = []
        for service in asked:
            name = service.name
            if name not in told.known:
                if self._is_silent(memory, name, owner, owners, name in told.silent):
                    memory.believed[name] = decided[name] = frozenset()
                continue
            memory.trouble.pop(name, None)
            if memory.believed.get(name) == told.known[name]:
                decided[name] = told.known[name]
            else:
                changed.append(service)
        votes = {service.name: [told.known[service.name]] for service in changed}
        # Those before it have just answered nothing.
        others = order[order.index(first) + 1 :]
        self._ask_others(view, changed, votes, others, memory)
        # A container that has never answered, such as one that is being started, isn't waited for.
        needed = min(AGREED, len({sandboxes[path] for path in memory.spoken}))
        for service in changed:
            before = memory.believed.get(service.name)
            if len(votes[service.name]) >= needed:
                listed = frozenset(task.address for task in service.tasks)
                found = _majority(votes[service.name], listed if before is None else before)
                memory.believed[service.name] = decided[service.name] = found
            elif before is not None:
                decided[service.name] = before

    def _first(
        self, view: NetworkView, asked: list[Service], order: list[Path], memory: _Memory
    ) -> tuple[Path | None, Told]:
        """The first container that answers anything, and its answer."""
        told = Told({})
        for path in order[:ASKERS]:
            patient = any(memory.trouble[s.name].count for s in asked if s.name in memory.trouble)
            told = self._resolver.tasks(path, view.name, asked, patient=patient)
            self._note(memory, path, told)
            if told.known or told.silent:
                return path, told
            # Docker's DNS may be slow with large answers: it isn't asked for them once more.
            asked = [item for item in asked if answer_size(item, view.name) <= SMALL]
            if not asked:
                break
        return None, told

    def _is_silent(self, memory: _Memory, name: str, owner: str, owners: int, known: bool) -> bool:
        """Note that no answer came for a service; whether that means that it has no tasks."""
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

    def _ask_others(
        self,
        view: NetworkView,
        changed: list[Service],
        votes: dict[str, list[Tasks]],
        others: list[Path],
        memory: _Memory,
    ) -> None:
        """Add to `votes` until two have said the same of a service and nobody otherwise, or enough were asked."""
        for path in others[: VOTERS - 1]:
            changed = [item for item in changed if not _agree(votes[item.name])]
            if not changed:
                return
            told = self._resolver.tasks(path, view.name, changed)
            self._note(memory, path, told)
            for name, said in told.known.items():
                votes[name].append(said)

    def _note(self, memory: _Memory, path: Path, told: Told) -> None:
        """Remember whether a container answers at all, and fast enough to be asked before others."""
        answers = bool(told.known or told.silent)
        if answers:
            memory.spoken.add(path)
        if told.slow or not answers:
            memory.mute[path] = self._clock() + MUTE_FOR
        else:
            memory.mute.pop(path, None)


def _agree(votes: list[Tasks]) -> bool:
    return len(votes) >= AGREED and len(set(votes)) == 1


def _majority(votes: list[Tasks], before: Tasks) -> Tasks:
    """What more than half say; of what half say, what was believed before."""
    found = set()
    for address in frozenset().union(*votes):
        said = 2 * sum(address in vote for vote in votes)
        if said > len(votes) or (said == len(votes) and address in before):
            found.add(address)
    return frozenset(found)
