"""The flood list of each VXLAN device, from the peers that the engine lists; announcements to
them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

import structlog

from driver.errors import EngineError
from driver.model import Endpoint, IPAddress, Network, NetworkView, Service
from driver.ports import Kernel

log = structlog.get_logger()

REPAIR_EVERY: Final = 10.0
"""Seconds after which an unchanged flood list is checked again: others may have changed it."""


Reach = Callable[[Network, frozenset[IPAddress]], frozenset[IPAddress]]


def _task_addresses(services: Collection[Service]) -> set[IPv4Address]:
    return {task.address for service in services for task in service.tasks}


@dataclass(frozen=True, slots=True)
class _Done:
    """The last setting of a network; at first none."""

    peers: frozenset[IPAddress] = frozenset()
    endpoints: frozenset[Endpoint] = frozenset()
    at: float = -math.inf


class FloodLists:
    """The last setting of each network is remembered. One thread per network at a time."""

    def __init__(
        self, kernel: Kernel, clock: Callable[[], float], reach: Reach = lambda _, peers: peers
    ) -> None:
        """`reach`: the addresses to which a network's packets for peers go."""
        self._kernel = kernel
        self._reach = reach
        self._clock = clock
        self._done: dict[str, _Done] = {}

    def forget(self, network_id: str) -> None:
        """The network has no endpoints here any more."""
        self._done.pop(network_id, None)

    def set(
        self,
        network: Network,
        view: NetworkView,
        endpoints: Collection[Endpoint],
        own: Collection[IPAddress],
    ) -> None:
        """Make the flood list the peers that the engine lists, without this host's `own` addresses.

        New peers get announcements of this host's endpoints.

        Raises:
            EngineError: `own` is empty, so this host's own entry among the peers is not known.
        """
        # No peers, not even this host: gossip has not started.
        if not network.overlay or not view.peers:
            return
        if not own:
            raise EngineError(
                "the peers are not set",
                cause="this host's own address among them isn't known yet",
                remedy="check the engine: docker info",
            )
        listed = frozenset(peer.address for peer in view.peers) - frozenset(own)
        peers = self._reach(network, listed)
        # The first endpoint makes a new device, so a change of the endpoints sets the list again.
        wanted = frozenset(endpoints)
        now = self._clock()
        done = self._done.get(network.id, _Done())
        unchanged = (done.peers, done.endpoints) == (peers, wanted)
        if unchanged and now - done.at < REPAIR_EVERY:
            return
        added = self._kernel.set_peers(network.id, peers)
        removed = done.peers - peers
        if removed:
            log.info("peers removed", network=network.id, peers=sorted(map(str, removed)))
        if added:
            log.info("peers added", network=network.id, peers=sorted(map(str, added)))
            self._kernel.announce(network.id, endpoints)
        self._done[network.id] = _Done(peers, wanted, now)

    def announce_tasks(
        self,
        network: Network,
        view: NetworkView,
        known: NetworkView | None,
        endpoints: Collection[Endpoint],
    ) -> None:
        """Announce the endpoints that joined a service since `known`; to other hosts that is a
        hint."""
        listed = _task_addresses(view.services) - _task_addresses(known.services if known else ())
        ours = [item for item in endpoints if item.ipv4 is not None and item.ipv4.ip in listed]
        if ours:
            self._kernel.announce(network.id, ours)
