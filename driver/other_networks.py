"""Networks of other drivers whose connections are accelerated, as the engine lists them.

No request of Docker's tells us of these networks. So a thread reads from the engine which there
are, then each one of which an event says that it has changed, and all now and then. If the engine
does not answer, the last answer holds.

A network is accelerated if it has the label `freeflow.accelerate=on`, or if the plugin's setting
OTHER_NETWORKS is on and the label is not off. The setting includes only Docker's own drivers, of
which it is known what they have between two containers of one host. Of their networks only
`overlay` is known to have nothing between two hosts. With the label `freeflow.accelerate=trust` the
user vouches for a network: all of its containers may reach each other. What the router adds to the
proofs is in `Admission.why_apart`.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final, Protocol

import structlog
from msgspec.structs import replace

from dataplane.control import ANY_DEVICE, EndpointFact, NetworkFact, RouterSnapshot
from driver.errors import EngineError
from driver.model import IPAddress, LocalContainer, NetworkView
from driver.names import is_freeflow, short
from driver.worker import Worker

log = structlog.get_logger()

LABEL: Final = "freeflow.accelerate"
BRIDGE: Final = "bridge"
"""Docker's driver for networks of one host."""
OVERLAY: Final = "overlay"
"""Docker's driver for networks of the Swarm. It has a bridge per host, in a namespace of its own
without rules."""
_MODES: Final = {
    "macvlan": {"macvlan_mode": "bridge"},
    "ipvlan": {"ipvlan_mode": "l2", "ipvlan_flag": "bridge"},
}
"""Options of drivers, with the default values, in which the kernel passes frames between containers
of one host by itself. In other modes it keeps them apart, or sends them past a switch or a
firewall."""
_NO_SANDBOX: Final = frozenset({"host", "null"})
"""Docker's drivers whose containers have no addresses of their own."""
_ENCRYPTED: Final = "encrypted"
"""The option of `overlay` for IPsec between hosts."""
_SWARM: Final = "swarm"
"""The scope of networks that have the same ID on all hosts."""
_TRUST: Final = "trust"
_ICC: Final = "com.docker.network.bridge.enable_icc"
_NAME: Final = "com.docker.network.bridge.name"
_BALANCER: Final = "lb-"
"""What the engine lists in place of a container's ID for its own end of a network, for VIPs."""
EVERYWHERE: Final = ("0.0.0.0/0", "::/0")
_ALL: Final = ""
"""In place of a network's ID: any may have changed."""
_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
"""What the engine takes for true (Go's strconv.ParseBool)."""

GATHER: Final = 0.05
"""Seconds between two looks at least: a compose application makes many changes at once."""
REPEAT: Final = 30.0
"""Seconds after which a network is read again, in case an event was lost."""
SHARED_REPEAT: Final = 5.0
"""The same where networks are shared with other hosts: no event tells of a host that comes."""
AGAIN: Final = 1.0
"""Seconds after an event's first look for a second one: the event may have come before the fact."""
RETRY: Final = 2.0
"""Seconds after which an engine that didn't answer is asked again."""
SOON: Final = 0.1
PATIENCE: Final = 30.0
"""Seconds for which the namespace of a listed container is awaited. The first look comes after
`SOON`, later ones when a quarter of the time so far has passed again."""


class NetworkDirectory(Protocol):
    """What the engine lists. Raises `EngineError`. Implemented by `driver.engine`."""

    def all_networks(self) -> tuple[NetworkView, ...]:
        """All networks of this host, of any driver, without their containers and services."""

    def changed_networks(self) -> Iterator[str]:
        """IDs of networks that are made, removed, or that a container of this host joins or leaves.

        First "": from then on no event is missed. Ends when the engine does.
        """

    def network(self, network_id: str, *, services: bool = False) -> NetworkView | None:
        """A network with its containers on this host, and with its services if they are wanted.

        None: there is none.
        """

    def sandbox_key(self, container_id: str) -> str | None:
        """Docker's path of a container's namespace; None: it has none, or there is no such
        container."""


@dataclass(frozen=True, slots=True)
class OtherEndpoint:
    """A container of this host on such a network; `sandbox` is where we see its namespace."""

    id: str
    container: str
    addresses: tuple[IPAddress, ...]
    sandbox: Path


