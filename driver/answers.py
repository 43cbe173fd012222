"""Parses the engine's JSON answers. Whatever has an unexpected form is left out.

Shapes: Docker Engine API, recorded from engines 20.10 to 28.5 in `tests/unit/data`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv6Interface,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import Any, Final, TypeVar

from driver.model import (
    EngineView,
    IPAddress,
    LocalContainer,
    NetworkView,
    Peer,
    Service,
    Subnet,
    Task,
)

T = TypeVar("T")

PLUGIN_SOCKET: Final = "freeflow.sock"
"""`interface.socket` of our config.json: identifies our plugin where its ID isn't known."""
SERVICE_NAME: Final = "com.docker.swarm.service.name"
"""Label of a task's container."""


@lru_cache(4096)
def _read(kind: Callable[[str], T], text: str) -> T | None:
    try:
        return kind(text)
    except ValueError:
        return None


def _address(text: object) -> IPAddress | None:
    return _read(ip_address, str(text))


def _ipv4(text: object) -> IPv4Address | None:
    # A service without a VIP has "" or, in Go's words, "<nil>".
    return _read(IPv4Address, str(text))


def items(value: object) -> Mapping[str, Any]:
    """Go sends null for an empty map."""
    return value if isinstance(value, Mapping) else {}


def objects(value: object) -> list[Mapping[str, Any]]:
    """The objects in a list; Go sends null for an empty one."""
    found = value if isinstance(value, list) else []
    return [item for item in found if isinstance(item, Mapping)]


def text_of(value: object) -> str:
    return value if isinstance(value, str) else ""


def _peers(answer: Mapping[str, Any]) -> tuple[Peer, ...]:
    found = []
    for peer in objects(answer.get("Peers")):
        address = _address(peer.get("IP"))
        if address is not None:
            found.append(Peer(text_of(peer.get("Name")), address))
    return tuple(
        sorted(found, key=lambda item: (item.address.version, int(item.address), item.name))
    )


def _services(answer: Mapping[str, Any]) -> tuple[Service, ...]:
    found = []
    for name, service in items(answer.get("Services")).items():
        if not name or not isinstance(service, Mapping):
            continue
        tasks = []
        for task in objects(service.get("Tasks")):
            address = _ipv4(task.get("EndpointIP"))
            if address is not None:
                tasks.append(
                    Task(text_of(task.get("Name")), address, text_of(task.get("EndpointID")))
                )
        tasks.sort(key=lambda item: (item.address, item.endpoint_id))
        found.append(Service(name, _ipv4(service.get("VIP")), tuple(tasks)))
    return tuple(sorted(found, key=lambda item: item.name))


def _others(answer: Mapping[str, Any]) -> frozenset[IPv4Address]:
    # Under the empty name: containers of an attachable network that belong to no service.
    tasks = objects(items(items(answer.get("Services")).get("")).get("Tasks"))
    return frozenset(a for task in tasks if (a := _ipv4(task.get("EndpointIP"))) is not None)


def _containers(answer: Mapping[str, Any]) -> tuple[LocalContainer, ...]:
    found = []
    for identifier, container in items(answer.get("Containers")).items():
        if isinstance(container, Mapping):
            found.append(
                LocalContainer(
                    id=identifier,
                    name=text_of(container.get("Name")),
                    endpoint_id=text_of(container.get("EndpointID")),
                    address=_read(IPv4Interface, text_of(container.get("IPv4Address"))),
                    mac=text_of(container.get("MacAddress")) or None,
                    ipv6=_read(IPv6Interface, text_of(container.get("IPv6Address"))),
                )
            )
    return tuple(sorted(found, key=lambda item: (item.name, item.id)))


def _subnets(answer: Mapping[str, Any]) -> tuple[Subnet, ...]:
    found = []
    for pool in objects(items(answer.get("IPAM")).get("Config")):
        try:
            network = ip_network(text_of(pool.get("Subnet")), strict=False)
            gateway = text_of(pool.get("Gateway"))
            # With or without a prefix length, depending on the engine's version.
            plain = gateway.partition("/")[0]
            found.append(
                Subnet(
                    network,
                    ip_interface(f"{plain}/{network.prefixlen}") if plain else None,
                )
            )
        except ValueError:
            continue
    return tuple(found)


def _texts(value: object) -> dict[str, str]:
    return {str(key): str(item) for key, item in items(value).items()}


