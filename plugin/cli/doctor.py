"""`freeflow doctor`: each check is a function from facts to findings."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from pyroute2 import IPRoute

from dataplane.control import PeerFact
from driver import names
from driver.errors import EngineError, FreeFlowError, KernelError
from driver.kernel import guard_rules, nft
from driver.kernel.checksum import internet_checksum
from driver.kernel.mounts import is_shared
from driver.kernel.namespace import OVERLAY_PIN, in_netns, is_namespace, isolated
from driver.kernel.rtnl import NetDevice, Rtnl
from plugin.cli.client import Client, Engine, host_run
from plugin.settings import PLUGIN, RESTART, correction
from plugin.status import FastPathStatus, Finding, Status, without_session

OTHER_OVERLAYS: Final = {
    "weave": "Weave Net",
    "flannel": "flannel",
    "cilium": "Cilium",
    "cali": "Calico",
    "vxlan.calico": "Calico",
    "vxlan_sys_": "Open vSwitch",
}
DEFAULT_PORT: Final = 4799
BAD_ENGINES: Final = re.compile(r"29\.0\.[0-2](\D|$)")


class DoctorReport(msgspec.Struct, frozen=True):
    """`passed`: checks without findings; `notes`: facts that are neither good nor bad."""

    passed: list[str]
    findings: list[Finding]
    notes: list[str] = []


def check_plugin(client: Client, found: dict[str, Status]) -> Iterator[Finding]:
    try:
        found["status"] = client.status()
    except FreeFlowError as error:
        yield Finding.of("error", "the plugin is not running", error)
    else:
        yield from found["status"].problems


def check_run_shared() -> Iterator[Finding]:
    # In process 1's namespace: the command's own mount namespace has no shared mounts.
    if not is_shared(Path("/run"), Path("/proc/1/mountinfo")):
        yield Finding(
            "error",
            "/run is not a shared mount",
            "the overlay namespace would end with the plugin's process, and sandboxes are not visible",
            f"mount --make-rshared /run && {RESTART}",
        )


def check_engine(engine: Engine) -> Iterator[Finding]:
    try:
        version = str(engine.get("/version").get("Version", ""))
    except EngineError as error:
        yield Finding.of("error", "the engine does not answer", error)
        return
    if BAD_ENGINES.match(version):
        yield Finding(
            "warning",
            f"engine {version} has a bug that crashes it with remote network drivers",
            "moby#51554, when an endpoint that is a gateway leaves",
            "upgrade the engine to 29.0.3 or later",
        )


_FEATURES: Final = {
    "nftables with nat and numgen (VIPs)": (
        "add table ip probe\nadd chain ip probe out { type nat hook output priority -100; }\n"
        "add rule ip probe out dnat to numgen inc mod 2 map { 0 : 192.0.2.1, 1 : 192.0.2.2 }\n"
    ),
    "nftables for devices (source filter)": (
        "add table netdev probe\n"
        'add chain netdev probe in { type filter hook ingress device "lo" priority 0; }\n'
        "add rule netdev probe in ether saddr 02:42:c0:00:02:01 ip saddr 192.0.2.1 counter drop\n"
    ),
}
_LINKS: Final[dict[str, dict[str, Any]]] = {
    "bridge": {"kind": "bridge"},
    "veth": {"kind": "veth", "peer": "probe1"},
    "VXLAN": {"kind": "vxlan", "vxlan_id": 1, "vxlan_port": DEFAULT_PORT},
}


def check_kernel() -> list[Finding]:
    """Try each feature in a network namespace that ends with its thread."""
    return isolated(lambda: list(_lacking()))


def _lacking() -> Iterator[Finding]:
    for feature, commands in _FEATURES.items():
        try:
            nft.run(commands)
        except KernelError as error:
            remedy = "load nf_tables: modprobe nf_tables nft_chain_nat"
            yield Finding("error", f"the kernel lacks {feature}", str(error), remedy)
    with IPRoute() as route:
        for feature, attributes in _LINKS.items():
            try:
                route.link("add", ifname="probe0", **attributes)
                route.link("del", index=route.link_lookup(ifname="probe0")[0])
            except Exception as error:
                remedy = f"modprobe {attributes['kind']}, or use a kernel that has it"
                yield Finding("error", f"the kernel lacks {feature}", str(error), remedy)


def links() -> list[NetDevice]:
    """The interfaces of the calling thread's namespace."""
    with contextlib.closing(Rtnl()) as netlink:
        return netlink.links()