@dataclass(frozen=True, slots=True)
class OtherNetwork:
    """An accelerated network of another driver; `bridge` is as in `NetworkFact`.

    `balanced` are the addresses of its load balancers: VIPs, and from where they send.
    """

    view: NetworkView
    bridge: str
    endpoints: tuple[OtherEndpoint, ...]
    balanced: tuple[IPAddress, ...] = ()

    @property
    def trusted(self) -> bool:
        """Whether the user vouches that all of its containers may reach each other."""
        return self.view.labels.get(LABEL) == _TRUST

    @property
    def crosses_hosts(self) -> bool:
        """Whether connections to other hosts may move too."""
        view = self.view
        if view.scope != _SWARM or _ENCRYPTED in view.options:
            return False
        return view.driver == OVERLAY or (self.trusted and view.driver != BRIDGE)


def switch(label: str | None) -> bool | None:
    """What a label says; None: nothing.

    Readers of YAML make true and false of on and off that are written without quotes.
    """
    values = {"on": True, "true": True, _TRUST: True, "off": False, "false": False}
    return values.get((label or "").lower())


def why_not(view: NetworkView, on: bool) -> str | None:
    """Why a network of another driver isn't accelerated; None: it is.

    `on` is the setting OTHER_NETWORKS.
    """
    asks = switch(view.labels.get(LABEL))
    if asks is False:
        return f"its label {LABEL} is off"
    if not asks and not on:
        return f"it has no label {LABEL}=on"
    if is_freeflow(view.driver):
        return "it is FreeFlow's own"
    return _why_not_driver(view, asks=bool(asks))


def _why_not_driver(view: NetworkView, *, asks: bool) -> str | None:
    if view.driver in _NO_SANDBOX:
        return "its containers have no addresses of their own"
    if view.driver == BRIDGE:
        apart = view.options.get(_ICC, "true") not in _TRUE
        return f"its containers may not reach each other ({_ICC})" if apart else None
    if view.driver == OVERLAY:
        return "it is the Swarm's own, for published ports" if view.ingress else None
    modes = _MODES.get(view.driver)
    if modes is None:
        unknown = f"FreeFlow doesn't know what the driver {view.driver} has between two containers"
        return None if asks else f"{unknown}, and it has no label {LABEL}=on"
    other = [
        f"{key}={view.options[key]}"
        for key in modes
        if view.options.get(key, "") not in ("", modes[key])
    ]
    return f"its containers don't reach each other directly ({', '.join(other)})" if other else None


@dataclass(frozen=True, slots=True)
class RefusedNetwork:
    """A network that asks for acceleration by its label, and why it can't have it."""

    view: NetworkView
    reason: str


