"""A process's request for a path faster than TCP, while it waits for that of the other end."""

from __future__ import annotations

from dataclasses import dataclass

from dataplane.router.library_wire import Address, Request

Key = tuple[str, Address, Address]
"""Network, local, remote."""


@dataclass(slots=True, eq=False)
class PairRequest:
    """A request whose connection's other end has sent none yet."""

    process: int
    namespace: int
    request: Request
    network: str
    since: float
    ambiguous: bool = False
    is_remote: bool = False
    """Its other end is on another host."""
    server: Address | None = None
    """Where a client's connection to a VIP really leads; None: where its remote address says."""

    @property
    def key(self) -> Key:
        return self.network, self.request.local, self.request.remote

    @property
    def peer(self) -> Address:
        """The address of its other end, as that end knows it."""
        return self.server or self.request.remote
