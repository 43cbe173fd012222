"""What the engine of this host says of itself, its networks, their peers, services and containers.

Only background work may use it: the engine does not serve its API while it starts, and holds locks while it waits for
a request of ours (docker-net-dhcp#23, libnetwork#414).

Networks are asked for all the time, so those questions go straight over a kept connection: a request through the SDK
costs five times the CPU. The SDK negotiates the API's version and asks everything else.
"""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv6Interface,
    ip_address,
    ip_interface,
    ip_network,
)
from pathlib import Path
from typing import Any, Final, TypeVar

import docker
import msgspec
import requests

from driver.errors import EngineError
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
"""`interface.socket` in our config.json: by it our plugin is known when its ID isn't."""


def _address(text: object) -> IPAddress | None:
    try:
        return ip_address(str(text))
    except ValueError:
        return None


def _ipv4(text: object) -> IPv4Address | None:
    # A service without a VIP has "" or, in Go's words, "<nil>".
    address = _address(text)
    return address if isinstance(address, IPv4Address) else None


def _ipv4_interface(text: object) -> IPv4Interface | None:
    try:
        return IPv4Interface(str(text)) if text else None
    except ValueError:
        return None


def _ipv6_interface(text: object) -> IPv6Interface | None:
    try:
        return IPv6Interface(str(text)) if text else None
    except ValueError:
        return None


def _items(value: object) -> Mapping[str, Any]:
    """Go sends null for an empty map."""
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Mapping[str, Any]]:
    """Likewise for a list. Only its objects."""
    items = value if isinstance(value, list) else []
    return [item for item in items if isinstance(item, Mapping)]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _peers(answer: Mapping[str, Any]) -> tuple[Peer, ...]:
    found = []
    for peer in _list(answer.get("Peers")):
        address = _address(peer.get("IP"))
        if address is not None:
            found.append(Peer(_text(peer.get("Name")), address))
    return tuple(
        sorted(found, key=lambda item: (item.address.version, int(item.address), item.name))
    )


def _services(answer: Mapping[str, Any]) -> tuple[Service, ...]:
    found = []
    for name, service in _items(answer.get("Services")).items():
        if not name or not isinstance(service, Mapping):
            continue
        tasks = []
        for task in _list(service.get("Tasks")):
            address = _ipv4(task.get("EndpointIP"))
            if address is not None:
                tasks.append(Task(_text(task.get("Name")), address, _text(task.get("EndpointID"))))
        tasks.sort(key=lambda item: (item.address, item.endpoint_id))
        found.append(Service(name, _ipv4(service.get("VIP")), tuple(tasks)))
    return tuple(sorted(found, key=lambda item: item.name))


def _others(answer: Mapping[str, Any]) -> frozenset[IPv4Address]:
    # Containers of an attachable network that belong to no service stand under the empty name.
    tasks = _list(_items(_items(answer.get("Services")).get("")).get("Tasks"))
    return frozenset(a for task in tasks if (a := _ipv4(task.get("EndpointIP"))) is not None)


def _containers(answer: Mapping[str, Any]) -> tuple[LocalContainer, ...]:
    found = []
    for identifier, container in _items(answer.get("Containers")).items():
        if isinstance(container, Mapping):
            found.append(
                LocalContainer(
                    id=identifier,
                    name=_text(container.get("Name")),
                    endpoint_id=_text(container.get("EndpointID")),
                    address=_ipv4_interface(container.get("IPv4Address")),
                    mac=_text(container.get("MacAddress")) or None,
                    ipv6=_ipv6_interface(container.get("IPv6Address")),
                )
            )
    return tuple(sorted(found, key=lambda item: (item.name, item.id)))


def _subnets(answer: Mapping[str, Any]) -> tuple[Subnet, ...]:
    found = []
    for pool in _list(_items(answer.get("IPAM")).get("Config")):
        try:
            network = ip_network(_text(pool.get("Subnet")), strict=False)
            gateway = _text(pool.get("Gateway"))
            # With or without a prefix length, as the engine's version has it.
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


