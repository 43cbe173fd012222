"""Which path the connections of a run have, from the listings of both hosts' routers.

A ratio means something for the relay only if its connections were there. So every run of a subject
with the library says how many of its connections both routers list as `relay`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.engine_api import EngineApi
from bench.errors import BenchError
from bench.swarm_hosts import BenchHost

RELAY: Final = "relay"
"""The path's name in the routers' listings."""
PATIENCE: Final = 60.0
"""Seconds for a listing after the load."""
BESIDE: Final = 4.0
"""Seconds for a listing beside the load, which leaves the plugin little of the processor."""
STEP: Final = 0.5
LEAST: Final = 3.5
"""Seconds of traffic before a stable number counts: the routers need two at the least."""
LEAST_MOVING: Final = 8.0
"""The same where the connections are expected to move."""
MOST: Final = 12.0
STABLE: Final = 3
"""So many equal listings in a row are stable."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Ends of connections by path, with the reason for those on TCP: at the client's host."""

    in_relay: int
    total: int
    words: dict[str, int]


def listed(
    client: Sequence[Mapping[str, Any]],
    server: Sequence[Mapping[str, Any]],
    servers: Collection[str],
) -> Listed:
    """The connections to these servers (`ADDRESS:PORT`), from both hosts' listings.

    A connection counts as in the relay when both ends do.
    """
    ours = [entry for entry in client if entry["remote"] in servers]
    theirs = [entry for entry in server if entry["local"] in servers]
    words = Counter(
        entry["path"] + (f" ({entry['reason']})" if entry.get("reason") else "") for entry in ours
    )
    both = min(sum(entry["path"] == RELAY for entry in some) for some in (ours, theirs))
    return Listed(both, len(ours), dict(words))


def _listing(host: BenchHost, patience: float) -> list[Mapping[str, Any]]:
    """Raises `BenchError` if plugin or router do not answer."""
    admin = EngineApi(host.root / "run/freeflow-admin/admin.sock", timeout=patience)
    try:
        found = admin.call("GET", "/admin/connections")
    except OSError as error:
        raise BenchError(f"{host.name}: no listing from the plugin: {error}") from error
    return list(found["connections"])


def look(
    client: BenchHost, server: BenchHost, servers: Collection[str], patience: float = PATIENCE
) -> Listed:
    """The present paths of the connections to these servers. Raises `BenchError`."""
    return listed(_listing(client, patience), _listing(server, patience), servers)


def settle(
    look_again: Callable[[], Listed],
    expected: int,
    least: float = LEAST,
    most: float = MOST,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the number of connections in the relay is stable.

    It ends when all `expected` ones are there and have had time to switch to the rings, otherwise
    between `least` and `most` seconds. A listing that fails says nothing: a busy machine leaves the
    router little time.
    """
    start = clock()
    seen: list[int] = []
    while clock() - start < most:
        sleep(STEP)
        try:
            seen.append(look_again().in_relay)
        except BenchError:
            continue
        stable = len(seen) >= STABLE and len(set(seen[-STABLE:])) == 1
        if seen[-1] >= expected:
            sleep(STEP)
            return
        if stable and clock() - start >= least:
            return
