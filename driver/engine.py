"""What the engine of this host says of itself, its networks, their peers, services and containers.

Only background work may use it: the engine does not serve its API while it starts, and holds locks while it waits for
a request of ours (docker-net-dhcp#23, libnetwork#414).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Interface, ip_address
from pathlib import Path
from typing import Any, TypeVar

import docker
import requests

from driver.errors import EngineError
from driver.model import EngineView, IPAddress, LocalContainer, NetworkView, Peer, Service, Task

T = TypeVar("T")


def _address(text: object) -> IPAddress | None:
    try:
        return ip_address(str(text))
    except ValueError:
        return None


def _ipv4(text: object) -> IPv4Address | None:
    address = _address(text)
    return address if isinstance(address, IPv4Address) else None


def _items(value: object) -> Mapping[str, Any]:
    """Go sends null for an empty map."""
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def parse_network(answer: Mapping[str, Any]) -> NetworkView:
    """A view from `GET /networks/<id>?verbose=true`; what isn't understood is left out.

    Standalone containers of an attachable network stand under the empty service name; they have no VIP.
    """
    services = []
    for name, service in _items(answer.get("Services")).items():
        if not name or not isinstance(service, Mapping):
            continue
        tasks = []
        for task in _list(service.get("Tasks")):
            address = _ipv4(task.get("EndpointIP")) if isinstance(task, Mapping) else None
            if address is not None:
                tasks.append(
                    Task(str(task.get("Name", "")), address, str(task.get("EndpointID", "")))
                )
        tasks.sort(key=lambda item: item.address)
        services.append(Service(name, _ipv4(service.get("VIP")), tuple(tasks)))
    containers = []
    for identifier, container in _items(answer.get("Containers")).items():
        if not isinstance(container, Mapping):
            continue
        text = container.get("IPv4Address")
        try:
            interface = IPv4Interface(text) if text else None
        except ValueError:
            interface = None
        containers.append(
            LocalContainer(
                id=identifier,
                name=str(container.get("Name", "")),
                endpoint_id=str(container.get("EndpointID", "")),
                address=interface,
            )
        )
    peers = []
    for peer in _list(answer.get("Peers")):
        address6 = _address(peer.get("IP")) if isinstance(peer, Mapping) else None
        if address6 is not None:
            # The gossip name is the host's, a hyphen, and part of a random ID.
            peers.append(Peer(str(peer.get("Name", "")).rsplit("-", 1)[0], address6))
    return NetworkView(
        id=str(answer.get("Id", "")),
        name=str(answer.get("Name", "")),
        driver=str(answer.get("Driver", "")),
        peers=tuple(sorted(peers, key=lambda item: (item.address.version, int(item.address)))),
        services=tuple(sorted(services, key=lambda item: item.name)),
        containers=tuple(sorted(containers, key=lambda item: item.name)),
    )


def parse_engine(info: Mapping[str, Any]) -> EngineView:
    """A view from `GET /info`."""
    swarm = _items(info.get("Swarm"))
    return EngineView(
        version=str(info.get("ServerVersion", "")),
        hostname=str(info.get("Name", "")),
        root=str(info.get("DockerRootDir", "")),
        swarm=swarm.get("LocalNodeState") == "active",
        node_id=str(swarm.get("NodeID", "")),
        node_address=_address(swarm.get("NodeAddr")),
        manager=bool(swarm.get("ControlAvailable")),
        managers=tuple(
            str(item.get("Addr", ""))
            for item in _list(swarm.get("RemoteManagers"))
            if isinstance(item, Mapping)
        ),
    )


class DockerDirectory:
    """`ports.Directory` over the engine's socket; `timeout` in seconds bounds each answer."""

    def __init__(self, socket: Path, timeout: float = 2.0) -> None:
        self._url = f"unix://{socket}"
        self._timeout = timeout
        self._local = threading.local()

    def _client(self) -> docker.APIClient:
        client: docker.APIClient | None = getattr(self._local, "client", None)
        if client is None:
            client = docker.APIClient(self._url, version="auto", timeout=self._timeout)  # type: ignore[arg-type]
            self._local.client = client
        return client

    def _ask(self, what: str, question: Callable[[docker.APIClient], T]) -> T:
        try:
            return question(self._client())
        except docker.errors.NotFound:
            raise
        except (docker.errors.DockerException, requests.RequestException, ValueError) as error:
            # The engine may come back with another version: negotiate anew.
            self._local.client = None
            raise EngineError(f"the engine did not answer {what}: {error}") from error

    def engine(self) -> EngineView:
        return parse_engine(self._ask("GET /info", lambda client: client.info()))

    def networks(self) -> frozenset[str]:
        listed = self._ask("GET /networks", lambda client: client.networks())
        return frozenset(str(item.get("Id")) for item in listed)

    def network(self, network_id: str) -> NetworkView | None:
        try:
            answer = self._ask(
                f"GET /networks/{network_id}",
                lambda client: client.inspect_network(network_id, verbose=True),
            )
        except docker.errors.NotFound:
            return None
        return parse_network(answer)