def parse_network(answer: Mapping[str, Any]) -> NetworkView:
    """A view from `GET /networks/<id>`, with services if it was `?verbose=true`; what isn't understood is left out.

    It is the same for two answers that differ only in order: the engine lists tasks in random order.
    """
    return NetworkView(
        id=_text(answer.get("Id")),
        name=_text(answer.get("Name")),
        driver=_text(answer.get("Driver")),
        peers=_peers(answer),
        services=_services(answer),
        others=_others(answer),
        containers=_containers(answer),
        scope=_text(answer.get("Scope")),
        options={str(key): str(value) for key, value in _items(answer.get("Options")).items()},
        subnets=_subnets(answer),
        ipv6=answer.get("EnableIPv6") is True,
        internal=answer.get("Internal") is True,
    )


def parse_engine(info: Mapping[str, Any]) -> EngineView:
    """A view from `GET /info`."""
    swarm = _items(info.get("Swarm"))
    return EngineView(
        version=_text(info.get("ServerVersion")),
        hostname=_text(info.get("Name")),
        root=_text(info.get("DockerRootDir")),
        swarm=swarm.get("LocalNodeState") == "active",
        node_id=_text(swarm.get("NodeID")),
        node_address=_address(swarm.get("NodeAddr")),
        manager=swarm.get("ControlAvailable") is True,
        managers=tuple(_text(item.get("Addr")) for item in _list(swarm.get("RemoteManagers"))),
    )


def parse_hostnames(nodes: object) -> dict[IPAddress, str]:
    """Host names by address, from `GET /nodes`."""
    found = {}
    for node in _list(nodes):
        address = _address(_items(node.get("Status")).get("Addr"))
        name = _text(_items(node.get("Description")).get("Hostname"))
        if address is not None and name:
            found[address] = name
    return found


