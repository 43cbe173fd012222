"""The calls that Docker makes, without HTTP: networks and endpoints come, join, leave and go.

Invariants:

- What is promised to Docker is in the store before the answer goes out, and an endpoint is in the store before the
  kernel is touched, so whatever a crash leaves is found again (`recovery.py`).
- Removal is the mirror: kernel first, row last.
- A network's links are made after the row of an endpoint, and removed under the network's lock when it has no row left.
  So two endpoints are made and removed side by side, and the last one that goes never takes the links of a new one.
- Every call may come twice, after any failure, and with its partner missing: Docker repeats a call whose answer got
  lost, and never repeats a teardown.
- No call asks Docker anything: it holds locks while it waits for us.

Locks: one per endpoint, held for the call; within it one per network, held for a look at the store. Neither is held
while another of its kind is taken.

Who the peers are and where VIPs lead is the sync loop's business (`sync.py`), after the answer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address
from typing import Final

import structlog

from driver import allocate, names, options
from driver.errors import Conflict, FreeFlowError, InvalidRequest, NotFound
from driver.locks import KeyedLocks
from driver.model import (
    Endpoint,
    IPAddress,
    IPNetwork,
    LocalContainer,
    Network,
    NetworkView,
    Subnet,
)
from driver.ports import Kernel
from driver.store import Store

log = structlog.get_logger()

# Local networks and endpoints: 64 hex characters; Swarm's networks: 25 of [0-9a-z].
_ID: Final = re.compile(r"[0-9a-f]{64}|[0-9a-z]{25}")
_MAC: Final = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_SELF_ADDRESS: Final = "self_address"
# What the kernel's objects, or other hosts, have from the network while it is in use.
_FIXED_IN_USE: Final = ("vni", "port", "prefix6", "subnets", "overlay", "format")
LOCAL_MTU: Final = 1500
"""Of a network that doesn't leave the host."""


@dataclass(frozen=True, slots=True)
class DriverConfig:
    """The settings that the driver needs. `mtu` None: from the underlay."""

    scope: str = "global"
    port: int = 4799
    mtu: int | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    scope: str
    connectivity_scope: str


@dataclass(frozen=True, slots=True)
class EndpointAddresses:
    """What CreateEndpoint adds to the request: only what it left empty."""

    mac: str | None = None
    ipv6: IPv6Interface | None = None


@dataclass(frozen=True, slots=True)
class JoinResult:
    """The link that Docker moves into the sandbox, and networks that are on it besides its own subnet."""

    src_name: str
    connected_routes: tuple[IPNetwork, ...] = ()
    dst_prefix: str = "eth"


@dataclass(frozen=True, slots=True)
class DriverSnapshot:
    """What is promised at one moment, for status and metrics."""

    networks: tuple[Network, ...]
    endpoints: tuple[Endpoint, ...]
    allocations: tuple[Network, ...]


def _check_id(kind: str, identifier: str) -> str:
    if not _ID.fullmatch(identifier):
        raise InvalidRequest(
            f"{kind} ID {identifier[:80]!r} is neither 64 hexadecimal characters nor a Swarm ID of 25; "
            "the caller is not Docker, or of a version that FreeFlow doesn't know"
        )
    return identifier


