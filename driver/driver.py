"""The calls that Docker makes, without HTTP: networks and endpoints are created, joined, left,
deleted.

Invariants:

- What we promise to Docker is in the store before the answer goes out, and an endpoint is in the
  store before the kernel is touched. So recovery finds whatever a crash leaves (`recovery.py`).
- Removal mirrors creation: the kernel first, the row last.
- A network's links are made after an endpoint's row, and removed under the network's lock when the
  network has no row left. So endpoints can be created and deleted concurrently, and the last one
  deleted never removes the links of a new one.
- Every call may come twice, after any failure, and without its counterpart: Docker repeats a call
  whose answer was lost, and never repeats a teardown.
- No call asks Docker anything: Docker holds locks while it waits for us.

Locks: one per endpoint, held for the call; within it one per network, held while the store is read
and written. No thread holds two locks of the same kind.

The sync loop (`sync.py`) finds the peers and the tasks behind a VIP, after the answer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface, IPv6Interface, ip_address
from typing import Final

import structlog

from driver import addressing, allocate, names, options
from driver.errors import Conflict, FreeFlowError, InvalidRequest, NotFound
from driver.locks import KeyedLocks
from driver.model import (
    Endpoint,
    IPAddress,
    IPNetwork,
    LocalContainer,
    Network,
    Subnet,
)
from driver.options import MTU_RANGE
from driver.ports import Kernel
from driver.store import Store

log = structlog.get_logger()

_ID: Final = re.compile(r"[0-9a-f]{64}|[0-9a-z]{25}")
"""Local networks and endpoints: 64 hexadecimal characters; Swarm's networks: 25 of [0-9a-z]."""
_SELF_ADDRESS: Final = "self_address"
_FIXED_IN_USE: Final = ("vni", "port", "prefix6", "subnets", "overlay", "encrypted", "format")
"""Fields on which kernel objects or other hosts rely while the network is in use."""
LOCAL_MTU: Final = 1500
"""MTU of a network that doesn't leave the host."""


@dataclass(frozen=True, slots=True)
class DriverConfig:
    """The settings that the driver needs. `mtu` None: that of the underlay, less the overhead.

    `encrypted`: new networks are, unless their options say otherwise.
    """

    scope: str = "global"
    port: int = 4799
    mtu: int | None = None
    encrypted: bool = False

    @property
    def overlay(self) -> bool:
        """Whether networks have other hosts."""
        return self.scope == "global"


@dataclass(frozen=True, slots=True)
class EndpointAddresses:
    """What CreateEndpoint adds to the request: only addresses that the request left empty."""

    mac: str | None = None
    ipv6: IPv6Interface | None = None


@dataclass(frozen=True, slots=True)
class JoinResult:
    """The link that Docker moves into the sandbox, and subnets on it besides the endpoint's own."""

    src_name: str
    connected_routes: tuple[IPNetwork, ...] = ()
    dst_prefix: str = "eth"


def _check_id(kind: str, identifier: str) -> str:
    if not _ID.fullmatch(identifier):
        raise InvalidRequest(
            f"{kind} ID {identifier[:80]!r}",
            cause="neither 64 hexadecimal characters nor a Swarm ID of 25",
            remedy="the caller is not Docker, or of a version that FreeFlow doesn't know",
        )
    return identifier


def _check_ids(network_id: str, endpoint_id: str) -> None:
    _check_id("network", network_id)
    _check_id("endpoint", endpoint_id)


def self_address(store: Store) -> IPAddress | None:
    """This host's address on the underlay, as Docker last reported it."""
    known = store.fact(_SELF_ADDRESS)
    return ip_address(known) if known else None


