"""Bridge and VXLAN device of a network, veth pair of an endpoint: each made by one request, or
repaired.

The VXLAN device is made from the host's namespace in the overlay namespace. Its UDP socket stays in
the host's, so its datagrams take the host's routes, and its frames the overlay namespace's bridge.
That of an encrypted network is made from the encryption namespace, in place of the host's.
"""

from __future__ import annotations

import errno
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from driver import names
from driver.errors import TRY_AGAIN, KernelError
from driver.kernel.namespace import OVERLAY_PIN
from driver.kernel.netlink import Sockets, requesting, translate
from driver.kernel.underlay import Underlay
from driver.model import Endpoint, IPAddress, Network

_UP: Final = 1


def bridge_mac(network_id: str) -> str:
    """A bridge's own MAC address: fixed, since it would change with the ports. Never a sender."""
    digits = f"{int.from_bytes(names.short(network_id).encode(), 'big') & 0xFFFFFFFF:08x}"
    return "06:ff:" + ":".join(digits[i : i + 2] for i in range(0, 8, 2))


def make_bridge(overlay: Sockets, network: Network) -> int:
    """The index of the network's bridge, made if absent."""
    name = names.bridge(network.id)
    index = overlay.index(name)
    if index is None:
        ignore = (errno.EEXIST,)
        with requesting(f"making bridge {name}", ignore=ignore), overlay.take() as route:
            route.link(
                "add",
                ifname=name,
                kind="bridge",
                address=bridge_mac(network.id),
                mtu=network.mtu,
                # One bridge and one VXLAN device per host can't form a loop.
                br_stp_state=0,
                br_forward_delay=0,
                # Flood multicast: an overlay has no querier, without which snooping loses groups.
                br_mcast_snooping=0,
                state="up",
            )
        index = overlay.index(name)
        if index is None:
            raise KernelError(
                f"bridge {name}", cause="it was removed while it was made", remedy=TRY_AGAIN
            )
    else:
        with overlay.take() as route:
            _check_kind(route.link("get", index=index)[0], "bridge")
    return index


def _kind(link: Any) -> str:
    info = link.get_attr("IFLA_LINKINFO")
    return str(info.get_attr("IFLA_INFO_KIND")) if info else "plain"


def _check_kind(link: Any, wanted: str) -> None:
    kind = _kind(link)
    if kind != wanted:
        name = link.get_attr("IFLA_IFNAME")
        raise KernelError(
            f"interface {name} in the overlay namespace",
            cause=f"it is a {kind} device that FreeFlow didn't make, in the place of its {wanted}",
            remedy=f"remove it: nsenter --net=/run/{OVERLAY_PIN} ip link del {name}",
        )


def _vxlan_attributes(network: Network, local: IPAddress | None) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "ifname": names.vxlan(network.id, encrypted=network.encrypted),
        "kind": "vxlan",
        "vxlan_id": network.vni,
        "vxlan_port": network.port,
        "vxlan_learning": 1,
        # RFC 7348, section 5: should be zero. Inner packets have their own checksums.
        "vxlan_udp_csum": 0,
        "mtu": network.mtu,
        "state": "up",
    }
    if network.encrypted:
        # WireGuard authenticates each packet. The route chooses the address.
        attributes |= {"vxlan_local6": "::", "vxlan_udp_zero_csum6_tx": 1}
        attributes["vxlan_udp_zero_csum6_rx"] = 1
    elif local is not None:
        attributes["vxlan_local" if local.version == 4 else "vxlan_local6"] = str(local)
    return attributes


def _is_current(link: Any, network: Network, local: IPAddress | None) -> bool:
    """Whether an existing VXLAN device is the one that would be made now."""
    info = link.get_attr("IFLA_LINKINFO")
    data = info and info.get_attr("IFLA_INFO_DATA")
    if not data:
        return False
    own = data.get_attr("IFLA_VXLAN_LOCAL") or data.get_attr("IFLA_VXLAN_LOCAL6")
    return (
        data.get_attr("IFLA_VXLAN_ID") == network.vni
        and data.get_attr("IFLA_VXLAN_PORT") == network.port
        # Any address is right where our own is not known.
        and (local is None or network.encrypted or own == str(local))
    )