def check_clashes(ports: set[int], present: Iterable[NetDevice]) -> Iterator[Finding]:
    """Interfaces of other overlays, and other VXLAN devices on FreeFlow's UDP ports."""
    for link in present:
        other = next(
            (label for start, label in OTHER_OVERLAYS.items() if link.name.startswith(start)), None
        )
        if link.port in ports:
            free = next(port for port in range(DEFAULT_PORT, 1 << 16) if port not in ports)
            yield Finding(
                "error",
                f"VXLAN device {link.name} uses FreeFlow's UDP port {link.port}",
                f"it belongs to {other or 'another program'}",
                f"{correction('VXLAN_PORT', str(free))}, on every host, then recreate the networks",
            )
        elif other is not None:
            yield Finding(
                "warning",
                f"interface {link.name} of {other} is on this host",
                "two overlays can use the same addresses",
                "docker network ls; give FreeFlow networks a --subnet of their own, or remove the other",
            )


def check_port(ports: set[int]) -> Iterator[Finding]:
    """UDP ports that another program holds; `ports` are those without a VXLAN device of ours."""
    for port in sorted(ports):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                yield Finding(
                    "error",
                    f"a program holds FreeFlow's UDP port {port}",
                    "no VXLAN device can be made on it",
                    f"ss -ulpn 'sport = :{port}' shows it; stop it, or set VXLAN_PORT",
                )


def check_firewall(ports: set[int]) -> Iterator[Finding]:
    """An input chain that drops by default and has no rule for our ports."""
    try:
        objects = nft.query("list ruleset")
    except KernelError:
        return
    # The plugin's own table admits peers to the port; it doesn't open the host's firewall.
    objects = [item for item in objects if not guard_rules.own(item)]
    text = str(objects)
    closed = [port for port in sorted(ports) if not re.search(rf"\b{port}\b", text)]
    for chain in (item.get("chain", {}) for item in objects):
        if closed and chain.get("hook") == "input" and chain.get("policy") == "drop":
            table, name = f"{chain.get('family')} {chain.get('table')}", chain.get("name")
            yield Finding(
                "warning",
                f"the firewall may drop UDP port {closed[0]}",
                f"chain {name} of table {table} drops by default and no rule names the port",
                f"nft insert rule {table} {name} udp dport {closed[0]} accept",
            )
            return


def check_encryption(status: Status) -> Iterator[Finding]:
    """UDP ports of other hosts' encryption with which there is no handshake; each of this host's
    devices tries each of theirs every half minute."""
    found = status.encryption
    for peer in found.peers if found is not None else []:
        if peer.silent and peer.data:
            ports = " and ".join(map(str, peer.silent))
            yield Finding(
                "warning",
                f"no handshake on UDP port {ports} of host {peer.name or peer.address}",
                "a firewall drops it: packets pass by the other port, until the key changes",
                f"open UDP ports {found.port if found else 0} and the next one on all hosts "
                "(docs/encryption.md)",
            )


def check_wireguard(status: Status) -> Iterator[Finding]:
    """A kernel without WireGuard, where encrypted networks are wanted."""
    wanted = status.settings.get("ENCRYPTED") == "on" or any(
        network.encrypted for network in status.networks
    )
    if not wanted:
        return

    def make() -> None:
        with IPRoute() as route:
            route.link("add", ifname="probe0", kind="wireguard")

    try:
        isolated(make)
    except Exception as error:
        remedy = "modprobe wireguard, or use a kernel that has it (CONFIG_WIREGUARD)"
        yield Finding("error", "the kernel lacks WireGuard", str(error), remedy)


def encryption_notes(status: Status) -> list[str]:
    """What encrypts the packets to each host of encrypted networks."""
    found = status.encryption
    return [
        f"encryption with host {peer.name or peer.address}: "
        f"control {peer.control or 'no session'}, data {peer.data or peer.reason}"
        for peer in (found.peers if found is not None else [])
    ]