def parse_driver_names(
    plugins: object, plugin_id: str | None = None, socket_name: str = PLUGIN_SOCKET
) -> frozenset[str]:
    """Under which names networks have our driver, from `GET /plugins`; the name carries the tag."""
    names = set()
    for plugin in _list(plugins):
        interface = _items(_items(plugin.get("Config")).get("Interface"))
        ours = (
            plugin.get("Id") == plugin_id if plugin_id else interface.get("Socket") == socket_name
        )
        if ours and plugin.get("Name"):
            names.add(_text(plugin.get("Name")))
    return frozenset(names)


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("docker", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class DockerDirectory:
    """`ports.Directory` over the engine's socket. Safe from any thread: each has its own connections.

    `timeout` in seconds bounds each wait. `plugin_id` is our ID as a plugin, if known. `driver` is the driver's name
    where we are no plugin of this engine's.
    """

    def __init__(
        self,
        socket: Path,
        timeout: float = 2.0,
        *,
        plugin_id: str | None = None,
        driver: str | None = None,
    ) -> None:
        self._socket = socket
        self._timeout = timeout
        self._plugin_id = plugin_id
        self._driver = driver
        self._local = threading.local()
        # The last answer for each question with its view: most answers say nothing new.
        self._known: dict[tuple[str, bool], tuple[object, NetworkView]] = {}

    # --- the SDK

    def _client(self) -> docker.APIClient:
        client: docker.APIClient | None = getattr(self._local, "client", None)
        if client is None:
            client = docker.APIClient(
                f"unix://{self._socket}", version="auto", timeout=int(max(1, self._timeout))
            )
            self._local.client = client
        return client

    def _ask(self, what: str, question: Callable[[docker.APIClient], T]) -> T:
        try:
            return question(self._client())
        except (docker.errors.DockerException, requests.RequestException, ValueError) as error:
            self._drop()
            raise self._failure(what, error) from error

    def _failure(self, what: str, error: Exception) -> EngineError:
        return EngineError(
            f"the engine did not answer {what} on {self._socket}: {error}; is dockerd running?"
        )

    def _drop(self) -> None:
        """Forget this thread's connections: the engine may come back with another version."""
        client: docker.APIClient | None = getattr(self._local, "client", None)
        connection: _Connection | None = getattr(self._local, "connection", None)
        self._local.client = self._local.connection = None
        if client is not None:
            client.close()
        if connection is not None:
            connection.close()

    # --- straight

    def _get(self, path: str) -> tuple[int, bytes]:
        """One GET over the kept connection; once more over a new one if the engine has closed it."""
        version = self._ask("GET /version", lambda client: client.api_version)
        kept: _Connection | None = getattr(self._local, "connection", None)
        connection = kept or _Connection(self._socket, self._timeout)
        self._local.connection = connection
        try:
            connection.request("GET", f"/v{version}{path}")
            response = connection.getresponse()
            return response.status, response.read()
        except TimeoutError as error:
            self._drop()
            raise self._failure(f"GET {path}", error) from error
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            if kept is not None:
                return self._get(path)
            raise self._failure(f"GET {path}", error) from error

    # --- ports.Directory

    def engine(self) -> EngineView:
        """See `ports.Directory`."""
        view = parse_engine(self._ask("GET /info", lambda client: client.info()))
        if not view.manager:
            return view
        try:
            nodes = self._ask("GET /nodes", lambda client: client.nodes())
        except EngineError:
            # A Swarm without a leader lists none; the names are only for the reader.
            return view
        return replace(view, hostnames=parse_hostnames(nodes))

    def networks(self) -> frozenset[str]:
        """See `ports.Directory`."""
        names = frozenset({self._driver}) if self._driver else self._driver_names()
        listed = self._ask("GET /networks", lambda client: client.networks())
        return frozenset(
            _text(item.get("Id")) for item in _list(listed) if item.get("Driver") in names
        )

    def _driver_names(self) -> frozenset[str]:
        plugins = self._ask(
            "GET /plugins",
            lambda client: client.plugins(),  # type: ignore[no-untyped-call]
        )
        names = parse_driver_names(plugins, self._plugin_id)
        if not names:
            # Not "no networks": what isn't listed is taken for removed.
            raise EngineError(
                f"the engine on {self._socket} lists no plugin that is this one; "
                "does the plugin's mount of docker.sock belong to the engine that runs it?"
            )
        return names

    def network(self, network_id: str, *, services: bool = False) -> NetworkView | None:
        """See `ports.Directory`. The same object as before if nothing has changed."""
        path = f"/networks/{urllib.parse.quote(network_id, safe='')}"
        if services:
            path += "?verbose=true"
        question = (network_id, services)
        status, body = self._get(path)
        if status == http.HTTPStatus.NOT_FOUND:
            self._known.pop((network_id, False), None)
            self._known.pop((network_id, True), None)
            return None
        if status != http.HTTPStatus.OK:
            raise EngineError(
                f"the engine answered GET {path} with {status}: {body[:200].decode(errors='replace')}"
            )
        try:
            answer = msgspec.json.decode(body)
        except ValueError as error:
            raise self._failure(f"GET {path}", error) from error
        if not isinstance(answer, dict):
            raise EngineError(f"the engine answered GET {path} with something else than an object")
        plain = _ordered(answer)
        known = self._known.get(question)
        if known is not None and known[0] == plain:
            return known[1]
        view = parse_network(answer)
        if known is not None and known[1] == view:
            view = known[1]
        self._known[question] = (plain, view)
        return view

    def changed_containers(self) -> Iterator[str]:
        """See `ports.Directory`."""
        filters = {"type": ["container"], "event": ["start", "health_status"]}
        events = self._ask(
            "GET /events", lambda client: client.events(filters=filters, decode=True)
        )
        try:
            for event in events:
                yield _text(_items(event).get("id"))
        except (docker.errors.DockerException, requests.RequestException, ValueError) as error:
            raise self._failure("GET /events", error) from error
        finally:
            self._drop()

    def sandbox_key(self, container_id: str) -> str | None:
        """Docker's name of a container's namespace; None if it has none, or there is no such container.

        Waits while the container is being started or stopped.
        """
        answer = self._ask(
            f"GET /containers/{container_id}/json",
            lambda client: _found(lambda: client.inspect_container(container_id)),
        )
        return _text(_items(_items(answer).get("NetworkSettings")).get("SandboxKey")) or None


def _found(question: Callable[[], T]) -> T | None:
    try:
        return question()
    except docker.errors.NotFound:
        return None


def _ordered(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer with each service's tasks in one order, so that equal means unchanged."""
    for service in _items(answer.get("Services")).values():
        tasks = service.get("Tasks") if isinstance(service, dict) else None
        if isinstance(tasks, list):
            tasks.sort(key=repr)
    return answer
