"""What the page shows, made from the same values as `freeflow status` and `freeflow top`.

`MapView` changes when containers come and go, `TrafficView` all the time. Both are bounded,
whatever containers do: what is left out is counted.
"""

from __future__ import annotations

from typing import Final

import msgspec

from plugin.status import Finding, NetworkStatus, OtherNetworkStatus, ServiceStatus, Status
from plugin.traffic_names import AddressBook, AddressOwner

CONTAINERS: Final = 2000
"""The most containers of the map. Those of this host come first."""
UNNAMED: Final = "*"
"""Key of all addresses that have no name: they are one node of the map."""


class PageHost(msgspec.Struct, frozen=True, kw_only=True):
    """A host that shares a network with this one, or this one itself."""

    name: str
    """Its address, if this host doesn't know its name."""
    address: str = ""
    own: bool = False
    networks: list[str] = []
    session: bool | None = None
    """With this host's router; null: not known, or this host itself."""
    session_reason: str = ""
    link: str = ""
    """Of the relays, as in `freeflow status`."""
    link_reason: str = ""
    transport: str = ""
    encryption: str = ""
    why_not_rdma: str = ""


class PageContainer(msgspec.Struct, frozen=True, kw_only=True):
    """A container or task. `host` is empty if it is not known."""

    key: str
    name: str
    service: str = ""
    host: str = ""
    own: bool = False
    """Whether it runs on this host."""
    addresses: list[str] = []
    networks: list[str] = []


class PageService(msgspec.Struct, frozen=True, kw_only=True):
    """A service on a network. `vip` is empty with `dnsrr`."""

    key: str
    name: str
    network: str
    vip: str = ""
    tasks: list[str] = []
    """Keys of containers that take new connections, or an address where none is known."""
    here: list[str] = []
    """Those of them that new connections of this host's containers get."""
    balance: str = ""
    why: str = ""


class PageNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """A network of this host."""

    id: str
    name: str
    driver: str = "freeflow"
    path: str = ""
    """Of packets."""
    acceleration: bool = True
    subnets: list[str] = []
    note: str = ""
    """Why it isn't accelerated, or what keeps it from being refreshed."""


class MapView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything but traffic."""

    host: str
    version: str
    engine: str
    kernel: str
    healthy: bool
    problems: list[Finding]
    router: bool
    """Whether it answers."""
    hosts: list[PageHost]
    containers: list[PageContainer]
    services: list[PageService]
    networks: list[PageNetwork]
    left_out: int = 0
    """Containers that are not in the map because there are too many."""


def container_key(name: str, host: str, *, task: bool) -> str:
    """The node of a container. Tasks have names of their own in the Swarm; two other containers of
    one name on two hosts are two nodes.
    """
    return f"container/{name}" if task else f"container/{host}/{name}"


def owner_key(network: str, owner: AddressOwner | None) -> str:
    """The node of the map that has an address. A container has one on all of its networks."""
    if owner is None or not owner.name:
        return UNNAMED
    if owner.vip:
        return f"service/{network}/{owner.name}"
    return container_key(owner.name, owner.host, task=bool(owner.service))


def map_view(status: Status, book: AddressBook) -> MapView:
    """The map of a host with this status."""
    names = {network.id: network.name or network.id[:12] for network in status.networks}
    names |= {network.id: network.name for network in status.other_networks}
    containers, left_out = _containers(status, book, names)
    return MapView(
        host=status.host.hostname,
        version=status.version,
        engine=status.host.engine,
        kernel=status.host.kernel,
        healthy=status.healthy,
        problems=status.problems,
        router=status.router is not None and status.router.up,
        hosts=_hosts(status, names),
        containers=containers,
        services=[
            _service(service, network.id, names, book.networks.get(network.id, {}))
            for network in status.networks
            for service in network.services
        ],
        networks=[
            *map(_network, status.networks),
            *map(_other_network, status.other_networks),
        ],
        left_out=left_out,
    )


def _containers(
    status: Status, book: AddressBook, names: dict[str, str]
) -> tuple[list[PageContainer], int]:
    """Containers, each once, and how many are left out."""
    own = {endpoint.container for network in status.networks for endpoint in network.endpoints}
    own |= {name for network in status.other_networks for name in network.containers}
    here = status.host.hostname
    # On networks of other drivers their services aren't known.
    tasks = {
        owner.name
        for addresses in book.networks.values()
        for owner in addresses.values()
        if owner.service and not owner.vip
    }
    found: dict[str, PageContainer] = {}
    for network, addresses in book.networks.items():
        title = names.get(network, network[:12])
        for address, owner in addresses.items():
            if owner.vip or not owner.name:
                continue
            mine = owner.name in own and owner.host in ("", here)
            host = here if mine else owner.host
            key = container_key(owner.name, host, task=owner.name in tasks)
            known = found.get(key) or PageContainer(key=key, name=owner.name)
            found[key] = PageContainer(
                key=key,
                name=owner.name,
                service=known.service or owner.service,
                host=host or known.host,
                own=mine,
                addresses=[*known.addresses, address],
                networks=sorted({*known.networks, title}),
            )
    ordered = sorted(found.values(), key=lambda each: (not each.own, each.host, each.key))
    return ordered[:CONTAINERS], max(0, len(ordered) - CONTAINERS)


def _hosts(status: Status, names: dict[str, str]) -> list[PageHost]:
    """This host first, then the others by name."""
    own = status.host
    found = {own.hostname: PageHost(name=own.hostname, address=own.address, own=True)}
    for network in status.networks:
        for peer in network.peers:
            name = own.hostname if peer.own else peer.name or peer.address
            known = found.get(name) or PageHost(name=name, address=peer.address)
            shared = sorted({*known.networks, names[network.id]})
            found[name] = msgspec.structs.replace(known, networks=shared)
    rdma = None if status.router is None else status.router.rdma
    for fact in () if rdma is None else rdma.hosts:
        name = fact.name or fact.address
        known = found.get(name) or PageHost(name=name, address=fact.address)
        found[name] = msgspec.structs.replace(
            known,
            session=fact.session,
            session_reason=fact.reason,
            link=fact.link,
            link_reason=fact.link_reason,
            transport=fact.transport,
            encryption=fact.encryption,
            why_not_rdma=fact.why_not_rdma,
        )
    return sorted(found.values(), key=lambda each: (not each.own, each.name))


def _service(
    service: ServiceStatus, network: str, names: dict[str, str], owners: dict[str, AddressOwner]
) -> PageService:
    def shown(task: str) -> str:
        owner = owners.get(task)
        return task if owner is None or not owner.name else owner_key(network, owner)

    return PageService(
        key=f"service/{network}/{service.name}",
        name=service.name,
        network=names[network],
        vip=service.vip,
        tasks=[shown(task) for task in service.tasks],
        here=[shown(task) for task in service.here],
        balance=service.balance if service.vip else "dnsrr",
        why=service.why,
    )


def _network(network: NetworkStatus) -> PageNetwork:
    return PageNetwork(
        id=network.id,
        name=network.name or network.id[:12],
        path=network.path,
        acceleration=network.acceleration,
        subnets=network.subnets,
        note=network.error,
    )


def _other_network(network: OtherNetworkStatus) -> PageNetwork:
    return PageNetwork(
        id=network.id,
        name=network.name,
        driver=network.driver,
        path=network.driver,
        acceleration=not network.reason,
        subnets=network.subnets,
        note=network.reason,
    )
