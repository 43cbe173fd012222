"""The forwarding database (FDB) of VXLAN devices: the flood list, and addresses that they learned.

An entry of the flood list is 00:00:00:00:00:00 → peer: broadcast, multicast and unknown unicast
frames go to each of them (head-end replication).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from driver.errors import KernelError, reporting
from driver.kernel.netlink import Sockets
from driver.kernel.rtnl import (
    NTF_MASTER,
    NTF_SELF,
    NUD_NOARP,
    NUD_PERMANENT,
    NUD_REACHABLE,
)
from driver.model import IPAddress

_ANY: Final = "00:00:00:00:00:00"

Trusted = Callable[[IPAddress], bool]


def _list(overlay: Sockets, index: int) -> list[tuple[str, IPAddress | None]]:
    with reporting("listing forwarding entries"), overlay.raw() as netlink:
        return netlink.neighbours(index)


def _entries(overlay: Sockets, index: int) -> list[tuple[str, IPAddress]]:
    """MAC address and peer of a VXLAN device's entries."""
    return [(mac, peer) for mac, peer in _list(overlay, index) if peer is not None]


def flood_list(overlay: Sockets, index: int) -> frozenset[IPAddress]:
    """The peers to which a VXLAN device floods. Raises KernelError."""
    return frozenset(peer for mac, peer in _entries(overlay, index) if mac == _ANY)


def learned(overlay: Sockets, index: int) -> dict[str, IPAddress]:
    """MAC address → peer, of the learned entries. Raises KernelError."""
    return {mac: peer for mac, peer in _entries(overlay, index) if mac != _ANY}


def place(overlay: Sockets, port: int, vxlan: int | None, mac: str) -> None:
    """Set that `mac` is behind a port of the bridge now, not behind the VXLAN device.

    A bridge learns from frames that enter through its ports, not from announcements that it sends
    itself. Without this, an entry from the time when the address was on another host would stay
    until the endpoint sends, or for five minutes.

    Raises:
        KernelError: the bridge refuses.
    """
    # Nothing was learned, or the port has gone.
    gone = (errno.ENOENT, errno.ENODEV, errno.EINVAL)
    with reporting(f"setting the FDB entry of {mac}", ignore=gone), overlay.raw() as netlink:
        # Static: a port accepts no other entry before its peer is up. The entry still moves.
        netlink.put_neighbour(port, mac, None, NUD_NOARP, NTF_MASTER)
        if vxlan is not None:
            netlink.drop_neighbour(vxlan, mac, None, NTF_SELF)


def remember(overlay: Sockets, index: int, where: dict[str, IPAddress]) -> None:
    """Restore entries that a VXLAN device and its bridge have forgotten: MAC address → peer.

    With an unspecified peer, only the bridge's entry.

    Raises:
        KernelError: an entry is refused.
    """
    present = _list(overlay, index)
    behind_port = {mac for mac, peer in present if peer is None}
    behind_peer = {mac for mac, peer in present if peer is not None}
    with reporting("setting FDB entries"), overlay.raw() as netlink:
        for mac, peer in where.items():
            # Reachable: the entry ages and moves like a learned one.
            if mac not in behind_port:
                netlink.put_neighbour(index, mac, None, NUD_REACHABLE, NTF_MASTER)
            if mac not in behind_peer and not peer.is_unspecified:
                netlink.put_neighbour(index, mac, peer, NUD_REACHABLE, NTF_SELF)


def set_peers(
    overlay: Sockets, index: int, peers: frozenset[IPAddress], trusted: Trusted = lambda _: False
) -> frozenset[IPAddress]:
    """Make `peers` the flood list, and drop entries learned from other hosts; returns the peers
    added.

    `trusted` tells whether peers may send from another address.

    Raises:
        KernelError: the list can't be read, or an entry can't be changed; all others were changed.
    """
    present = _entries(overlay, index)
    flooded = frozenset(peer for mac, peer in present if mac == _ANY)
    refusals = _drop_strangers(overlay, index, present, peers, trusted)
    with overlay.raw() as netlink:
        for peer in sorted(peers - flooded, key=str):
            try:
                what = f"peer {peer}: adding it to the flood list"
                with reporting(what, ignore=(errno.EEXIST,)):
                    netlink.put_neighbour(index, _ANY, peer, NUD_PERMANENT, NTF_SELF, append=True)
            except KernelError as error:
                refusals.append(error)
    if refusals:
        raise refusals[0]
    return peers - flooded


def move(overlay: Sockets, index: int, moved: dict[IPAddress, IPAddress]) -> None:
    """Have learned entries that lead to an address lead to another one of the same host.

    Raises:
        KernelError: an entry is refused.
    """
    entries = [(mac, peer) for mac, peer in _entries(overlay, index) if mac != _ANY]
    with reporting("moving FDB entries"), overlay.raw() as netlink:
        for mac, peer in entries:
            if peer in moved:
                netlink.put_neighbour(index, mac, moved[peer], NUD_REACHABLE, NTF_SELF)


def drop_strangers(
    overlay: Sockets, index: int, peers: frozenset[IPAddress], trusted: Trusted
) -> None:
    """Drop the entries that lead to hosts that are no peers. See `set_peers`.

    It adds no peer, because only the caller of `set_peers` announces endpoints to new ones.
    """
    refusals = _drop_strangers(overlay, index, _entries(overlay, index), peers, trusted)
    if refusals:
        raise refusals[0]


def _drop_strangers(
    overlay: Sockets,
    index: int,
    present: list[tuple[str, IPAddress]],
    peers: frozenset[IPAddress],
    trusted: Trusted,
) -> list[KernelError]:
    """Returns what was refused."""
    refusals = []
    with overlay.raw() as netlink:
        for mac, peer in present:
            if peer not in peers and (mac == _ANY or not trusted(peer)):
                try:
                    what = f"peer {peer}: removing it from the flood list"
                    with reporting(what, ignore=(errno.ENOENT,)):
                        netlink.drop_neighbour(index, mac, peer, NTF_SELF)
                except KernelError as error:
                    refusals.append(error)
    return refusals