def check_guard(status: Status) -> Iterator[Finding]:
    """Addresses that sent to the overlay's port and belong to no peer."""
    strangers = status.guard.strangers if status.guard is not None else []
    if strangers:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        yield Finding(
            "warning",
            f"frames from {', '.join(strangers[:3])}{more} were dropped",
            "they came to the overlay's UDP port in the last ten minutes, and the Swarm lists no host "
            "at this address that shares a network with this one",
            "if it is a host of this Swarm, set its UNDERLAY to the address that Docker advertises; "
            "otherwise find out whose address it is",
        )


def _passes(address: str, size: int) -> bool:
    """Whether an IPv4 echo request of `size` bytes is answered without fragmentation."""
    payload = b"\0" * (size - 28)
    head = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, 1)
    message = head[:2] + struct.pack("!H", internet_checksum(head + payload)) + head[4:] + payload
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO (ip(7))
        try:
            raw.connect((address, 0))
            raw.send(message)
        except OSError:
            return False
        return bool(select.select([raw], [], [], 1.0)[0])


def check_peers(status: Status, passes: Callable[[str, int], bool] = _passes) -> Iterator[Finding]:
    """Small and full-size packets to each peer on the underlay.

    `passes(address, size)`: whether a packet of `size` bytes reaches the address.
    """
    addresses = {
        peer.address: f"{peer.name} ({peer.address})" if peer.name else peer.address
        for network in status.networks
        for peer in network.peers
        if not peer.own and ":" not in peer.address
    }
    for address, name in sorted(addresses.items()):
        if not passes(address, 64):
            yield Finding(
                "warning",
                f"peer {name} does not answer a ping on the underlay",
                "the host is down or unreachable, or ICMP is filtered",
                f"ping {address}; docker node ls",
            )
        elif status.host.underlay_mtu and not passes(address, status.host.underlay_mtu & ~1):
            yield Finding(
                "error",
                f"packets of {status.host.underlay_mtu} bytes don't reach peer {name}",
                f"a link on the way has a smaller MTU than {status.host.underlay}",
                f"docker plugin set {PLUGIN} MTU=…, with a smaller value, and recreate the networks",
            )


def remote_notes(status: Status) -> list[str]:
    """Which RDMA device is used, or why none is, and the link to each host. A host without a device
    has no problem.
    """
    from plugin.cli.show import rdma_device, relay_state

    router = status.router
    if router is None or router.rdma is None or router.relay is None:
        return []
    notes = [f"rdma: {rdma_device(router.rdma)}"]
    notes += [f"rdma: not {device}" for device in router.rdma.skipped]
    notes.append(f"relay: {relay_state(router.relay)}")
    return notes + [
        f"host {host.name or host.address}: {_link(host)}" for host in router.rdma.hosts
    ]


def _link(host: PeerFact) -> str:
    from plugin.cli.show import transport

    if not host.session:
        return f"no session: {host.reason}"
    if not host.rdma and not host.relay:
        return "it has no RDMA device, and its relay no TCP"
    text = f"link {host.link}"
    if host.transport:
        text += f" over {transport(host)}"
    if host.link_reason:
        text += f": {host.link_reason}"
    return text + (f"; no RDMA: {host.why_not_rdma}" if host.why_not_rdma else "")


def offload_notes(status: Status) -> list[str]:
    """Whether the underlay's device makes bulk data on the overlay cheap."""
    host = status.host
    if host.tunnel_offload is None:
        return []
    if host.tunnel_offload:
        return [f"underlay: {host.underlay} segments UDP tunnels (tx-udp_tnl-segmentation)"]
    return [
        f"underlay: {host.underlay}, or a device below it, doesn't segment UDP tunnels "
        "(tx-udp_tnl-segmentation), so bulk data goes over the relays, where both hosts have them "
        "(docs/relay.md)"
    ]


def service_notes(status: Status) -> list[str]:
    """Services for which Docker's DNS doesn't tell which tasks take connections."""
    return [
        f"service {service.name} on network {network.name or network.id[:12]}: Docker's DNS doesn't "
        f"answer for its {len(service.tasks)} tasks, so tasks get new connections until they have "
        "ended; split the service, or use --endpoint-mode dnsrr (docs/vips.md)"
        for network in status.networks
        for service in network.services
        if service.by_list
    ]