class Driver:
    """The driver of one host. Methods are safe from any thread."""

    def __init__(
        self,
        store: Store,
        kernel: Kernel,
        config: DriverConfig,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.store = store
        self.kernel = kernel
        self.config = config
        self._clock = clock
        self._wake: Callable[[], None] = lambda: None
        self._joined: Callable[[Endpoint], None] = lambda endpoint: None
        self._endpoint_locks = KeyedLocks()
        self._network_locks = KeyedLocks()
        self._allocation_lock = threading.Lock()
        self.keep_links = False
        """Set by recovery while the kernel has endpoints that no row names: their network's links must stay."""

    def on_change(self, wake: Callable[[], None], joined: Callable[[Endpoint], None]) -> None:
        """Whom to tell: `wake` after any change, `joined` of an endpoint whose sandbox is about to come."""
        self._wake = wake
        self._joined = joined

    # --- the plugin as a whole

    def capabilities(self) -> Capabilities:
        """Scope decides who allocates; connectivity scope is what makes Docker gossip names and peers."""
        return Capabilities(self.config.scope, self.config.scope)

    def discover_new(self, address: str, is_self: bool) -> None:
        """Docker saw a node join. Only the own address is kept; peers are asked for when needed."""
        try:
            value = ip_address(address)
        except ValueError as error:
            raise InvalidRequest(f"node address {address!r}: {error}") from error
        if is_self:
            self.store.put_fact(_SELF_ADDRESS, str(value))
        self._wake()

    def discover_delete(self, address: str) -> None:
        """Docker saw a node leave."""
        log.debug("node left", address=address)
        self._wake()

    def self_address(self) -> IPAddress | None:
        """This host's address on the underlay, as Docker last told."""
        known = self.store.fact(_SELF_ADDRESS)
        return ip_address(known) if known else None

    def snapshot(self) -> DriverSnapshot:
        """What is promised now."""
        return DriverSnapshot(
            tuple(self.store.networks()),
            tuple(self.store.endpoints()),
            tuple(self.store.allocations()),
        )

    # --- networks, on the Swarm's leader

    def _default_mtu(self) -> int:
        if self.config.mtu is not None:
            return self.config.mtu
        return self.kernel.underlay_mtu() if self._overlay else LOCAL_MTU

    @property
    def _overlay(self) -> bool:
        return self.config.scope == "global"

    def allocate_network(self, network_id: str, generic: Mapping[str, str]) -> dict[str, str]:
        """Choose what all hosts must agree on; asked again after a change of leader, the answer stays.

        Raises:
            InvalidRequest, Conflict: see `allocate.network`.
        """
        _check_id("network", network_id)
        with self._allocation_lock:
            known = self.store.allocation(network_id)
            chosen = self._chosen(network_id, known, generic)
            if chosen != known:
                self.store.put_allocation(chosen)
        log.info("network allocated", network=network_id, vni=chosen.vni, mtu=chosen.mtu)
        return allocate.answer(chosen)

    def free_network(self, network_id: str) -> None:
        """Forget an allocation; unknown is fine, a former leader may have made it."""
        self.store.delete_allocation(_check_id("network", network_id))

    def _chosen(
        self,
        network_id: str,
        known: Network | None,
        generic: Mapping[str, str],
        *,
        subnets: tuple[Subnet, ...] = (),
        ipv6: bool = False,
        internal: bool = False,
    ) -> Network:
        chosen = allocate.network(
            network_id,
            # What was chosen before stays: this may be the repetition of a call whose answer got lost. But what
            # Docker carries wins: on a Swarm it is what all other hosts have.
            {**allocate.choices(known), **generic} if known is not None else generic,
            port=self.config.port,
            default_mtu=self._default_mtu,
            taken=self.store.taken_vnis(),
            subnets=subnets,
            ipv6=ipv6,
            internal=internal,
            overlay=self._overlay,
        )
        return replace(chosen, options=dict(generic))

    # --- networks, on the hosts that use them

    def create_network(
        self,
        network_id: str,
        generic: Mapping[str, str],
        subnets: tuple[Subnet, ...],
        *,
        ipv6: bool = False,
        internal: bool = False,
    ) -> None:
        """Remember a network. Nothing is made in the kernel until it has an endpoint.

        Raises:
            InvalidRequest: see `options.parse`.
            Conflict: the VNI is that of another network in use, or the network is in use with other choices.
        """
        _check_id("network", network_id)
        # Docker asks again after its own restart: an upsert.
        with self._allocation_lock, self._network_locks.hold(names.short(network_id)):
            known = self.store.network(network_id)
            chosen = self._chosen(
                network_id, known, generic, subnets=subnets, ipv6=ipv6, internal=internal
            )
            self._check_clash(chosen)
            if known is not None and known != chosen:
                self._check_change(known, chosen)
            if known != chosen:
                self.store.put_network(chosen)
        log.info("network created", network=network_id, vni=chosen.vni, mtu=chosen.mtu)

    def _check_clash(self, chosen: Network) -> None:
        for other in self.store.networks():
            if other.id == chosen.id:
                continue
            if names.short(other.id) == names.short(chosen.id):
                raise Conflict(
                    f"network {chosen.id}: its first twelve characters are those of network {other.id}; "
                    "remove it and create it again"
                )
            same_device = (other.vni, other.port) == (chosen.vni, chosen.port)
            if same_device and chosen.overlay and other.overlay:
                if self.store.has_endpoints(other.id):
                    raise Conflict(
                        f"network {chosen.id}: VNI {chosen.vni} on UDP port {chosen.port} is in use here by network "
                        f"{other.id}; create it again with another -o vni="
                    )
                # Of a Swarm that this host has left, most likely; collection removes it.
                log.warning("VNI of an unused network taken over", vni=chosen.vni, other=other.id)

    def _check_change(self, known: Network, chosen: Network) -> None:
        changed = [
            name
            for name in ("vni", "port", "prefix6", "subnets", "overlay", "format", "mtu", "ipv6")
            if getattr(known, name) != getattr(chosen, name)
        ]
        fixed = [name for name in changed if name in _FIXED_IN_USE]
        if fixed and self.store.has_endpoints(known.id):
            was = ", ".join(f"{name} {getattr(known, name)}" for name in fixed)
            raise Conflict(
                f"network {known.id} has endpoints on this host with {was}, which can't change under them; "
                "stop its containers here, then try again"
            )
        log.info("network changed", network=known.id, fields=changed)

    def delete_network(self, network_id: str) -> None:
        """Remove a network with what is left of its endpoints; unknown is fine."""
        _check_id("network", network_id)
        for endpoint in self.store.endpoints(network_id):
            # Docker asks only when nobody uses the network: their own removal went past us.
            log.info("stale endpoint removed with its network", endpoint=endpoint.id)
            with self._endpoint_locks.hold(endpoint.id):
                self._discard(network_id, endpoint.id)
        with self._network_locks.hold(names.short(network_id)):
            if self.store.has_endpoints(network_id):
                raise Conflict(
                    f"network {network_id} got a new endpoint while it was removed; stop its containers here first"
                )
            if not self.keep_links:
                self.kernel.remove_network(network_id)
            if self.store.network(network_id) is not None:
                self.store.delete_network(network_id)
        log.info("network deleted", network=network_id)
        self._wake()

    def forget_network(self, network_id: str) -> bool:
        """Forget a network that Docker no longer knows; false if it has endpoints."""
        with self._network_locks.hold(names.short(network_id)):
            if self.store.has_endpoints(network_id):
                return False
            if not self.keep_links:
                self.kernel.remove_network(network_id)
            self.store.delete_network(network_id)
        return True

    # --- endpoints

    def create_endpoint(
        self,
        network_id: str,
        endpoint_id: str,
        *,
        ipv4: IPv4Interface | None,
        ipv6: IPv6Interface | None = None,
        mac: str | None = None,
        driver_options: Mapping[str, object] | None = None,
    ) -> EndpointAddresses:
        """Make an endpoint: addresses, veth pair, filter, and the network's links if it is the first here.

        Returns only what the request left empty.

        Raises:
            NotFound: no such network here.
            Conflict: the endpoint exists with other addresses.
            InvalidRequest: a per-endpoint option, or a MAC address that no host can have.
            KernelError: the kernel refused; nothing is left then.
        """
        _check_id("network", network_id)
        _check_id("endpoint", endpoint_id)
        wanted6 = options.parse_endpoint(driver_options or {})
        self._evict(network_id, endpoint_id, ipv4)
        with self._endpoint_locks.hold(endpoint_id):
            known = self.store.endpoint(endpoint_id)
            with self._network_locks.hold(names.short(network_id)):
                network = self._network(network_id)
                own_ipv6, engine_ipv6 = _ipv6(network, ipv4, ipv6)
                if wanted6 is not None:
                    if ipv6 is not None and not allocate.numbered_by_hosts(network_id):
                        raise InvalidRequest(
                            f"driver-opt {options.IP6}={wanted6}: Docker numbers the IPv6 addresses of this network; "
                            "use --ip6"
                        )
                    own_ipv6 = _wanted_ipv6(network, ipv4, wanted6)
                    engine_ipv6 = None if ipv6 == own_ipv6 else ipv6
                endpoint = Endpoint(
                    id=endpoint_id,
                    network_id=network_id,
                    mac=_unicast(mac) if mac else _derived_mac(endpoint_id, ipv4),
                    ipv4=ipv4,
                    ipv6=own_ipv6,
                    created=self._clock(),
                    engine_ipv6=engine_ipv6,
                )
                if known is None:
                    self._check_short_id(endpoint_id)
                    self.store.put_endpoint(endpoint)
                elif not _same(known, endpoint):
                    raise Conflict(
                        f"endpoint {endpoint_id} exists already with {known.ipv4} {known.mac} on network "
                        f"{known.network_id}; disconnect the container and connect it again"
                    )
                else:
                    endpoint = known
            try:
                self.kernel.attach(network, endpoint)
            except FreeFlowError:
                if known is None:
                    self._roll_back(endpoint)
                raise
        return EndpointAddresses(
            mac=None if mac else endpoint.mac,
            ipv6=None if ipv6 else endpoint.ipv6,
        )

    def _network(self, network_id: str) -> Network:
        network = self.store.network(network_id)
        if network is None:
            # The sync loop asks Docker for what we have lost.
            self._wake()
            raise NotFound(
                f"network {network_id} is not known to FreeFlow on this host; if Docker lists it, it is learned again "
                "within a minute: start the container again then; if that doesn't help, remove the network and "
                "create it anew"
            )
        return network

    def _check_short_id(self, endpoint_id: str) -> None:
        for other in self.store.endpoint_ids(endpoint_id):
            if other != endpoint_id:
                raise Conflict(
                    f"endpoint {endpoint_id}: its first twelve characters are those of endpoint {other}; try again"
                )

    def _evict(self, network_id: str, endpoint_id: str, ipv4: IPv4Interface | None) -> None:
        """Docker gives an address to one endpoint at a time: if another has it here, its end went past us."""
        if ipv4 is None:
            return
        for other in self.store.endpoints_at(network_id, ipv4):
            if other.id != endpoint_id:
                log.info("stale endpoint replaced", endpoint=other.id, address=str(ipv4.ip))
                with self._endpoint_locks.hold(other.id):
                    self._discard(network_id, other.id)

    def _roll_back(self, endpoint: Endpoint) -> None:
        try:
            self._discard(endpoint.network_id, endpoint.id)
        except FreeFlowError as error:
            # The row stays, so that collection finds the rest; what Docker hears is the first failure.
            log.error("roll-back failed", endpoint=endpoint.id, reason=str(error))

    def _discard(self, network_id: str, endpoint_id: str) -> None:
        """Remove an endpoint and, after the last one, the network's links. The caller holds the endpoint's lock."""
        self.kernel.detach(network_id, endpoint_id)
        with self._network_locks.hold(names.short(network_id)):
            if self.store.endpoint(endpoint_id) is not None:
                self.store.delete_endpoint(endpoint_id)
            if not self.keep_links and not self.store.has_endpoints(network_id):
                self.kernel.remove_network(network_id)

    def delete_endpoint(self, network_id: str, endpoint_id: str) -> None:
        """Remove an endpoint; unknown is fine."""
        _check_id("network", network_id)
        _check_id("endpoint", endpoint_id)
        with self._endpoint_locks.hold(endpoint_id):
            endpoint = self.store.endpoint(endpoint_id)
            if endpoint is not None and endpoint.network_id != network_id:
                raise InvalidRequest(
                    f"endpoint {endpoint_id} belongs to network {endpoint.network_id}, not {network_id}"
                )
            self._discard(network_id, endpoint_id)
        self._wake()

    def endpoint_info(self, network_id: str, endpoint_id: str) -> dict[str, str]:
        """Docker ignores what a remote driver says here; it is for people with `curl`."""
        endpoint = self.store.endpoint(_check_id("endpoint", endpoint_id))
        if endpoint is None or endpoint.network_id != network_id:
            return {}
        return {"freeflow.path": "overlay", "freeflow.mac": endpoint.mac}

    def join(self, network_id: str, endpoint_id: str, sandbox_key: str) -> JoinResult:
        """The endpoint's link for its sandbox. Never a gateway: docker_gwbridge does egress and published ports.

        Raises:
            NotFound: no such network or endpoint here.
        """
        _check_id("network", network_id)
        _check_id("endpoint", endpoint_id)
        with self._endpoint_locks.hold(endpoint_id):
            network = self._network(network_id)
            endpoint = self.store.endpoint(endpoint_id)
            if endpoint is None or endpoint.network_id != network_id:
                raise NotFound(
                    f"endpoint {endpoint_id} is not known to FreeFlow on this host; start the container again"
                )
            if endpoint.sandbox_key != sandbox_key:
                endpoint = replace(endpoint, sandbox_key=sandbox_key)
                self.store.put_endpoint(endpoint)
        self._joined(endpoint)
        self._wake()
        return JoinResult(names.container_veth(endpoint_id), _other_subnets(network, endpoint))

    def leave(self, network_id: str, endpoint_id: str) -> None:
        """The container leaves; Docker takes the link back and calls DeleteEndpoint. Unknown is fine."""
        _check_id("network", network_id)
        _check_id("endpoint", endpoint_id)
        with self._endpoint_locks.hold(endpoint_id):
            endpoint = self.store.endpoint(endpoint_id)
            if endpoint is not None and endpoint.sandbox_key is not None:
                self.store.put_endpoint(replace(endpoint, sandbox_key=None))
        self._wake()

    # --- what was lost

    def remove_links(self, short_id: str) -> bool:
        """Remove the links of a network, known or not, that has no endpoints; false if it has some."""
        with self._network_locks.hold(names.short(short_id)):
            if self.store.has_endpoints(short_id):
                return False
            self.kernel.remove_network(short_id)
        return True

    def restore_network(self, view: NetworkView) -> None:
        """Learn a network again from what the engine says of it.

        Raises:
            InvalidRequest, Conflict: see `create_network`.
        """
        self.create_network(
            view.id,
            view.options,
            view.subnets,
            ipv6=view.ipv6,
            internal=view.internal,
        )

    def adopt(self, network_id: str, container: LocalContainer) -> None:
        """Learn an endpoint again whose links live on, and repair them.

        Raises:
            NotFound: no such network here.
            KernelError: the kernel refused; the row stays.
        """
        endpoint_id = _check_id("endpoint", container.endpoint_id)
        with self._endpoint_locks.hold(endpoint_id):
            with self._network_locks.hold(names.short(network_id)):
                network = self._network(network_id)
                if self.store.endpoint(endpoint_id) is not None:
                    return
                own_ipv6, engine_ipv6 = _ipv6(network, container.address, container.ipv6)
                endpoint = Endpoint(
                    id=endpoint_id,
                    network_id=network_id,
                    mac=container.mac or _derived_mac(endpoint_id, container.address),
                    ipv4=container.address,
                    ipv6=own_ipv6,
                    sandbox_key=container.sandbox_key,
                    created=self._clock(),
                    engine_ipv6=engine_ipv6,
                )
                self.store.put_endpoint(endpoint)
            self.kernel.attach(network, endpoint)
        log.info("endpoint adopted", endpoint=endpoint_id, container=container.name)
        self._joined(endpoint)


def _unicast(mac: str) -> str:
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise InvalidRequest(
            f"MAC address {mac!r} is not one that a host can have; for example --mac-address 02:42:0a:00:00:05"
        )
    return mac.lower()


def _derived_mac(endpoint_id: str, ipv4: IPv4Interface | None) -> str:
    return allocate.mac_for_id(endpoint_id) if ipv4 is None else allocate.mac_for(ipv4.ip)


def _derived_ipv6(network: Network, ipv4: IPv4Interface | None) -> IPv6Interface | None:
    if not network.ipv6 or ipv4 is None:
        return None
    address = allocate.ipv6_for(network.prefix6, ipv4.ip)
    return IPv6Interface((address, network.prefix6.prefixlen))


def _ipv6(
    network: Network, ipv4: IPv4Interface | None, asked: IPv6Interface | None
) -> tuple[IPv6Interface | None, IPv6Interface | None]:
    """The endpoint's IPv6 address, and the engine's if that isn't to be used.

    In a Swarm each host's engine takes IPv6 addresses from a subnet of its own, which no other host knows.
    """
    derived = _derived_ipv6(network, ipv4)
    if asked is None:
        return derived, None
    if derived is None or not allocate.numbered_by_hosts(network.id):
        return asked, None
    return (asked, None) if asked.ip in network.prefix6 else (derived, asked)


def _wanted_ipv6(
    network: Network, ipv4: IPv4Interface | None, wanted: IPv6Address
) -> IPv6Interface:
    """What was asked for with the driver-opt ip6. Raises InvalidRequest."""
    prefix = network.prefix6
    example = f"for example driver-opt={options.IP6}={prefix.network_address + (1 << 32) + 5}"
    if not network.ipv6:
        raise InvalidRequest(
            f"driver-opt {options.IP6}={wanted}: network {network.id} has no IPv6; create it with -o ipv6=on"
        )
    if wanted not in prefix:
        raise InvalidRequest(
            f"driver-opt {options.IP6}={wanted}: not in {prefix}, the network's prefix; {example}"
        )
    derived = int(wanted) - int(prefix.network_address)
    if wanted == prefix.network_address or (
        derived < 1 << 32 and (ipv4 is None or derived != int(ipv4.ip))
    ):
        raise InvalidRequest(
            f"driver-opt {options.IP6}={wanted}: belongs to the container with the IPv4 address "
            f"{IPv4Address(derived)}; {example}"
        )
    return IPv6Interface((wanted, prefix.prefixlen))


def _same(known: Endpoint, asked: Endpoint) -> bool:
    return (known.network_id, known.ipv4, known.ipv6, known.mac) == (
        asked.network_id,
        asked.ipv4,
        asked.ipv6,
        asked.mac,
    )


def _other_subnets(network: Network, endpoint: Endpoint) -> tuple[IPNetwork, ...]:
    """Subnets of the network that aren't the endpoint's own: all are on the same link."""
    own = [item.network for item in (endpoint.ipv4, endpoint.ipv6) if item is not None]
    pools: list[IPNetwork] = [
        subnet.pool
        for subnet in network.subnets
        if subnet.pool.prefixlen
        # This host's engine's own choice: nobody has addresses of it.
        and not (
            subnet.pool.version == 6
            and subnet.gateway is None
            and allocate.numbered_by_hosts(network.id)
        )
    ]
    families = {item.version for item in own}
    return tuple(
        dict.fromkeys(pool for pool in pools if pool not in own and pool.version in families)
    )
