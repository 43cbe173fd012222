"""What the registry of one host's connections needs of those to other hosts. `remote.py` has it; without it there are none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from dataplane.router.reasons import Reason

if TYPE_CHECKING:
    from dataplane.router.arenas import Arena
    from dataplane.router.knowledge import Network
    from dataplane.router.pair_requests import PairRequest

RELAY: Final = 0
"""The relay in place of a container's namespace: no namespace has this inode."""


class Away(Protocol):
    """Ends of connections whose other end is on another host."""

    def why_not(self, network: Network) -> Reason | None:
        """Why no connection of a network can get a path to another host; None: some may."""

    def wait(self, waiting: PairRequest, network: Network) -> None:
        """An ask waits for an end on another host. It is granted or refused at any time from now on, also at once."""

    def forgotten(self, waiting: PairRequest) -> None:
        """It doesn't wait any more: its process has taken it back, or has ended."""

    def released(self, connection: int) -> None:
        """No process of this host has the end any more."""

    def orphaned(self, connection: int) -> None:
        """The process has hung up; what shares its socket may still use it."""

    def part(self, connection: int) -> None:
        """It is to go on over TCP."""

    def bell(self, arena: int, index: int, descriptor: int) -> None:
        """A process has a bell that is to be rung when something comes."""

    def opened(self, arena: Arena, bell: int) -> None:
        """A new arena, and the end of its relay's bell that hears, which is the callee's from now on."""

    def closed(self, arena: Arena) -> None:
        """Nothing is in it any more."""


class Nowhere:
    """There are no other hosts."""

    def why_not(self, network: Network) -> Reason | None:
        """See `Away`."""
        return Reason.REMOTE

    def wait(self, waiting: PairRequest, network: Network) -> None:
        """See `Away`."""

    def forgotten(self, waiting: PairRequest) -> None:
        """See `Away`."""

    def released(self, connection: int) -> None:
        """See `Away`."""

    def orphaned(self, connection: int) -> None:
        """See `Away`."""

    def part(self, connection: int) -> None:
        """See `Away`."""

    def bell(self, arena: int, index: int, descriptor: int) -> None:
        """See `Away`."""

    def opened(self, arena: Arena, bell: int) -> None:
        """See `Away`."""

    def closed(self, arena: Arena) -> None:
        """See `Away`."""
