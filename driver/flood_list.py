"""Who shares a network, brought into the kernel: the flood list, and what other hosts are told by announcements."""

from __future__ import annotations

from collections.abc import Callable, Collection
from ipaddress import IPv4Address
from typing import Final

import structlog

from driver.errors import EngineError
from driver.model import Endpoint, IPAddress, Network, NetworkView, Service
from driver.ports import Kernel

log = structlog.get_logger()

REPAIR_EVERY: Final = 10.0
"""Seconds after which an unchanged flood list is checked again, in case somebody else has changed it."""


def _task_addresses(services: Collection[Service]) -> set[IPv4Address]:
    return {task.address for service in services for task in service.tasks}


class FloodLists:
    """What was last set for each network is remembered. For one thread per network."""

    def __init__(self, kernel: Kernel, clock: Callable[[], float]) -> None:
        self._kernel = kernel
        self._clock = clock
        self._done: dict[str, tuple[object, float]] = {}

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

        New peers are told where this host's endpoints are.

        Raises:
            EngineError: `own` is empty, so this host can't be told from its peers.
        """
        # No peers, not even this host: gossip has not begun.
        if not network.overlay or not view.peers:
            return
        if not own:
            raise EngineError(
                "the peers are not set",
                cause="this host's own address among them isn't known yet",
                remedy="check the engine: docker info",
            )
        peers = frozenset(peer.address for peer in view.peers) - frozenset(own)
        # A network's device is made anew with its first endpoint: with other endpoints all is set again.
        wanted = (peers, frozenset(endpoints))
        now = self._clock()
        done = self._done.get(network.id)
        if done is not None and done[0] == wanted and now - done[1] < REPAIR_EVERY:
            return
        added = self._kernel.set_peers(network.id, peers)
        if added:
            log.info("peers added", network=network.id, peers=sorted(map(str, added)))
            self._kernel.announce(network.id, endpoints)
        self._done[network.id] = (wanted, now)

    def announce_tasks(
        self,
        network: Network,
        view: NetworkView,
        known: NetworkView | None,
        endpoints: Collection[Endpoint],
    ) -> None:
        """Announce the endpoints that Docker has made part of a service since `known`: see `hints`."""
        listed = _task_addresses(view.services) - _task_addresses(known.services if known else ())
        ours = [item for item in endpoints if item.ipv4 is not None and item.ipv4.ip in listed]
        if ours:
            self._kernel.announce(network.id, ours)