def parse_network(answer: Mapping[str, Any]) -> NetworkView:
    """The view of `GET /networks/<id>`, with services if the query was `?verbose=true`.

    It is the same for two answers that differ only in order: the engine lists tasks in random
    order.
    """
    return NetworkView(
        id=text_of(answer.get("Id")),
        name=text_of(answer.get("Name")),
        driver=text_of(answer.get("Driver")),
        peers=_peers(answer),
        services=_services(answer),
        others=_others(answer),
        containers=_containers(answer),
        scope=text_of(answer.get("Scope")),
        options=_texts(answer.get("Options")),
        subnets=_subnets(answer),
        ipv6=answer.get("EnableIPv6") is True,
        internal=answer.get("Internal") is True,
        labels=_texts(answer.get("Labels")),
        ingress=answer.get("Ingress") is True,
        configuration=text_of(items(answer.get("ConfigFrom")).get("Network")),
    )


def parse_networks(listing: object) -> tuple[NetworkView, ...]:
    """The views of `GET /networks`, each with what this host's configuration adds, and without the
    configurations (--config-only), which no container can join.
    """
    answers = objects(listing)
    known = {
        text_of(each.get("Name")): view
        for each in answers
        if (view := parse_configuration(each)) is not None
    }
    views = (parse_network(each) for each in answers if each.get("ConfigOnly") is not True)
    return tuple(configured(view, known.get(view.configuration)) for view in views)


def parse_configuration(answer: Mapping[str, Any]) -> NetworkView | None:
    """The view of a configuration (--config-only); None: it is none."""
    return parse_network(answer) if answer.get("ConfigOnly") is True else None


def configured(view: NetworkView, configuration: NetworkView | None) -> NetworkView:
    """A network with what this host's configuration adds.

    The engine takes that over when it uses the network (libnetwork's applyConfigurationTo). Before,
    and in a manager's list always, the network is shown as the Swarm knows it, which has no labels
    and no options of such a network.
    """
    if configuration is None:
        return view
    return replace(
        view,
        labels=view.labels or configuration.labels,
        options=view.options or configuration.options,
        subnets=view.subnets or configuration.subnets,
    )


def parse_engine(info: Mapping[str, Any]) -> EngineView:
    """The view of `GET /info`."""
    swarm = items(info.get("Swarm"))
    return EngineView(
        version=text_of(info.get("ServerVersion")),
        hostname=text_of(info.get("Name")),
        root=text_of(info.get("DockerRootDir")),
        swarm=swarm.get("LocalNodeState") == "active",
        node_id=text_of(swarm.get("NodeID")),
        node_address=_address(swarm.get("NodeAddr")),
        manager=swarm.get("ControlAvailable") is True,
    )


def parse_hostnames(nodes: object) -> dict[IPAddress, str]:
    """Host names by address, of `GET /nodes`."""
    found = {}
    for node in objects(nodes):
        address = _address(items(node.get("Status")).get("Addr"))
        name = text_of(items(node.get("Description")).get("Hostname"))
        if address is not None and name:
            found[address] = name
    return found


def parse_labels(key: str, containers: object, services: object) -> dict[str, str]:
    """Values of a label by service name, of `GET /containers/json` and `GET /services`.

    A service's own label takes precedence over those of its containers. If these differ, during an
    update, the newest container's counts, which the engine lists first.
    """
    found: dict[str, str] = {}
    for container in objects(containers):
        labels = items(container.get("Labels"))
        name = text_of(labels.get(SERVICE_NAME))
        if name and key in labels:
            found.setdefault(name, text_of(labels[key]))
    for service in objects(services):
        spec = items(service.get("Spec"))
        labels = items(spec.get("Labels"))
        if spec.get("Name") and key in labels:
            found[text_of(spec["Name"])] = text_of(labels[key])
    return found


def parse_driver_names(
    plugins: object, plugin_id: str | None = None, socket_name: str = PLUGIN_SOCKET
) -> frozenset[str]:
    """The names of our driver in networks, of `GET /plugins`; a name contains the tag."""
    names = set()
    for plugin in objects(plugins):
        interface = items(items(plugin.get("Config")).get("Interface"))
        ours = (
            plugin.get("Id") == plugin_id if plugin_id else interface.get("Socket") == socket_name
        )
        if ours and plugin.get("Name"):
            names.add(text_of(plugin.get("Name")))
    return frozenset(names)


def ordered(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer with sorted tasks, so that equal answers mean an unchanged network."""
    for service in items(answer.get("Services")).values():
        tasks = service.get("Tasks") if isinstance(service, dict) else None
        if isinstance(tasks, list):
            tasks.sort(key=repr)
    return answer
