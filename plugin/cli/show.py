"""`status`, `peers` and `connections` as text.

The first line of a status is the verdict; problems and their remedies come last.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from dataplane.control import Connections, PeerFact, RdmaFacts, RelayFacts, VerbsFacts, VerbsObjects
from plugin.cli.table import amount, table
from plugin.cli.terminal import shown_all
from plugin.status import (
    Finding,
    NetworkStatus,
    OtherNetworkStatus,
    RouterStatus,
    ServiceStatus,
    Status,
    relay_cpu,
)

_SHOWN: Final = 32
"""Limit of the tasks shown for a service; --json has them all."""
_CLIENTS: Final = 8
"""The same of the containers of this host."""


def verdict(status: Status) -> str:
    """One line: whether everything works."""
    endpoints = sum(len(network.endpoints) for network in status.networks)
    scale = f"{_count(len(status.networks), 'network')}, {_count(endpoints, 'endpoint')}"
    errors = sum(problem.severity == "error" for problem in status.problems)
    warnings = len(status.problems) - errors
    if not status.problems:
        return f"FreeFlow {status.version} is well: {scale}"
    counts = [_count(n, word) for n, word in ((errors, "error"), (warnings, "warning")) if n]
    return f"FreeFlow {status.version} has {' and '.join(counts)} (see below): {scale}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _host(status: Status) -> str:
    host = status.host
    role = "manager" if host.manager else "worker"
    swarm = f"Swarm {role}" if host.swarm else "not in a Swarm"
    engine = f"engine {host.engine}" if host.engine else "engine does not answer"
    return (
        f"host {host.hostname} ({swarm}, {engine}, kernel {host.kernel})\n"
        f"underlay {host.underlay or '?'} {host.address} MTU {host.underlay_mtu}\n"
    )


def _parts(status: Status) -> str:
    """Parts that have died since the plugin's start; empty without any."""
    if not status.parts:
        return ""
    said = (
        f"{part.part}{f' {part.name}' if part.name else ''} died {_times(part.deaths)}, "
        f"last {_age(part.ago)} ago"
        for part in status.parts
    )
    return f"since the plugin's start: {'; '.join(said)}\n"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _router(status: Status) -> str:
    router = status.router
    if router is None or not router.up:
        return "router does not answer\n"
    return (
        f"router {_count(router.processes, 'program')} with the library, "
        f"{_count(router.connections, 'connection')} in {amount(router.memory)} of shared memory, "
        f"{router.waiting} waiting for the other end\n"
        f"{_verbs(router.verbs, status.settings.get('VERBS', 'on'))}{_rdma(router.rdma)}{_relay(router.relay)}{_relay_cpu(router)}{_hosts(router.rdma)}"
    )


def _verbs(verbs: VerbsFacts, setting: str) -> str:
    """What uses verbs; empty if nothing does."""
    if setting == "off":
        return "verbs off (VERBS=off)\n"
    if not verbs.processes and not verbs.operations:
        return ""
    refused = sum(verbs.refused.values())
    return (
        f"verbs {_count(verbs.processes, 'program')} with a device, "
        f"{_count(verbs.queue_pairs - verbs.waiting, 'connected queue pair')}, "
        f"{verbs.waiting} waiting for the peer, "
        f"{_count(verbs.operations, 'operation')} of {amount(verbs.bytes)}"
        f"{f', {refused} refused or ended by the peer' if refused else ''}"
        f"{_direct_memory(verbs)}\n"
    )


def _direct_memory(verbs: VerbsFacts) -> str:
    if not verbs.direct_files:
        return ""
    files = _count(verbs.direct_files, "region")
    return f", {amount(verbs.direct_bytes)} of direct memory in {files}"


def rdma_device(rdma: RdmaFacts) -> str:
    """Which device is used, or why none."""
    if not rdma.on:
        return "off (RDMA=off)"
    if not rdma.device:
        return f"not used: {rdma.why}"
    return f"{rdma.device}; {rdma.why}" if rdma.why else rdma.device


def _rdma(rdma: RdmaFacts | None) -> str:
    if rdma is None:
        return ""
    text = f"rdma {rdma_device(rdma)}"
    if rdma.connections or rdma.memory:
        text += f", {_count(rdma.connections, 'connection')} in {amount(rdma.memory)} of its memory"
    return text + "\n"


def relay_state(relay: RelayFacts) -> str:
    """Whether there is TCP between relays, or why not."""
    if not relay.on:
        return "off (RELAY=off)"
    if relay.why:
        return f"not used: {relay.why}"
    return f"on, encrypts {'nothing' if relay.encryption == 'off' else relay.encryption}"


def _relay(relay: RelayFacts | None) -> str:
    if relay is None:
        return ""
    counted = f", {_count(relay.connections, 'connection')}" if relay.connections else ""
    return f"relay {relay_state(relay)}{counted}\n"


def _relay_cpu(router: RouterStatus) -> str:
    """The containers for which the relay has worked most."""
    used = sorted(relay_cpu(router).items(), key=lambda item: -item[1])
    if not used:
        return ""
    most = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in used[:3])
    return f"relay's processor time {sum(seconds for _, seconds in used):.1f} s: {most}\n"