def make_vxlan(
    host: Sockets,
    overlay: Sockets,
    namespace: int,
    network: Network,
    underlay: Underlay,
    bridge: int,
) -> None:
    """Make the network's VXLAN device as a port of its bridge; one with other properties is
    replaced.

    `host`: the namespace where its packets are routed.
    """
    name = names.vxlan(network.id, encrypted=network.encrypted)
    # Of the time when the network was encrypted, or wasn't.
    overlay.delete(names.vxlan(network.id, encrypted=not network.encrypted))
    index = overlay.index(name)
    if index is not None:
        with overlay.take() as route:
            link = route.link("get", index=index)[0]
            if _is_current(link, network, underlay.address):
                _repair_port(route, link, bridge)
                return
        overlay.delete(name)
    with host.take() as route:
        try:
            route.link(
                "add",
                net_ns_fd=namespace,
                master=bridge,
                **_vxlan_attributes(network, underlay.address),
            )
        except NetlinkError as error:
            raise _vxlan_refused(error, host, overlay, network) from error


def _vxlan_refused(
    error: NetlinkError, host: Sockets, overlay: Sockets, network: Network
) -> KernelError:
    if error.code not in (errno.EEXIST, errno.EADDRINUSE):
        return translate(error, f"making the VXLAN device of network {network.id}")
    others = [link for link in host.links() + overlay.links() if link.port == network.port]
    if error.code == errno.EEXIST:
        same = [link.name for link in others if link.vni == network.vni]
        return KernelError(
            f"network {network.id}",
            cause=f"VNI {network.vni} on UDP port {network.port} is taken by another VXLAN device "
            f"of this host, {same[0] if same else 'in a namespace that FreeFlow does not see'}",
            remedy="remove that device, or create the network with another -o vni=",
        )
    user = f"VXLAN device {others[0].name}" if others else "another program (ss -ulpn shows which)"
    return KernelError(
        f"network {network.id}",
        cause=f"UDP port {network.port} is in use on this host by {user}",
        remedy="remove that, or docker plugin set freeflow:latest VXLAN_PORT=PORT on all hosts and "
        "create the network again",
    )


def _repair_port(route: IPRoute, link: Any, bridge: int) -> None:
    if link.get_attr("IFLA_MASTER") != bridge or not link["flags"] & _UP:
        with requesting(f"making {link.get_attr('IFLA_IFNAME')} a port of its bridge"):
            route.link("set", index=link["index"], master=bridge, state="up")


def make_veth(
    host: Sockets,
    overlay: Sockets,
    host_namespace: int,
    network: Network,
    endpoint: Endpoint,
    bridge: int,
) -> bool:
    """Make the endpoint's veth pair: a bridge port that is up, and the other end down in the
    host's.

    Returns false if the pair exists; it is repaired then.
    """
    port, inner = names.host_veth(endpoint.id), names.container_veth(endpoint.id)
    index = overlay.index(port)
    if index is not None:
        with overlay.take() as route:
            link = route.link("get", index=index)[0]
            _check_kind(link, "veth")
            _repair_port(route, link, bridge)
        return False
    # Left of a pair whose other end went with an earlier overlay namespace.
    host.delete(inner)
    peer = {
        "ifname": inner,
        "mtu": network.mtu,
        "address": endpoint.mac,
        "net_ns_fd": host_namespace,
    }
    with requesting(f"making veth pair {port}"), overlay.take() as route:
        route.link(
            "add", ifname=port, kind="veth", mtu=network.mtu, master=bridge, state="up", peer=peer
        )
    return True
