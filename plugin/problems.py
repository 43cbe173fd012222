"""What is wrong on this host: functions from facts to findings; no finding means no problem.

Each finding has a row in docs/troubleshooting.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from dataplane.control import OWNED
from driver.errors import FreeFlowError, KernelError, SettingError
from driver.kernel.encryption_namespace import encrypted_overhead
from driver.kernel.fastpath import Stage
from driver.kernel.guard import Guarded
from driver.kernel.underlay import Underlay
from plugin.deaths import OFTEN, RECENT, ROUTER, THREAD, WORKER
from plugin.settings import Settings, correction
from plugin.status import EncryptionStatus, Finding, NetworkStatus, OtherNetworkStatus, PartStatus

STALE: Final = 10.0
"""Seconds after which a network that can't be synced is a problem, not a hiccup."""
_EFFECTS: Final = {
    WORKER: "Docker's calls wait for the next one, and the router is started again",
    ROUTER: "no connection is accelerated until the next one is up",
}


def dead_parts(deaths: Iterable[PartStatus]) -> Iterator[Finding]:
    """Workers and routers that died lately, and threads that have ended."""
    for died in deaths:
        last = f"the last time {died.ago:.0f} s ago"
        if died.part == THREAD:
            # A thread isn't started again, so its end stays a problem.
            yield Finding(
                "error",
                f"the plugin's thread {died.name} has ended by an error",
                f"a bug, {last}; the log has it (journalctl -u docker)",
                "freeflow bugreport; then docker plugin disable -f and enable",
            )
        elif died.recent:
            times = "once" if died.recent == 1 else f"{died.recent} times"
            yield Finding(
                "error" if died.recent >= OFTEN else "warning",
                f"the plugin's {died.part} died {times} in the last {RECENT / 60:.0f} minutes",
                f"{last}; {_EFFECTS[died.part]}",
                "journalctl -u docker has the reason; freeflow bugreport collects it",
            )


def bugs(count: int) -> Iterator[Finding]:
    """Bugs that the router that runs has survived."""
    if count:
        times = "one bug" if count == 1 else f"{count} bugs"
        yield Finding(
            "warning",
            f"the router has survived {times}",
            "what it was about to do then was not done; connections may stay on TCP for that",
            "journalctl -u docker has each bug; freeflow bugreport collects them",
        )


def start(
    bad_settings: Iterable[SettingError], failures: Iterable[FreeFlowError]
) -> Iterator[Finding]:
    """Bad settings, and what failed at the plugin's start."""
    for bad in bad_settings:
        yield Finding.of("error", "all changes are refused", bad)
    for failure in failures:
        yield Finding.of("error", "FreeFlow could not recover at start", failure)


def underlay(
    found: Underlay | FreeFlowError, settings: Settings, networks: Iterable[NetworkStatus]
) -> Iterator[Finding]:
    """No underlay, or one that is too small for a network's packets."""
    if isinstance(found, FreeFlowError):
        yield Finding.of("error", "there is no underlay", found)
        return
    if settings.scope != "global":
        # Networks of one host alone don't use it.
        return
    for network in networks:
        taken = encrypted_overhead(found) if network.encrypted else found.overhead
        most = found.mtu - taken
        if network.endpoints and network.mtu > most:
            yield Finding(
                "error",
                f"network {_name(network)}: its MTU of {network.mtu} doesn't fit the underlay",
                f"{found.device} carries packets of {found.mtu} bytes, of which {taken} "
                "are overhead",
                f"recreate it with -o mtu={most}, or raise the MTU of {found.device}",
            )


def engine(error: str | None) -> Iterator[Finding]:
    if error:
        yield Finding(
            "warning",
            "the engine does not answer; peers and VIPs stay as they were",
            error,
            "systemctl status docker",
        )