def _hosts(rdma: RdmaFacts | None) -> str:
    """The other hosts, with the transport of each link."""
    if rdma is None:
        return ""
    text = ""
    if rdma.no_sessions and rdma.hosts:
        text = f"no sessions with other hosts: {rdma.no_sessions}\n"
    return text + table(
        ("HOST", "ADDRESS", "SESSION", "RDMA", "LINK", "OVER", "CONNECTIONS", "WHY NOT RDMA"),
        [
            (
                host.name or "-",
                host.address,
                "up" if host.session else host.reason or "-",
                ("yes" if host.rdma else "no") if host.session else "?",
                f"{host.link} ({host.link_reason})" if host.link_reason else host.link,
                transport(host),
                host.connections,
                host.why_not_rdma or "-",
            )
            for host in rdma.hosts
        ],
    )


def transport(host: PeerFact) -> str:
    """The transport of the link to a host, and what is encrypted there."""
    if host.transport != "relay":
        return host.transport or "-"
    words = {"messages": "encrypted but for bulk", "all": "encrypted", "off": "not encrypted"}
    return f"relay, {words.get(host.encryption, 'encryption not known')}"


def _fastpath(status: Status) -> str:
    found = status.fastpath
    if found is None:
        return ""
    why = f"; no higher stage: {found.reason}" if found.reason else ""
    if not found.stage:
        return f"overlay+ebpf off: {found.reason}\n"
    where = f" on {', '.join(found.devices)}" if found.devices else ""
    return f"overlay+ebpf {found.stage}{where}{why}\n"


def _encryption(status: Status) -> str:
    """The hosts of encrypted networks: what encrypts what the routers say to each other, and what
    the containers do."""
    found = status.encryption
    if found is None:
        return ""
    text = (
        f"encryption {found.by}, UDP {found.port} and {found.port + 1}, "
        f"key in use for {_age(found.rotated)}\n"
    )
    return text + table(
        ("HOST", "ADDRESS", "CONTROL", "DATA", "HANDSHAKE", "RECEIVED", "SENT", "WHY NOT"),
        [
            (
                peer.name or "-",
                peer.address,
                peer.control or "no session",
                peer.data or "nothing is sent",
                "never" if peer.handshake is None else f"{_age(peer.handshake)} ago",
                amount(peer.received),
                amount(peer.sent),
                peer.reason or "-",
            )
            for peer in found.peers
        ],
    )


def _network(network: NetworkStatus) -> str:
    facts = [f"VNI {network.vni}", f"UDP {network.port}", f"MTU {network.mtu}", *network.subnets]
    if network.ipv6:
        facts.append(network.prefix6)
    if network.internal:
        facts.append("internal")
    if network.encrypted:
        facts.append("encrypted")
    if not network.acceleration:
        facts.append("acceleration off")
    text = (
        f"network {network.name or '(name not known yet)'}  {network.id[:12]}  {', '.join(facts)}\n"
    )
    text += table(
        ("CONTAINER", "ADDRESS", "IPV6", "PATH", "RECEIVED", "SENT"),
        [
            (
                endpoint.container or endpoint.id[:12],
                endpoint.ipv4.partition("/")[0] or "-",
                endpoint.ipv6.partition("/")[0] or "-",
                network.path if endpoint.joined else "not joined",
                amount(endpoint.rx_bytes),
                amount(endpoint.tx_bytes),
            )
            for endpoint in network.endpoints
        ],
    )
    others = [peer for peer in network.peers if not peer.own]
    if others:
        text += (
            "  peers: " + ", ".join(f"{peer.name} {peer.address}".strip() for peer in others) + "\n"
        )
    text += table(
        ("SERVICE", "VIP", "FROM THIS HOST", "TASKS"),
        [
            (service.name, service.vip or "dnsrr", _from_here(service), _tasks(service.tasks))
            for service in network.services
        ],
    )
    return text


def _other_network(network: OtherNetworkStatus) -> str:
    what = f"network {network.name}  {network.id[:12]}  {network.driver}"
    if network.reason:
        return f"{what}: not accelerated, {network.reason}\n"
    rows = [(name, ", ".join(addresses)) for name, addresses in network.containers.items()]
    where = "within and between hosts" if network.between_hosts else "within this host"
    head = f"{what}, {', '.join(network.subnets)}, accelerated {where}\n"
    return head + table(("CONTAINER", "ADDRESSES"), rows)


def _tasks(tasks: list[str]) -> str:
    rest = f" and {len(tasks) - _SHOWN} more" if len(tasks) > _SHOWN else ""
    return (", ".join(tasks[:_SHOWN]) or "none") + rest


def _from_here(service: ServiceStatus) -> str:
    """Which tasks a container of this host gets, and why."""
    if not service.vip or not service.tasks:
        return "-"
    if service.balance == "source":
        pairs = [f"{name} gets {task}" for name, task in service.clients.items()]
        rest = f" and {len(pairs) - _CLIENTS} more" if len(pairs) > _CLIENTS else ""
        text = (", ".join(pairs[:_CLIENTS]) or "one task for each container") + rest
    else:
        every = service.balance == "even" or service.here == service.tasks
        text = "all" if every else _tasks(service.here)
    return f"{text} ({service.balance}{f': {service.why}' if service.why else ''})"


