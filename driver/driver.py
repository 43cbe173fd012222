"""The calls that Docker makes, without HTTP: networks and endpoints come, join, leave and go.

Invariants:

- What is promised to Docker is in the store before the answer goes out, and an endpoint is in the store before the
  kernel is touched, so whatever a crash leaves is found again (`recovery.py`).
- Every call may come twice, after any failure, and with its partner missing: Docker repeats a call whose answer got
  lost, and never repeats a teardown.
- No call asks Docker anything: it holds locks while it waits for us.

Who the peers are and where VIPs lead is the sync loop's business (`sync.py`), after the answer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface, IPv6Interface, IPv6Network, ip_address
from typing import Final

import structlog

from driver import allocate, names, options
from driver.errors import Conflict, InvalidRequest, NotFound
from driver.model import Endpoint, IPAddress, IPNetwork, Network, Subnet
from driver.ports import Kernel
from driver.store import Store

log = structlog.get_logger()

# Local networks and endpoints: 64 hex characters; Swarm's networks: 25 of [0-9a-z].
_ID: Final = re.compile(r"[0-9a-f]{64}|[0-9a-z]{25}")
_SELF_ADDRESS: Final = "self_address"


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


class _Locks:
    """One lock per network, kept while somebody holds or waits for it."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.RLock, int]] = {}

    @contextmanager
    def hold(self, key: str) -> Iterator[None]:
        with self._guard:
            lock, users = self._locks.get(key, (threading.RLock(), 0))
            self._locks[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks[key]
                if users == 1:
                    del self._locks[key]
                else:
                    self._locks[key] = (lock, users - 1)


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
        self._locks = _Locks()
        self._allocation_lock = threading.Lock()

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
        self._wake()

    def self_address(self) -> IPAddress | None:
        """This host's address on the underlay, as Docker last told."""
        known = self.store.fact(_SELF_ADDRESS)
        return ip_address(known) if known else None

    # --- networks, on the Swarm's leader

    def _default_mtu(self) -> int:
        return self.config.mtu or self.kernel.underlay_mtu()

    def allocate_network(self, network_id: str, generic: Mapping[str, str]) -> dict[str, str]:
        """Choose what all hosts must agree on; asked again after a change of leader, the answer stays.

        Raises:
            InvalidRequest, Conflict: see `allocate.network`.
        """
        _check_id("network", network_id)
        with self._allocation_lock:
            known = self.store.allocation(network_id)
            if known is not None:
                # What was answered before wins: this may be the repetition of a call whose answer got lost.
                generic = {**allocate.answer(known), **generic}
            chosen = allocate.network(
                network_id,
                generic,
                port=self.config.port,
                default_mtu=self._default_mtu,
                taken=self.store.taken_vnis(),
            )
            self.store.put_allocation(chosen)
        return allocate.answer(chosen)

    def free_network(self, network_id: str) -> None:
        """Forget an allocation; unknown is fine, a former leader may have made it."""
        self.store.delete_allocation(_check_id("network", network_id))

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
            InvalidRequest, Conflict: see `allocate.network`.
        """
        _check_id("network", network_id)
        with self._allocation_lock, self._locks.hold(network_id):
            known = self.store.network(network_id)
            if known is not None:
                # Docker asks again after a daemon restart: what was chosen stays.
                generic = {**allocate.answer(known), **generic}
            chosen = allocate.network(
                network_id,
                generic,
                port=self.config.port,
                default_mtu=self._default_mtu,
                taken=self.store.taken_vnis(),
                subnets=subnets,
                ipv6=ipv6,
                internal=internal,
                overlay=self.config.scope == "global",
            )
            if chosen != known:
                self.store.put_network(chosen)
        log.info("network created", network=network_id, vni=chosen.vni, mtu=chosen.mtu)

    def delete_network(self, network_id: str) -> None:
        """Remove a network with what is left of its endpoints; unknown is fine."""
        _check_id("network", network_id)
        with self._locks.hold(network_id):
            for endpoint in self.store.endpoints(network_id):
                self.kernel.detach(network_id, endpoint.id)
            self.kernel.remove_network(network_id)
            self.store.delete_network(network_id)
        log.info("network deleted", network=network_id)

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
            Conflict: the endpoint exists with other addresses, or its addresses are another's.
            InvalidRequest: a per-endpoint option.
            KernelError: the kernel refused; nothing is left then.
        """
        _check_id("network", network_id)
        _check_id("endpoint", endpoint_id)
        options.check_endpoint(driver_options or {})
        with self._locks.hold(network_id):
            network = self._network(network_id)
            endpoint = Endpoint(
                id=endpoint_id,
                network_id=network_id,
                mac=(mac or self._mac(endpoint_id, ipv4)).lower(),
                ipv4=ipv4,
                ipv6=ipv6 or self._ipv6(network, ipv4),
                created=self._clock(),
            )
            known = self.store.endpoint(endpoint_id)
            if known is not None and not _same(known, endpoint):
                raise Conflict(
                    f"endpoint {endpoint_id} exists already with {known.ipv4} {known.mac}; "
                    "disconnect the container and connect it again"
                )
            self._check_addresses(endpoint)
            if known is None:
                self.store.put_endpoint(endpoint)
            try:
                self.kernel.attach(network, endpoint)
            except Exception:
                if known is None:
                    self._discard(endpoint)
                raise
        return EndpointAddresses(
            mac=None if mac else endpoint.mac,
            ipv6=None if ipv6 else endpoint.ipv6,
        )

    def _network(self, network_id: str) -> Network:
        network = self.store.network(network_id)
        if network is None:
            raise NotFound(
                f"network {network_id} is not known to FreeFlow on this host; was the plugin removed and installed "
                "again? Remove the network and create it anew (of a Swarm: restart the task)"
            )
        return network

    @staticmethod
    def _mac(endpoint_id: str, ipv4: IPv4Interface | None) -> str:
        if ipv4 is not None:
            return allocate.mac_for(ipv4.ip)
        # Null IPAM: no address to derive it from.
        return "02:" + bytes.fromhex(endpoint_id[:10]).hex(":")

    @staticmethod
    def _ipv6(network: Network, ipv4: IPv4Interface | None) -> IPv6Interface | None:
        if not network.ipv6 or ipv4 is None:
            return None
        address = allocate.ipv6_for(network.prefix6, ipv4.ip)
        return IPv6Interface((address, network.prefix6.prefixlen))

    def _check_addresses(self, endpoint: Endpoint) -> None:
        for other in self.store.endpoints(endpoint.network_id):
            if other.id == endpoint.id:
                continue
            if names.short(other.id) == names.short(endpoint.id):
                raise Conflict(
                    f"endpoint {endpoint.id}: its first twelve characters are those of endpoint {other.id}; try again"
                )
            if endpoint.ipv4 is not None and other.ipv4 == endpoint.ipv4:
                # Docker gives an address to one endpoint at a time: the other one's end went past us.
                log.info("stale endpoint replaced", endpoint=other.id, address=str(other.ipv4))
                self._discard(other)

    def _discard(self, endpoint: Endpoint) -> None:
        """Remove an endpoint and, after the last one, the network's links. The caller holds the lock."""
        self.kernel.detach(endpoint.network_id, endpoint.id)
        self.store.delete_endpoint(endpoint.id)
        if not self.store.endpoints(endpoint.network_id):
            self.kernel.remove_network(endpoint.network_id)

    def delete_endpoint(self, network_id: str, endpoint_id: str) -> None:
        """Remove an endpoint; unknown is fine."""
        _check_id("network", network_id)
        _check_id("endpoint", endpoint_id)
        with self._locks.hold(network_id):
            endpoint = self.store.endpoint(endpoint_id)
            if endpoint is not None and endpoint.network_id != network_id:
                raise InvalidRequest(
                    f"endpoint {endpoint_id} belongs to network {endpoint.network_id}, not {network_id}"
                )
            if endpoint is not None:
                self._discard(endpoint)
            else:
                self.kernel.detach(network_id, endpoint_id)
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
        with self._locks.hold(network_id):
            network = self._network(network_id)
            endpoint = self.store.endpoint(endpoint_id)
            if endpoint is None or endpoint.network_id != network_id:
                raise NotFound(
                    f"endpoint {endpoint_id} is not known to FreeFlow on this host; start the container again"
                )
            endpoint = replace(endpoint, sandbox_key=sandbox_key)
            self.store.put_endpoint(endpoint)
        self.kernel.announce(network_id, [endpoint])
        self._joined(endpoint)
        self._wake()
        return JoinResult(names.container_veth(endpoint_id), _other_subnets(network, endpoint))

    def leave(self, network_id: str, endpoint_id: str) -> None:
        """The container leaves; Docker takes the link back and calls DeleteEndpoint. Unknown is fine."""
        _check_id("network", network_id)
        _check_id("endpoint", endpoint_id)
        with self._locks.hold(network_id):
            endpoint = self.store.endpoint(endpoint_id)
            if endpoint is not None and endpoint.sandbox_key is not None:
                self.store.put_endpoint(replace(endpoint, sandbox_key=None))
        self._wake()


def _same(known: Endpoint, asked: Endpoint) -> bool:
    return (known.network_id, known.ipv4, known.ipv6, known.mac) == (
        asked.network_id,
        asked.ipv4,
        asked.ipv6,
        asked.mac,
    )


def _other_subnets(network: Network, endpoint: Endpoint) -> tuple[IPNetwork, ...]:
    """Subnets of the network that aren't the endpoint's own: all are on the same link.

    With engines that number IPv6 by themselves, host by host (27 and later), it includes the derived prefix.
    """
    own = [item.network for item in (endpoint.ipv4, endpoint.ipv6) if item is not None]
    pools: list[IPNetwork] = [subnet.pool for subnet in network.subnets if subnet.pool.prefixlen]
    if isinstance(endpoint.ipv6, IPv6Interface) and network.ipv6:
        pools.append(IPv6Network(network.prefix6))
    families = {item.version for item in own}
    return tuple(
        dict.fromkeys(pool for pool in pools if pool not in own and pool.version in families)
    )