def encryption(found: EncryptionStatus | None) -> Iterator[Finding]:
    """Hosts that share an encrypted network and to which nothing can be sent."""
    if found is None:
        return
    if found.error:
        yield Finding(
            "error",
            "encrypted networks: keys or peers are not up to date",
            found.error,
            "freeflow doctor",
        )
    for peer in found.peers:
        if not peer.data:
            yield Finding(
                "warning",
                f"encrypted networks: nothing is sent to host {peer.name or peer.address}",
                peer.reason,
                f"open UDP ports {found.port} and {found.port + 1}, and the session port, between "
                "the hosts, and run this version on both; freeflow status there says more",
            )


def stale_networks(networks: Iterable[NetworkStatus]) -> Iterator[Finding]:
    """Networks in use whose peers and services could not be read for a while."""
    for network in networks:
        late = network.synced is None or network.synced > STALE
        if network.error and network.endpoints and late:
            yield Finding(
                "warning",
                f"network {_name(network)}: peers and VIPs stay as they were",
                network.error,
                f"docker network inspect {_name(network)}; freeflow doctor",
            )


def other_networks(networks: Iterable[OtherNetworkStatus]) -> Iterator[Finding]:
    """Networks of other drivers whose label asks for what they can't have."""
    for network in networks:
        if network.reason:
            yield Finding(
                "warning",
                f"network {network.name} asks for acceleration in vain",
                network.reason,
                "make it anew without the label freeflow.accelerate, or without that reason",
            )


def spoofed_frames(networks: Iterable[NetworkStatus]) -> Iterator[Finding]:
    """Containers whose frames were dropped by the source filter."""
    for endpoint in (endpoint for network in networks for endpoint in network.endpoints):
        if endpoint.spoofed:
            sender = endpoint.container or endpoint.id[:12]
            yield Finding(
                "warning",
                f"{sender} sent {endpoint.spoofed} frames that were dropped",
                "their source address was not the container's own",
                "see docs/troubleshooting.md; "
                f"restart {endpoint.container or 'the container'} if it is compromised",
            )


def vips(errors: Mapping[Path, KernelError], containers: Mapping[Path, str]) -> Iterator[Finding]:
    """Sandboxes whose VIP rules could not be written; `containers` are their names."""
    for sandbox, error in errors.items():
        if sandbox in containers:
            yield Finding.of("error", f"VIPs of {containers[sandbox]} could not be written", error)


def scope(settings: Settings, networks: Iterable[NetworkStatus]) -> Iterator[Finding]:
    if settings.scope == "local" and any(network.peers for network in networks):
        yield Finding(
            "warning",
            "SCOPE=local on a host of a Swarm",
            "networks of this scope reach no other host",
            correction("SCOPE", "global"),
        )


def open_port(guarded: Guarded) -> Iterator[Finding]:
    """The overlay's port is open to everybody, and has been for a while."""
    if guarded.reason and guarded.seconds >= STALE:
        yield Finding(
            "warning",
            "the overlay's UDP port takes frames from anybody",
            guarded.reason,
            "nft list table inet freeflow_guard; freeflow doctor",
        )


def full_tables(stage: Stage) -> Iterator[Finding]:
    """Tables of the fast path that are full."""
    for what in stage.full:
        yield Finding(
            "warning",
            "a table of the fast path is full",
            f"{what}; the rest takes the kernel path",
            "fewer networks or hosts, or EBPF=off on this host",
        )


def unannounced_addresses(
    settings: Settings, networks: Iterable[NetworkStatus]
) -> Iterator[Finding]:
    """Addresses that don't fit into the message to other hosts' routers."""
    addresses = sum(
        bool(endpoint.ipv4) + bool(endpoint.ipv6)
        for network in networks
        for endpoint in network.endpoints
        if any(not peer.own for peer in network.peers)
    )
    faster = "on" in (settings.rdma, settings.relay) and settings.acceleration == "on"
    if addresses > OWNED and faster:
        yield Finding(
            "warning",
            f"other hosts are told of {OWNED} of this host's {addresses} addresses",
            "connections to the others stay on the overlay, where RDMA or the relays would take them",
            "fewer containers on this host, or RDMA=off and RELAY=off",
        )


def _name(network: NetworkStatus) -> str:
    return network.name or network.id
