"""The forwarding database (FDB) of VXLAN devices: the flood list, and addresses that they learned.

An entry of the flood list is 00:00:00:00:00:00 → peer: broadcast, multicast and unknown unicast
frames go to each of them (head-end replication).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from driver.kernel.netlink import Sockets
from driver.kernel.rtnl import (
    NTF_MASTER,
    NTF_SELF,
    NUD_NOARP,
    NUD_PERMANENT,
    NUD_REACHABLE,
    Neighbour,
    refused,
)
from driver.model import IPAddress

_ANY: Final = "00:00:00:00:00:00"

Trusted = Callable[[IPAddress], bool]


def trust_none(address: IPAddress) -> bool:
    """Trusts no address but the peers' own."""
    del address
    return False


@dataclass(frozen=True, slots=True)
class Entry:
    """Frames to `mac` go to the host at `peer`."""

    mac: str
    peer: IPAddress


def entries(overlay: Sockets, index: int) -> list[Entry]:
    """The entries of a VXLAN device that have a destination.

    Raises:
        KernelError: they can't be listed.
    """
    return [Entry(item.mac, item.peer) for item in _list(overlay, index) if item.peer is not None]


def _list(overlay: Sockets, index: int) -> list[Neighbour]:
    try:
        with overlay.raw() as netlink:
            return netlink.neighbours(index)
    except OSError as error:
        raise refused(error, "listing forwarding entries") from error


def flood_list(overlay: Sockets, index: int) -> frozenset[IPAddress]:
    """The peers to which a VXLAN device floods."""
    return frozenset(entry.peer for entry in entries(overlay, index) if entry.mac == _ANY)


def learned(overlay: Sockets, index: int) -> dict[str, IPAddress]:
    """MAC address → peer, of the learned entries."""
    return {entry.mac: entry.peer for entry in entries(overlay, index) if entry.mac != _ANY}


def place(overlay: Sockets, port: int, vxlan: int | None, mac: str) -> None:
    """Set that `mac` is behind a port of the bridge now, not behind the VXLAN device.

    A bridge learns from frames that enter through its ports, not from announcements that it sends
    itself. Without this, an entry from the time when the address was on another host would stay
    until the endpoint sends, or for five minutes.

    Raises:
        KernelError: the bridge refuses.
    """
    try:
        with overlay.raw() as netlink:
            # Static: a port accepts no other entry before its peer is up. The entry still moves.
            netlink.put_neighbour(port, mac, None, NUD_NOARP, NTF_MASTER)
            if vxlan is not None:
                netlink.drop_neighbour(vxlan, mac, None, NTF_SELF)
    except OSError as error:
        # Nothing was learned, or the port has gone.
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
            raise refused(error, f"setting the FDB entry of {mac}") from error


def remember(overlay: Sockets, index: int, where: dict[str, IPAddress]) -> None:
    """Restore entries that a VXLAN device and its bridge have forgotten: MAC address → peer.

    With an unspecified peer, only the bridge's entry.

    Raises:
        KernelError: an entry is refused.
    """
    behind_peer: set[str] = set()
    behind_port: set[str] = set()
    for entry in _list(overlay, index):
        (behind_port if entry.peer is None else behind_peer).add(entry.mac)
    with overlay.raw() as netlink:
        for mac, peer in where.items():
            try:
                # Reachable: the entry ages and moves like a learned one.
                if mac not in behind_port:
                    netlink.put_neighbour(index, mac, None, NUD_REACHABLE, NTF_MASTER)
                if mac not in behind_peer and not peer.is_unspecified:
                    netlink.put_neighbour(index, mac, peer, NUD_REACHABLE, NTF_SELF)
            except OSError as error:
                raise refused(error, f"setting the FDB entry of {mac}") from error


def set_peers(
    overlay: Sockets, index: int, peers: frozenset[IPAddress], trusted: Trusted = trust_none
) -> frozenset[IPAddress]:
    """Make `peers` the flood list, and drop entries learned from other hosts; returns the peers
    added.

    `trusted` tells whether peers may send from another address.

    Raises:
        KernelError: the list can't be read, or an entry can't be changed; all others were changed.
    """
    present = entries(overlay, index)
    flooded = frozenset(entry.peer for entry in present if entry.mac == _ANY)
    refusals = []
    with overlay.raw() as netlink:
        for entry in present:
            wrong = entry.peer not in peers
            if wrong and (entry.mac == _ANY or not trusted(entry.peer)):
                try:
                    netlink.drop_neighbour(index, entry.mac, entry.peer, NTF_SELF)
                except OSError as error:
                    if error.errno != errno.ENOENT:
                        refusals.append(
                            refused(error, f"peer {entry.peer}: removing it from the flood list")
                        )
        for peer in sorted(peers - flooded, key=str):
            try:
                netlink.put_neighbour(index, _ANY, peer, NUD_PERMANENT, NTF_SELF, append=True)
            except OSError as error:
                if error.errno != errno.EEXIST:
                    refusals.append(refused(error, f"peer {peer}: adding it to the flood list"))
    if refusals:
        raise refusals[0]
    return peers - flooded
