"""Reads networks, peers, services and containers from the engine's API on this host.

Only background work may use it: the engine does not serve its API while it starts, and holds locks
while it waits for an answer of ours (docker-net-dhcp#23, libnetwork#414).

Networks are polled all the time. Requests for one object use a connection of our own: through the
SDK, each costs five times the CPU. The SDK negotiates the API's version and makes all others.
"""

from __future__ import annotations

import http.client
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from driver.answers import (
    SERVICE_NAME,
    configured,
    items,
    objects,
    ordered,
    parse_configuration,
    parse_driver_names,
    parse_engine,
    parse_hostnames,
    parse_labels,
    parse_network,
    parse_networks,
    text_of,
)
from driver.errors import EngineError
from driver.model import EngineView, NetworkView
from driver.unix_http import UnixConnection

if TYPE_CHECKING:
    import docker

T = TypeVar("T")

_READ_LOG: Final = "read the engine's log: journalctl -u docker"


def _failures() -> tuple[type[Exception], ...]:
    """The exceptions of the SDK.

    The SDK is imported at its first use: the import takes longer than everything else between the
    plugin's start and its first answer, which doesn't need it.
    """
    import docker
    import requests

    return docker.errors.DockerException, requests.RequestException, ValueError


class DockerDirectory:
    """`ports.Directory` over the engine's socket. Safe from any thread: each has its own
    connections.

    `timeout` bounds each wait, in seconds. `plugin_id` is our ID as a plugin, if known. `driver` is
    the driver's name where we aren't a plugin of this engine.
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
        # The last answer to each request, with its view: most answers are equal to the last.
        self._known: dict[tuple[str, bool], tuple[object, NetworkView]] = {}

    # --- the SDK

    def _client(self) -> docker.APIClient:
        client: docker.APIClient | None = getattr(self._local, "client", None)
        if client is None:
            import docker

            client = docker.APIClient(
                f"unix://{self._socket}", version="auto", timeout=int(max(1, self._timeout))
            )
            self._local.client = client
        return client

    def _ask(self, what: str, question: Callable[[docker.APIClient], T]) -> T:
        try:
            return question(self._client())
        except _failures() as error:
            self._drop()
            raise self._failure(what, error) from error

    def _failure(self, what: str, error: Exception) -> EngineError:
        return EngineError(
            f"the engine did not answer {what} on {self._socket}",
            cause=str(error),
            remedy="check that dockerd runs: systemctl status docker",
        )

    def _drop(self) -> None:
        """Forget this thread's connections: the engine may come back with another version."""
        client: docker.APIClient | None = getattr(self._local, "client", None)
        connection: UnixConnection | None = getattr(self._local, "connection", None)
        self._local.client = self._local.connection = None
        if client is not None:
            client.close()
        if connection is not None:
            connection.close()

    # --- requests without the SDK

    def _get(self, path: str) -> tuple[int, bytes]:
        """A GET over the kept connection, repeated over a new one if the engine has closed it."""
        version = self._ask("GET /version", lambda client: client.api_version)
        kept: UnixConnection | None = getattr(self._local, "connection", None)
        connection = kept or UnixConnection(self._socket, self._timeout)
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

    def _object(self, path: str) -> dict[str, Any] | None:
        """The object that answers a GET; None: the engine knows no such thing."""
        return self._read(path, dict[str, Any])

    def _read(self, path: str, kind: type[T]) -> T | None:
        """The JSON value that answers a GET; None: the engine knows no such thing."""
        status, body = self._get(path)
        if status == http.HTTPStatus.NOT_FOUND:
            return None
        if status != http.HTTPStatus.OK:
            raise EngineError(
                f"the engine answered GET {path} with {status}",
                cause=body[:200].decode(errors="replace"),
                remedy=_READ_LOG,
            )
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise EngineError(
                f"the engine answered GET {path} with another kind of value",
                cause=str(error),
                remedy=_READ_LOG,
            ) from error

    # --- ports.Directory

    def engine(self) -> EngineView:
        view = parse_engine(self._ask("GET /info", lambda client: client.info()))
        if not view.manager:
            return view
        try:
            nodes = self._ask("GET /nodes", lambda client: client.nodes())
        except EngineError:
            # A Swarm without a leader lists no nodes. Only people read the names.
            return view
        return replace(view, hostnames=parse_hostnames(nodes))

    def networks(self) -> frozenset[str]:
        names = frozenset({self._driver}) if self._driver else self._driver_names()
        listed = self._ask("GET /networks", lambda client: client.networks())
        return frozenset(
            text_of(item.get("Id")) for item in objects(listed) if item.get("Driver") in names
        )

    def _driver_names(self) -> frozenset[str]:
        plugins = self._ask(
            "GET /plugins",
            lambda client: client.plugins(),  # type: ignore[no-untyped-call]
        )
        names = parse_driver_names(plugins, self._plugin_id)
        if not names:
            # Not an empty set: networks that aren't listed would be removed.
            raise EngineError(
                f"the engine on {self._socket}",
                cause="it lists no plugin that is this one",
                remedy="check that the plugin's mount of docker.sock is of the engine that runs it",
            )
        return names

    def network(self, network_id: str, *, services: bool = False) -> NetworkView | None:
        """The engine's view of a network; the same object as before if nothing has changed, unless
        a configuration of this host adds to it."""
        path = f"/networks/{urllib.parse.quote(network_id, safe='')}"
        if services:
            path += "?verbose=true"
        question = (network_id, services)
        answer = self._object(path)
        if answer is None:
            self._known.pop((network_id, False), None)
            self._known.pop((network_id, True), None)
            return None
        plain = ordered(answer)
        known = self._known.get(question)
        if known is not None and known[0] == plain:
            return self._configured(known[1])
        view = parse_network(answer)
        if known is not None and known[1] == view:
            view = known[1]
        self._known[question] = (plain, view)
        return self._configured(view)

    def _configured(self, view: NetworkView) -> NetworkView:
        if not view.configuration or view.labels or view.options:
            return view
        answer = self._object(f"/networks/{urllib.parse.quote(view.configuration, safe='')}")
        return configured(view, parse_configuration(answer or {}))

    def labels(self, key: str, *, manager: bool) -> dict[str, str]:
        containers = self._with_labels("/containers/json", key, SERVICE_NAME)
        services = self._with_labels("/services", key) if manager else []
        return parse_labels(key, containers, services)

    def _with_labels(self, path: str, *keys: str) -> list[Any]:
        """The items of a list that have labels."""
        filters = msgspec.json.encode({"label": keys}).decode()
        return self._read(f"{path}?filters={urllib.parse.quote(filters)}", list[Any]) or []

    def all_networks(self) -> tuple[NetworkView, ...]:
        return parse_networks(self._read("/networks", list[Any]))

    def changed_networks(self) -> Iterator[str]:
        events = ["create", "connect", "disconnect", "destroy", "remove"]
        yield from self._events("network", events)

    def changed_containers(self) -> Iterator[str]:
        yield from self._events("container", ["start", "health_status"])

    def _events(self, kind: str, names: list[str]) -> Iterator[str]:
        """IDs of the objects of events, until the engine ends. First "", once it lists them."""
        filters = {"type": [kind], "event": names}
        events = self._ask(
            "GET /events", lambda client: client.events(filters=filters, decode=True)
        )
        try:
            yield ""
            for event in events:
                # Events of networks have the ID only there.
                yield text_of(items(items(event).get("Actor")).get("ID"))
        except _failures() as error:
            raise self._failure("GET /events", error) from error
        finally:
            self._drop()

    def sandbox_key(self, container_id: str) -> str | None:
        """Docker's path of a container's namespace. Waits while the container starts or stops."""
        answer = self._object(f"/containers/{urllib.parse.quote(container_id, safe='')}/json")
        return text_of(items(items(answer).get("NetworkSettings")).get("SandboxKey")) or None