def findings(problems: Iterable[Finding]) -> str:
    """Problems, each with its cause and remedy."""
    return "".join(
        f"{problem.severity}: {problem.what}\n    cause: {problem.cause}\n    do:    {problem.remedy}\n"
        for problem in map(shown_all, problems)
    )


def show_status(status: Status) -> str:
    """The whole page."""
    status = shown_all(status)
    head = _host(status) + _router(status) + _fastpath(status) + _encryption(status)
    head += _parts(status)
    parts = [verdict(status) + "\n", head]
    parts += [_network(network) + _paths(status, network.id) for network in status.networks]
    if not status.networks:
        parts.append(
            "no networks on this host; docker network create -d freeflow:latest --attachable NAME\n"
        )
    parts += [
        _other_network(network) + _paths(status, network.id, network.driver)
        for network in status.other_networks
    ]
    if status.problems:
        parts.append(findings(status.problems))
    return "\n".join(parts)


def _paths(status: Status, network: str, kind: str = "overlay") -> str:
    """A network's connections by path; empty if there are none, or the router doesn't answer."""
    router = status.router
    counts = [entry for entry in router.paths if entry.network == network] if router else []
    if not counts:
        return ""
    fast = {
        path: sum(entry.count for entry in counts if entry.path == path)
        for path in ("shm", "rdma", "relay", "overlay+ebpf")
    }
    slower = [entry for entry in counts if entry.path not in fast]
    others = [entry for entry in counts if entry.path not in ("shm", "rdma", "relay")]
    parts = [f"{count} on {path}" for path, count in fast.items() if count or path == "shm"]
    parts.append(f"{sum(entry.count for entry in slower)} on {kind}")
    text = f"  connections: {', '.join(parts)}"
    if others:
        text += f" ({', '.join(f'{entry.reason} {entry.count}' for entry in others)})"
    return text + "\n"


def show_connections(found: Connections) -> str:
    """All connections, then an explanation of the reasons' words."""
    found = shown_all(found)
    if not found.connections:
        return "no connections: no container on an accelerated network of this host has one\n"
    encrypted = any(connection.encryption for connection in found.connections)
    text = table(
        (
            *("CONTAINER", "LOCAL", "REMOTE", "PATH"),
            *(("ENCRYPTED BY",) if encrypted else ()),
            "WHY",
        ),
        [
            (
                connection.container,
                connection.local,
                connection.remote,
                connection.path,
                *((connection.encryption,) if encrypted else ()),
                connection.reason or "",
            )
            for connection in sorted(
                found.connections,
                key=lambda connection: (connection.container, connection.local, connection.remote),
            )
        ],
        indent="",
    )
    if found.reasons:
        text += "\n" + table(("WHY", "MEANS"), sorted(found.reasons.items()), indent="")
    return text


def show_verbs(found: VerbsObjects) -> str:
    """All devices and queue pairs of verbs, then an explanation of the reasons' words."""
    found = shown_all(found)
    if not found.devices:
        return "no devices: no program in a container on a FreeFlow network uses RDMA verbs\n"
    text = table(
        ("CONTAINER", "PID", "GIDS", "QUEUE PAIRS"),
        sorted(
            (device.container, str(device.pid), ", ".join(device.gids), str(device.queue_pairs))
            for device in found.devices
        ),
        indent="",
    )
    if found.queue_pairs:
        direct = any(each.direct for each in found.queue_pairs)
        text += "\n" + table(
            (
                *("CONTAINER", "TYPE", "LOCAL", "REMOTE", "PATH"),
                *(("DIRECT",) if direct else ()),
                *("WHY", "OPERATIONS", "BYTES"),
            ),
            [
                (
                    each.container,
                    each.type,
                    f"{each.local} {each.qpn:#x}",
                    f"{each.peer} {each.peer_qpn:#x}",
                    each.path or "-",
                    *((each.direct,) if direct else ()),
                    each.reason or "",
                    str(each.operations),
                    amount(each.bytes),
                )
                for each in sorted(
                    found.queue_pairs, key=lambda each: (each.container, each.local, each.qpn)
                )
            ],
            indent="",
        )
    if found.reasons:
        text += "\n" + table(("WHY", "MEANS"), sorted(found.reasons.items()), indent="")
    return text


def show_peers(status: Status) -> str:
    """All peers, with the networks that they share with this host."""
    status = shown_all(status)
    shared: dict[tuple[str, str], list[str]] = {}
    for network in status.networks:
        for peer in network.peers:
            if not peer.own:
                shared.setdefault((peer.name, peer.address), []).append(
                    network.name or network.id[:12]
                )
    if not shared:
        return "no peers: no other host has a container on a network of this host\n"
    return table(
        ("HOST", "ADDRESS", "NETWORKS"),
        [
            (name or "-", address, ", ".join(networks))
            for (name, address), networks in sorted(shared.items())
        ],
        indent="",
    )