class OtherNetworks:
    """Two threads: one waits for the engine's events, the other reads networks and containers.

    `sandboxes` is the folder in which Docker's sandboxes are visible to us. `changed` is called
    when `known` has another value.
    """

    def __init__(
        self,
        directory: NetworkDirectory,
        *,
        sandboxes: Path,
        on: bool,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._sandboxes = sandboxes
        self._on = on
        self._changed = changed
        self._clock = clock
        self._known: tuple[OtherNetwork, ...] = ()
        self._complete = False
        """Whether the engine has answered so far."""
        self._refused: tuple[RefusedNetwork, ...] = ()
        self._keys: dict[str, str] = {}
        """Docker's path of an endpoint's namespace, by the endpoint's ID; it never changes."""
        self._missing: dict[str, float] = {}
        """Endpoints whose namespace isn't known, each with the time of the first look."""
        self._read_at: dict[str, float] = {}
        """When each known network was read."""
        self._incomplete: frozenset[str] = frozenset()
        """Networks with such endpoints."""
        self._unwanted: frozenset[str] = frozenset()
        """Networks that don't ask for acceleration: nothing that happens to them matters."""
        self._hints: SimpleQueue[str] = SimpleQueue()
        """Networks that have changed since the last look."""
        self._again: frozenset[str] = frozenset()
        """Networks that are to be read once more."""
        self._reader = Worker("other-networks", self._gathered, retry=RETRY)
        self._listener = Worker("other-networks-events", self._listen, retry=RETRY)

    def known(self) -> tuple[OtherNetwork, ...]:
        """The accelerated networks, by ID, with or without containers."""
        return self._known

    def expected(self) -> tuple[str, ...]:
        """Subnets in which containers of this host may have addresses that aren't known yet: those
        of all networks that are accelerated, and any until it is known which those are.
        """
        if not self._complete:
            return EVERYWHERE
        return tuple(str(each.pool) for network in self._known for each in network.view.subnets)

    def asking(self) -> tuple[OtherNetwork | RefusedNetwork, ...]:
        """The same, and networks whose label asks for acceleration in vain."""
        return (*self._known, *self._refused)

    def wake(self) -> None:
        """Read everything soon: something has changed."""
        self.hint(_ALL)

    def hint(self, network_id: str) -> None:
        """A network was made or removed, or a container has joined or left it."""
        if network_id not in self._unwanted:
            self._hints.put(network_id)
            self._reader.wake()

    def start(self) -> None:
        self._reader.start()
        self._listener.start()

    def stop(self) -> None:
        """Ask the threads to end. Each does so after its present request, or with the process."""
        self._reader.stop(wait=False)
        self._listener.stop(wait=False)

    def _listen(self) -> float:
        try:
            for network_id in self._directory.changed_networks():
                self.hint(network_id)
        except EngineError as error:
            # The sync loop reports that the engine doesn't answer.
            log.debug("no events of the engine", reason=str(error))
        return RETRY

    def _gathered(self) -> float:
        self._reader.stopped.wait(GATHER)
        return self.once()

    def once(self) -> float:
        """Read what the engine lists; returns the seconds until the next look."""
        before, self._missing = self._missing, {}
        hints = self._take_hints()
        try:
            read = sorted(self._read(before, hints | self._again), key=lambda pair: pair[0].view.id)
        except EngineError as error:
            self._missing, self._again = before, self._again | hints
            log.debug("networks of other drivers can't be read", reason=str(error))
            return RETRY
        self._read_at = {network.view.id: at for network, at in read}
        self._again = hints
        found = tuple(network for network, _ in read)
        listed = {each.id for network in found for each in network.endpoints}
        self._keys = {key: value for key, value in self._keys.items() if key in listed}
        changed = found != self._known or not self._complete
        self._known = found
        # Only now: who finds this true finds the networks, too.
        self._complete = True
        if changed:
            self._changed()
        return self._pause(hinted=bool(hints))

    def _take_hints(self) -> frozenset[str]:
        found = set()
        with contextlib.suppress(Empty):
            while True:
                found.add(self._hints.get_nowait())
        return frozenset(found)

    def _pause(self, *, hinted: bool) -> float:
        now = self._clock()
        waited = [now - since for since in self._missing.values()]
        pauses = [max(SOON, each / 4) for each in waited if each < PATIENCE]
        pauses += [max(GATHER, self._due(each) - now) for each in self._known]
        return min([*pauses, AGAIN if hinted else REPEAT])

    def _due(self, network: OtherNetwork) -> float:
        """When a known network is read again without an event."""
        pause = SHARED_REPEAT if network.crosses_hosts else REPEAT
        return self._read_at[network.view.id] + pause

    def _read(
        self, before: Mapping[str, float], hints: frozenset[str]
    ) -> Iterator[tuple[OtherNetwork, float]]:
        """Networks that are to be accelerated, each with the time when it was read."""
        known = {each.view.id: each for each in self._known}
        listing = self._directory.all_networks()
        self._refused = tuple(
            RefusedNetwork(each, reason)
            for each in listing
            if switch(each.labels.get(LABEL))
            and not is_freeflow(each.driver)
            and (reason := why_not(each, self._on)) is not None
        )
        wanted = [each for each in listing if why_not(each, self._on) is None]
        asking = {each.id for each in wanted} | {each.view.id for each in self._refused}
        self._unwanted = frozenset(each.id for each in listing) - asking
        incomplete, now = set(), self._clock()
        for listed in wanted:
            old = known.get(listed.id)
            stale = hints & {_ALL, listed.id} or listed.id in self._incomplete
            if old is not None and not stale and now < self._due(old):
                yield old, self._read_at[listed.id]
                continue
            view = self._directory.network(listed.id, services=listed.scope == _SWARM)
            if view is None:
                continue
            missing = len(self._missing)
            endpoints = tuple(self._endpoints(view, before))
            if len(self._missing) > missing:
                incomplete.add(view.id)
            yield OtherNetwork(view, _bridge_of(view), endpoints, _balanced(view)), now
        self._incomplete = frozenset(incomplete)

    def _endpoints(self, view: NetworkView, before: Mapping[str, float]) -> Iterator[OtherEndpoint]:
        for container in view.containers:
            if container.id.startswith(_BALANCER):
                continue
            key = self._key(container)
            if not key:
                since = before.get(container.endpoint_id, self._clock())
                self._missing[container.endpoint_id] = since
                continue
            addresses = (container.address, container.ipv6)
            yield OtherEndpoint(
                id=container.endpoint_id,
                container=container.name,
                addresses=tuple(item.ip for item in addresses if item is not None),
                sandbox=self._sandboxes / Path(key).name,
            )

    def _key(self, container: LocalContainer) -> str | None:
        key = self._keys.get(container.endpoint_id)
        if key is None:
            # The engine answers for a container once it has started, which may take long.
            with contextlib.suppress(EngineError):
                key = self._directory.sandbox_key(container.id)
        if key:
            self._keys[container.endpoint_id] = key
        return key


def _bridge_of(view: NetworkView) -> str:
    """What carries the network in the host's own namespace, as in `NetworkFact`."""
    if view.driver == BRIDGE:
        return view.options.get(_NAME) or f"br-{short(view.id)}"
    return "" if view.driver == OVERLAY or view.driver in _MODES else ANY_DEVICE


def _balanced(view: NetworkView) -> tuple[IPAddress, ...]:
    found: set[IPAddress] = {each.vip for each in view.services if each.vip is not None}
    for container in view.containers:
        if container.id.startswith(_BALANCER):
            found |= {item.ip for item in (container.address, container.ipv6) if item is not None}
    return tuple(sorted(found, key=lambda ip: (ip.version, int(ip))))


def with_others(
    snapshot: RouterSnapshot,
    others: Iterable[OtherNetwork],
    inode: Callable[[str, Path], int | None],
    own: Collection[IPAddress] = (),
) -> RouterSnapshot:
    """The router's snapshot with networks of other drivers too. `inode`: that of an endpoint's
    namespace; `own`: the addresses by which other hosts know this one, as far as they are known.

    An endpoint without a namespace is left out. So is an address that doesn't tell one container or
    one network: that of two endpoints of a network, or of two networks of a container.
    """
    networks, endpoints = list(snapshot.networks), list(snapshot.endpoints)
    known = [
        (network, endpoint, namespace)
        for network in others
        for endpoint in network.endpoints
        if (namespace := inode(endpoint.id, endpoint.sandbox)) is not None
    ]
    owners = Counter(
        (network.view.id, address)
        for network, endpoint, _ in known
        for address in endpoint.addresses
    )
    places = Counter(
        (namespace, str(address))
        for _, endpoint, namespace in known
        for address in endpoint.addresses
    )
    places.update((each.namespace, address) for each in endpoints for address in each.addresses)
    for network in {network.view.id: network for network, _, _ in known}.values():
        networks.append(_network_fact(network, own))
    for network, endpoint, namespace in known:
        endpoints.append(
            EndpointFact(
                id=endpoint.id,
                network=network.view.id,
                addresses=tuple(
                    str(address)
                    for address in endpoint.addresses
                    if owners[network.view.id, address] == places[namespace, str(address)] == 1
                ),
                namespace=namespace,
                path=str(endpoint.sandbox),
                container=endpoint.container,
            )
        )
    return replace(snapshot, networks=tuple(networks), endpoints=tuple(endpoints))


def _network_fact(network: OtherNetwork, own: Collection[IPAddress]) -> NetworkFact:
    view = network.view
    # It is unknown whether TCP between relays is faster than what isn't an overlay.
    relay = network.crosses_hosts and view.driver == OVERLAY
    return NetworkFact(
        id=view.id,
        name=view.name,
        rdma=network.crosses_hosts,
        relay=relay,
        verbs=False,
        subnets=tuple(str(subnet.pool) for subnet in view.subnets),
        peers=tuple(sorted(map(str, hosts_of([network], own)))),
        kind=view.driver,
        foreign=True,
        bridge=network.bridge,
        trusted=network.trusted,
        balanced=tuple(map(str, network.balanced)),
    )


def hosts_of(networks: Iterable[OtherNetwork], own: Collection[IPAddress]) -> frozenset[IPAddress]:
    """The other hosts to which connections on these networks may lead."""
    return frozenset(
        host
        for network in networks
        if network.crosses_hosts
        for host in other_hosts(network.view, own)
    )


def other_hosts(view: NetworkView, own: Collection[IPAddress]) -> frozenset[IPAddress]:
    """The other hosts that share a network; none while it isn't known which of them is this one."""
    return frozenset(each.address for each in view.peers).difference(own) if own else frozenset()
