"""The VXLAN device's forwarding entries: the flood list, which is ours, and what it learned, which is the kernel's.

An entry of the flood list is 00:00:00:00:00:00 → peer: frames to unknown or several receivers go to each of them
(head-end replication).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

from pyroute2.netlink import NLM_F_DUMP, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTM_GETNEIGH
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from driver.kernel.netlink import Sockets, translate
from driver.model import IPAddress

_ANY: Final = "00:00:00:00:00:00"
_NTF_SELF: Final = 2
_NTF_MASTER: Final = 4


@dataclass(frozen=True, slots=True)
class Entry:
    """Frames to `mac` go to the host at `peer`."""

    mac: str
    peer: IPAddress


def entries(overlay: Sockets, index: int) -> list[Entry]:
    """All entries of a VXLAN device with a destination."""
    request = ifinfmsg()
    request["family"] = socket.AF_BRIDGE
    # By this form of request, an ifinfomsg, all kernels list one device only.
    request["index"] = index
    messages = overlay.dump(
        lambda route: route.nlm_request(request, RTM_GETNEIGH, msg_flags=NLM_F_REQUEST | NLM_F_DUMP)
    )
    return list(_read(messages, index))


def _read(messages: Iterable[Any], index: int) -> Iterator[Entry]:
    for message in messages:
        mac, peer = message.get_attr("NDA_LLADDR"), message.get_attr("NDA_DST")
        if message["ifindex"] == index and mac and peer:
            yield Entry(str(mac), ip_address(peer))


def flood_list(overlay: Sockets, index: int) -> frozenset[IPAddress]:
    """The peers to which a VXLAN device floods."""
    return frozenset(entry.peer for entry in entries(overlay, index) if entry.mac == _ANY)


def learned(overlay: Sockets, index: int) -> dict[str, IPAddress]:
    """MAC address → peer, as learned."""
    return {entry.mac: entry.peer for entry in entries(overlay, index) if entry.mac != _ANY}


def place(overlay: Sockets, port: int, vxlan: int | None, mac: str) -> None:
    """Say that `mac` is behind a port of the bridge now, not behind the VXLAN device.

    A bridge learns from what comes in by its ports, so not from what is announced through itself: without this, what it
    learned while the address was on another host holds until the endpoint sends, or for five minutes.

    Raises:
        KernelError: the bridge refuses.
    """
    with overlay.take() as route:
        try:
            # Static, since a port takes no other entry before its other end is up; it moves all the same.
            route.fdb("replace", ifindex=port, lladdr=mac, state="noarp", flags=_NTF_MASTER)
            if vxlan is not None:
                route.fdb("del", ifindex=vxlan, lladdr=mac, flags=_NTF_SELF)
        except NetlinkError as error:
            # Nothing was learned; or the port went meanwhile.
            if error.code not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
                raise translate(error, f"telling the bridge where {mac} is") from error


def remember(overlay: Sockets, index: int, where: dict[str, IPAddress]) -> None:
    """Put back what a VXLAN device and its bridge have forgotten: MAC addresses and the peers behind which they are.

    An unspecified peer: the bridge's entry alone.

    Raises:
        KernelError: an entry is refused.
    """
    request = ifinfmsg()
    request["family"] = socket.AF_BRIDGE
    request["index"] = index
    behind_peer: set[str] = set()
    behind_port: set[str] = set()
    for message in overlay.dump(
        lambda route: route.nlm_request(request, RTM_GETNEIGH, msg_flags=NLM_F_REQUEST | NLM_F_DUMP)
    ):
        if message["ifindex"] == index:
            mac = message.get_attr("NDA_LLADDR")
            (behind_peer if message.get_attr("NDA_DST") else behind_port).add(mac)
    with overlay.take() as route:
        for mac, peer in where.items():
            # Reachable: it ages as what was learned does, and moves as that does.
            state: dict[str, Any] = {"lladdr": mac, "state": "reachable"}
            try:
                if mac not in behind_port:
                    route.fdb("replace", ifindex=index, flags=_NTF_MASTER, **state)
                if mac not in behind_peer and not peer.is_unspecified:
                    route.fdb("replace", ifindex=index, dst=str(peer), flags=_NTF_SELF, **state)
            except NetlinkError as error:
                raise translate(error, f"telling the bridge where {mac} is") from error


def flood(overlay: Sockets, index: int, peers: frozenset[IPAddress]) -> frozenset[IPAddress]:
    """Make the flood list exactly `peers`; returns those added.

    Raises:
        KernelError: the list can't be read, or a peer not be added; all others were.
    """
    present = flood_list(overlay, index)
    refused = []
    with overlay.take() as route:
        for action, changed, fine in (
            ("append", peers - present, errno.EEXIST),
            ("del", present - peers, errno.ENOENT),
        ):
            for peer in sorted(changed, key=str):
                try:
                    route.fdb(action, ifindex=index, lladdr=_ANY, dst=str(peer))
                except NetlinkError as error:
                    if error.code != fine:
                        refused.append(translate(error, f"peer {peer}: {action} in the flood list"))
    if refused:
        raise refused[0]
    return peers - present