class Driver:
    """The driver of one host. Methods are safe from any thread."""

    def __init__(
        self, store: Store, kernel: Kernel, config: DriverConfig, *, clock: Callable[[], float]
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
        """Set by recovery while the kernel has endpoints without a row: no network's links may
        go."""

    def on_change(self, wake: Callable[[], None], joined: Callable[[Endpoint], None]) -> None:
        """Set what to call: `wake` after any change, `joined` for an endpoint that has joined."""
        self._wake = wake
        self._joined = joined

    # --- the plugin as a whole

    def discover_new(self, address: str, is_self: bool) -> None:
        """Docker saw a node join. Only this host's address is kept; the sync loop reads the
        peers."""
        try:
            value = ip_address(address)
        except ValueError as error:
            raise InvalidRequest(
                f"node address {address!r}",
                cause=str(error),
                remedy="the caller is not Docker, or of a version that FreeFlow doesn't know",
            ) from error
        if is_self:
            self.store.put_fact(_SELF_ADDRESS, str(value))
        self._wake()

    def discover_delete(self, address: str) -> None:
        """Docker saw a node leave."""
        log.debug("node left", address=address)
        self._wake()

    def self_address(self) -> IPAddress | None:
        return self_address(self.store)

    # --- networks, on the Swarm's leader

    def _default_mtu(self, encrypted: bool) -> int:
        chosen = self.config.mtu
        if not self.config.overlay:
            return LOCAL_MTU if chosen is None else chosen
        if chosen is not None and not encrypted:
            return chosen
        # The setting knows nothing of encryption, which takes its part of each packet.
        return min(self.kernel.underlay_mtu(encrypted=encrypted), chosen or MTU_RANGE.stop)

    def allocate_network(self, network_id: str, generic: Mapping[str, str]) -> dict[str, str]:
        """Choose what all hosts must agree on. A repeated call, also to a new leader, gets the
        same.

        Raises:
            InvalidRequest, Conflict: see `allocate.network`.
        """
        _check_id("network", network_id)
        with self._allocation_lock:
            known = self.store.allocation(network_id)
            if known is None and self.config.encrypted:
                generic = {options.ENCRYPTED: "true", **generic}
            chosen = self._chosen(network_id, known, generic)
            if chosen != known:
                self.store.put_allocation(chosen)
        log.info("network allocated", network=network_id, vni=chosen.vni, mtu=chosen.mtu)
        return allocate.answer(chosen)

    def free_network(self, network_id: str) -> None:
        """Forget an allocation; one that is unknown here was made by a former leader."""
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
            # An earlier choice stays: this call may repeat one whose answer was lost. But what
            # Docker passes on takes precedence: on a Swarm all other hosts have it.
            {**allocate.choices(known), **generic} if known is not None else generic,
            port=self.config.port,
            default_mtu=self._default_mtu,
            taken=self.store.taken_vnis(),
            subnets=subnets,
            ipv6=ipv6,
            internal=internal,
            overlay=self.config.overlay,
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
        """Store a network. The kernel gets nothing of it before its first endpoint.

        Raises:
            InvalidRequest: see `options.parse`.
            Conflict: another network in use has the VNI, or this one is in use with other choices.
        """
        _check_id("network", network_id)
        # An upsert: Docker repeats the call after its own restart.
        with self._allocation_lock, self._network_locks.hold(names.short(network_id)):
            known = self.store.network(network_id)
            chosen = self._chosen(
                network_id, known, generic, subnets=subnets, ipv6=ipv6, internal=internal
            )
            _check_clash(self.store, chosen)
            if known is not None and known != chosen:
                _check_change(self.store, known, chosen)
            if known != chosen:
                self.store.put_network(chosen)
        log.info("network created", network=network_id, vni=chosen.vni, mtu=chosen.mtu)

    def delete_network(self, network_id: str) -> None:
        """Remove a network with what is left of its endpoints. Unknown networks are ignored."""
        _check_id("network", network_id)
        for endpoint in self.store.endpoints(network_id):
            # Docker deletes only unused networks: the call that deleted this endpoint was lost.
            log.info("stale endpoint removed with its network", endpoint=endpoint.id)
            with self._endpoint_locks.hold(endpoint.id):
                self._discard(network_id, endpoint.id)
        with self._network_locks.hold(names.short(network_id)):
            if self.store.has_endpoints(network_id):
                raise Conflict(
                    f"network {network_id}",
                    cause="it got a new endpoint while it was removed",
                    remedy="stop its containers here first",
                )
            if not self.keep_links:
                self.kernel.remove_network(network_id)
            if self.store.network(network_id) is not None:
                self.store.delete_network(network_id)
        log.info("network deleted", network=network_id)
        self._wake()

    def forget_network(self, network_id: str) -> bool:
        """Forget a network that Docker no longer knows. False: it has endpoints and stays."""
        with self._network_locks.hold(names.short(network_id)):
            if self.store.has_endpoints(network_id):
                return False
            if not self.keep_links:
                self.kernel.remove_network(network_id)
            self.store.delete_network(network_id)
        return True

    def remove_links(self, short_id: str) -> bool:
        """Remove the links of a network, known or not. False: it has endpoints, the links stay."""
        with self._network_locks.hold(short_id):
            if self.store.has_endpoints(short_id):
                return False
            self.kernel.remove_network(short_id)
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
        """Make an endpoint: addresses, veth pair, filter, and the network's links if it is the
        first.

        Raises:
            NotFound: no such network here.
            Conflict: the endpoint exists with other addresses.
            InvalidRequest: a per-endpoint option, or a MAC address that no host can have.
            KernelError: the kernel refused; nothing is left then.
        """
        _check_ids(network_id, endpoint_id)
        chosen6 = options.parse_endpoint(driver_options or {})
        self._evict(network_id, endpoint_id, ipv4)
        with self._endpoint_locks.hold(endpoint_id):
            known = self.store.endpoint(endpoint_id)
            with self._network_locks.hold(names.short(network_id)):
                network = self._network(network_id)
                if chosen6 is None:
                    own6, engine6 = addressing.ipv6(network, ipv4, ipv6)
                else:
                    own6, engine6 = addressing.chosen_ipv6(network, ipv4, ipv6, chosen6)
                endpoint = Endpoint(
                    id=endpoint_id,
                    network_id=network_id,
                    mac=addressing.mac(mac, endpoint_id, ipv4),
                    ipv4=ipv4,
                    ipv6=own6,
                    created=self._clock(),
                    engine_ipv6=engine6,
                )
                endpoint = self._put_endpoint(known, endpoint)
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

    def _put_endpoint(self, known: Endpoint | None, endpoint: Endpoint) -> Endpoint:
        """Store an endpoint, unless an earlier call has; returns the stored one."""
        if known is None:
            _check_short_id(self.store, endpoint.id)
            self.store.put_endpoint(endpoint)
            return endpoint
        if not addressing.same(known, endpoint):
            raise Conflict(
                f"endpoint {endpoint.id}",
                cause=f"it exists already with {known.ipv4} {known.mac} on network "
                f"{known.network_id}",
                remedy="disconnect the container and connect it again",
            )
        return known

    def _network(self, network_id: str) -> Network:
        network = self.store.network(network_id)
        if network is None:
            # The sync loop asks Docker for networks that we have lost.
            self._wake()
            raise NotFound(
                f"network {network_id}",
                cause="not known to FreeFlow on this host",
                remedy="if Docker lists it, it is read again within a minute: start the container "
                "again then, and if that doesn't help, remove the network and create it anew",
            )
        return network

    def _evict(self, network_id: str, endpoint_id: str, ipv4: IPv4Interface | None) -> None:
        """Remove another endpoint with this address: the call that deleted it was lost.

        Docker gives an address to one endpoint at a time.
        """
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
            # The row stays, so that collection finds the rest. Docker gets the first failure.
            log.error("roll-back failed", endpoint=endpoint.id, reason=str(error))

    def _discard(self, network_id: str, endpoint_id: str) -> None:
        """Remove an endpoint and, after the last one, the network's links.

        The caller holds the endpoint's lock.
        """
        self.kernel.detach(network_id, endpoint_id)
        with self._network_locks.hold(names.short(network_id)):
            if self.store.endpoint(endpoint_id) is not None:
                self.store.delete_endpoint(endpoint_id)
            if not self.keep_links and not self.store.has_endpoints(network_id):
                self.kernel.remove_network(network_id)

    def delete_endpoint(self, network_id: str, endpoint_id: str) -> None:
        """Remove an endpoint. Unknown endpoints are ignored."""
        _check_ids(network_id, endpoint_id)
        with self._endpoint_locks.hold(endpoint_id):
            endpoint = self.store.endpoint(endpoint_id)
            if endpoint is not None and endpoint.network_id != network_id:
                raise InvalidRequest(
                    f"endpoint {endpoint_id}",
                    cause=f"it belongs to network {endpoint.network_id}, not {network_id}",
                    remedy="the caller is not Docker, or confuses two networks",
                )
            self._discard(network_id, endpoint_id)
        self._wake()

    def endpoint_info(self, network_id: str, endpoint_id: str) -> dict[str, str]:
        """Details for people with `curl`: Docker ignores what a remote driver returns here."""
        endpoint = self.store.endpoint(_check_id("endpoint", endpoint_id))
        if endpoint is None or endpoint.network_id != network_id:
            return {}
        return {"freeflow.path": "overlay", "freeflow.mac": endpoint.mac}

    def join(self, network_id: str, endpoint_id: str, sandbox_key: str) -> JoinResult:
        """The endpoint's link for its sandbox.

        Never a gateway: docker_gwbridge does egress and published ports.

        Raises:
            NotFound: no such network or endpoint here.
        """
        _check_ids(network_id, endpoint_id)
        with self._endpoint_locks.hold(endpoint_id):
            network = self._network(network_id)
            endpoint = self.store.endpoint(endpoint_id)
            if endpoint is None or endpoint.network_id != network_id:
                raise NotFound(
                    f"endpoint {endpoint_id}",
                    cause="not known to FreeFlow on this host",
                    remedy="start the container again",
                )
            if endpoint.sandbox_key != sandbox_key:
                endpoint = replace(endpoint, sandbox_key=sandbox_key)
                self.store.put_endpoint(endpoint)
        self._joined(endpoint)
        self._wake()
        return JoinResult(
            names.container_veth(endpoint_id), addressing.other_subnets(network, endpoint)
        )

    def leave(self, network_id: str, endpoint_id: str) -> None:
        """The container leaves; Docker takes the link back and calls DeleteEndpoint later."""
        _check_ids(network_id, endpoint_id)
        with self._endpoint_locks.hold(endpoint_id):
            endpoint = self.store.endpoint(endpoint_id)
            if endpoint is not None and endpoint.sandbox_key is not None:
                self.store.put_endpoint(replace(endpoint, sandbox_key=None))
        self._wake()

    # --- what was lost

    def adopt(self, network_id: str, container: LocalContainer) -> None:
        """Store an endpoint again whose links exist, and repair them.

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
                own6, engine6 = addressing.ipv6(network, container.address, container.ipv6)
                endpoint = Endpoint(
                    id=endpoint_id,
                    network_id=network_id,
                    mac=container.mac or addressing.mac(None, endpoint_id, container.address),
                    ipv4=container.address,
                    ipv6=own6,
                    sandbox_key=container.sandbox_key,
                    created=self._clock(),
                    engine_ipv6=engine6,
                )
                self.store.put_endpoint(endpoint)
            self.kernel.attach(network, endpoint)
        log.info("endpoint adopted", endpoint=endpoint_id, container=container.name)
        self._joined(endpoint)


def _check_clash(store: Store, chosen: Network) -> None:
    for other in store.networks():
        if other.id == chosen.id:
            continue
        if names.short(other.id) == names.short(chosen.id):
            raise Conflict(
                f"network {chosen.id}",
                cause=f"its first twelve characters are those of network {other.id}",
                remedy="remove it and create it again",
            )
        same_device = (other.vni, other.port) == (chosen.vni, chosen.port)
        if same_device and chosen.overlay and other.overlay:
            if store.has_endpoints(other.id):
                raise Conflict(
                    f"network {chosen.id}",
                    cause=f"VNI {chosen.vni} on UDP port {chosen.port} is in use here by "
                    f"network {other.id}",
                    remedy="create it again with another -o vni=",
                )
            # Most likely of a Swarm that this host has left; collection removes it.
            log.warning("VNI of an unused network taken over", vni=chosen.vni, other=other.id)


def _check_change(store: Store, known: Network, chosen: Network) -> None:
    changed = [
        name
        for name in (*_FIXED_IN_USE, "mtu", "ipv6")
        if getattr(known, name) != getattr(chosen, name)
    ]
    fixed = [name for name in changed if name in _FIXED_IN_USE]
    if fixed and store.has_endpoints(known.id):
        was = ", ".join(f"{name} {getattr(known, name)}" for name in fixed)
        raise Conflict(
            f"network {known.id}",
            cause=f"it has endpoints on this host with {was}, which can't change while in use",
            remedy="stop its containers here, then try again",
        )
    log.info("network changed", network=known.id, fields=changed)


def _check_short_id(store: Store, endpoint_id: str) -> None:
    for other in store.endpoint_ids(endpoint_id):
        if other != endpoint_id:
            raise Conflict(
                f"endpoint {endpoint_id}",
                cause=f"its first twelve characters are those of endpoint {other}",
                remedy="start the container again",
            )
