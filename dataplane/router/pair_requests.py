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
    message: Request
    network: str
    since: float
    ambiguous: bool = False
    is_remote: bool = False
    """The other end is on another host."""
    server: Address | None = None
    """The task that a client's connection to a VIP leads to; None: it leads to its remote
    address.
    """

    @property
    def key(self) -> Key:
        """By what the request is found."""
        return self.network, self.message.local, self.message.remote

    @property
    def peer(self) -> Address:
        """The other end's own address."""
        return self.server or self.message.remote