def check_session_port(status: Status, connects: Callable[[str, int], bool]) -> list[Finding]:
    """Whether the routers of hosts that share a network can reach each other.

    `connects(address, port)`: whether a TCP connection can be made.
    """
    router = status.router
    if router is None or router.rdma is None or router.rdma.no_sessions:
        return []
    port = int(status.settings.get("SESSION_PORT") or status.settings.get("VXLAN_PORT") or 0)
    return [
        Finding(
            "warning",
            f"the router of {host.name or host.address} can't be reached on TCP port {port}",
            host.reason or "no connection",
            f"open TCP port {port} between the hosts (docs/relay.md), or set RDMA=off and RELAY=off on both",
        )
        for host in without_session(router)
        if not connects(host.address, port)
    ]


def _connects(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def _fastpath(found: FastPathStatus) -> str:
    why = f" ({found.reason})" if found.reason else ""
    return f"the eBPF fast path: {found.stage or 'off'}{why}"


def check_leftovers(run: Path, status: Status) -> Iterator[Finding]:
    """Veth links of ours without an endpoint."""
    known = {names.short(e.id) for network in status.networks for e in network.endpoints}
    pin = run / OVERLAY_PIN
    present = links() + (in_netns(pin, links) if is_namespace(pin) else [])
    stale = sorted(
        link.name
        for link in present
        if link.name.startswith((names.HOST_VETH, names.CONTAINER_VETH))
        and link.name[3:] not in known
    )
    if stale:
        yield Finding(
            "warning",
            f"{len(stale)} link{'' if len(stale) == 1 else 's'} without an endpoint: {', '.join(stale[:5])}",
            "containers ended while the plugin or the engine was down; they are removed within two minutes",
            "wait, or: freeflow cleanup",
        )


def examine(client: Client) -> DoctorReport:
    """Run all checks."""
    run = host_run()
    found: dict[str, Status] = {}
    passed: list[str] = []
    findings: list[Finding] = []

    def check(what: str, function: Callable[[], Iterable[Finding]]) -> None:
        try:
            result = list(function())
        except Exception as error:
            # A check that fails must not hide the findings of the others.
            cause = f"{type(error).__name__}: {error}"
            result = [Finding("warning", f"not checked: {what}", cause, "freeflow bugreport")]
        findings.extend(result)
        if not result:
            passed.append(what)

    check("the plugin is running and well", lambda: check_plugin(client, found))
    check("the engine answers", lambda: check_engine(client.engine))
    check("/run is a shared mount", check_run_shared)
    check("the kernel has VXLAN, bridge, veth and nftables", check_kernel)
    status = found.get("status")
    if status is None:
        ports = {DEFAULT_PORT}
    else:
        ports = {network.port for network in status.networks}
        ports.add(int(status.settings.get("VXLAN_PORT") or DEFAULT_PORT))
    encrypted = status.encryption if status is not None else None
    udp = ports | ({encrypted.port, encrypted.port + 1} if encrypted is not None else set())
    check("no other overlay conflicts", lambda: check_clashes(ports, links()))
    check("the firewall lets the overlay's packets in", lambda: check_firewall(udp))
    if status is None:
        return DoctorReport(passed, findings)
    held = {network.port for network in status.networks if network.endpoints}
    check("the UDP port is free for VXLAN", lambda: check_port(ports - held))
    check("the kernel can encrypt, where networks are encrypted", lambda: check_wireguard(status))
    check("hosts of encrypted networks answer on both ports", lambda: check_encryption(status))
    check("only peers send to the overlay's port", lambda: check_guard(status))
    check("peers answer packets of full size", lambda: check_peers(status))
    check(
        "routers of other hosts can be reached, where connections can move",
        lambda: check_session_port(status, _connects),
    )
    check("no links are left over", lambda: check_leftovers(run, status))
    if status.fastpath is not None:
        # Shown though it is no problem if the fast path is off or does less.
        passed.append(_fastpath(status.fastpath))
    notes = offload_notes(status) + remote_notes(status) + service_notes(status)
    notes += encryption_notes(status)
    return DoctorReport(passed, findings, notes)
