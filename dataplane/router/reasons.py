"""Why a connection runs over TCP: a word for tables and metrics, a sentence for people.

Numbers below `STATUS_ONLY` are those of `enum reason` in `dataplane/library/protocol.h`; a test
compares them. The router works out the others for `freeflow connections`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

STATUS_ONLY: Final = 1000


class Reason(IntEnum):
    """Why a connection is on TCP."""

    NONE = 0
    OFF = 1
    REMOTE = 2
    FOREIGN = 3
    LIMIT = 4
    NOT_FOUND = 5
    RAW = 6
    STDIO = 7
    PASSED = 8
    OPTION = 9
    MEMORY = 11
    CORRUPT = 12
    PEER_CLOSED = 13
    SHARED = 14
    BROKEN = 15
    SANDBOX = 16
    # Worked out by the router; no process notes them.
    SHORT = 1000
    NO_LIBRARY = 1001
    PEER_NO_LIBRARY = 1002
    PEER_SHORT = 1003
    AMBIGUOUS = 1004
    REMOTE_OFF = 1005
    NO_RDMA = 1006
    PEER_NO_RDMA = 1007
    NO_SESSION = 1008
    NO_LINK = 1009
    LEFT = 1010
    UNTRACKED = 1011
    FEW = 1012
    SLOW = 1013
    BULK = 1014
    NO_ENDPOINT = 1015
    INTERCEPTED = 1016
    BALANCED = 1017

    @property
    def word(self) -> str:
        """For tables, metrics and JSON."""
        return self.name.lower().replace("_", "-")

    @property
    def sentence(self) -> str:
        """For people."""
        return _SENTENCES[self]


PASSING: Final = frozenset(
    {
        Reason.REMOTE,
        Reason.LIMIT,
        Reason.MEMORY,
        Reason.NO_RDMA,
        Reason.PEER_NO_RDMA,
        Reason.NO_SESSION,
        Reason.NO_LINK,
        Reason.NO_ENDPOINT,
    }
)
"""Reasons of refusals that may be gone later: the library requests again after a while."""


def told(reason: Reason) -> Reason:
    """What a library is told for a reason: it knows fewer."""
    return reason if reason < STATUS_ONLY else Reason.REMOTE


_SENTENCES: Final = {
    Reason.NONE: "no reason was given",
    Reason.OFF: "acceleration is off for the network or the container",
    Reason.REMOTE: "the peer is on another host",
    Reason.FOREIGN: "an address isn't an endpoint of a freeflow network",
    Reason.LIMIT: "a limit of the container is reached, or of connections to other hosts",
    Reason.NOT_FOUND: "the kernel knows no such connection in the container",
    Reason.RAW: "bytes bypassed the library: io_uring or raw system calls",
    Reason.STDIO: "the C library reads or writes it by itself, or it is a standard stream",
    Reason.PASSED: "it was handed to another process or program",
    Reason.OPTION: "a socket option is set that shared memory can't carry",
    Reason.MEMORY: "the process has no address space, memory or descriptor left",
    Reason.CORRUPT: "the other side wrote invalid data into the shared memory",
    Reason.PEER_CLOSED: "the other end has closed its side",
    Reason.SHARED: "several processes hold this end",
    Reason.BROKEN: "the path to the peer's host was lost, and the connection with it",
    Reason.SANDBOX: "the program confines itself to certain system calls (seccomp)",
    Reason.SHORT: "it is too short or too quiet for an upgrade so far",
    Reason.NO_LIBRARY: "no process of the container runs with the library, or this one doesn't",
    Reason.PEER_NO_LIBRARY: "the peer runs without the library",
    Reason.PEER_SHORT: "the peer hasn't sent a request yet: it has seen too few operations, or stays on TCP",
    Reason.REMOTE_OFF: "the peer is on another host, and faster paths to other hosts are off for the network or this host",
    Reason.NO_RDMA: "the peer is on another host, this host has no RDMA device that can be used, and its relay carries no TCP",
    Reason.PEER_NO_RDMA: "the peer's host has no RDMA device that can be used, or this one has none, and the two relays have no TCP",
    Reason.NO_SESSION: "the peer is on another host, with whose router there is no session",
    Reason.NO_LINK: "the relays of this host and the peer's don't reach each other",
    Reason.LEFT: "it was on a faster path and fell back to TCP: the path was lost or turned off, or a router restarted",
    Reason.UNTRACKED: "connection tracking in the container doesn't say to which task of the service it leads",
    Reason.FEW: "too few connections between the two programs are busy for the relays to be faster",
    Reason.SLOW: "its messages, and those of connections beside it, are too few at a time for the relays to be faster",
    Reason.BULK: "it carries bulk data, which the relays would carry no faster",
    Reason.NO_ENDPOINT: "neither this host nor one with a session has a container with the peer's address on this network",
    Reason.INTERCEPTED: "this host's firewall translates the connection, ends it in a proxy, or doesn't know it",
    Reason.BALANCED: "the network's driver leads it to a task of a service, and doesn't tell to which",
    Reason.AMBIGUOUS: "several connections of the peer fit: one to a task and one to its service's VIP",
}
