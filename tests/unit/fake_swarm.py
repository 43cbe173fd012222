"""An engine that is a manager of a Swarm, in memory, with the probes of `freeflow test`.

Its probes answer by a table, so that a test can break one thing. Its gateway is a thread that
speaks the container's stream.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from urllib.parse import parse_qs, urlparse

from driver.errors import EngineError

Answer = Callable[[str, str, dict[str, Any]], Any]
"""From address, call and arguments; an exception is what the probe fails with."""
DRIVER = "freeflow:latest"
NET = "n" * 25


class UnreachedError(Exception):
    """The gateway does not reach the probe."""


class FakeSwarm:
    """`plugin.cli.client.Engine` without a socket. `hosts` are names of nodes."""

    def __init__(self, hosts: tuple[str, ...] = ("h1", "h2", "h3")) -> None:
        self.hosts = hosts
        self.manager = True
        self.services: dict[str, dict[str, Any]] = {}
        self.networks: dict[str, dict[str, Any]] = {}
        self.containers: dict[str, dict[str, Any]] = {}
        self.images = {"image:1"}
        self.requests: list[str] = []
        self.refuse: Callable[[str, str], str] = lambda _method, _url: ""
        """Why a request fails; empty: it doesn't."""
        self.lacking: dict[str, str] = {}
        """Node to why its tasks don't run."""
        self.answers: dict[str, Answer] = {}
        self.privileges: list[dict[str, Any]] = [{"Name": "network", "Value": ["host"]}]
        """Those that a new version asks for; the installed one has the first."""
        self.upgraded: list[str] = []
        """Nodes whose plugin was upgraded, in this order."""
        self.failing: dict[str, str] = {}
        """Node to what the task that upgrades it says when it fails."""
        self._numbers = count(1)

    # --- the interface of Engine

    def get(self, url: str) -> Any:
        found = self.find(url)
        if found is None:
            raise EngineError(f"the engine answered {url} with 404")
        return found

    def find(self, url: str) -> Any | None:
        self._note("GET", url)
        path = urlparse(url).path.strip("/").split("/")
        match path:
            case ["info"]:
                return {
                    "Swarm": {
                        "LocalNodeState": "active",
                        "ControlAvailable": self.manager,
                        "NodeID": "node-h1",
                        "NodeAddr": "192.0.2.1",
                    }
                }
            case ["plugins"]:
                return [{"Name": DRIVER, "Enabled": True}]
            case ["plugins", "privileges"]:
                return self.privileges
            case ["plugins", _, "json"]:
                return {"Config": {"Network": {"Type": "host"}}}
            case ["nodes", identifier]:
                return next(each for each in self.find("/nodes") or () if each["ID"] == identifier)
            case ["nodes"]:
                return [_node(name, number) for number, name in enumerate(self.hosts, 1)]
            case ["tasks"]:
                return list(self._tasks(self._filter(url, "service")))
            case ["networks"]:
                return self._labelled(url, self.networks, lambda each: each)
            case ["services"]:
                return self._labelled(url, self.services, lambda each: each["Spec"])
            case ["containers", "json"]:
                return self._labelled(url, self.containers, lambda each: each)
            case ["networks", name]:
                return next((n for n in self.networks.values() if n["Name"] == name), None)
            case ["services", identifier]:
                return self.services.get(identifier)
            case ["images", *name, "json"]:
                return {} if "/".join(name) in self.images else None
        raise AssertionError(url)

    def change(self, method: str, url: str, value: Any = None) -> Any:
        self._note(method, url)
        path = urlparse(url).path.strip("/").split("/")
        if method == "DELETE":
            kind = getattr(self, path[0])
            if path[0] == "networks" and any("test" in name for name in self.services):
                raise EngineError("network in use")
            kind.pop(path[1], None)
            return None
        match path:
            case ["networks", "create"]:
                made = {**value, "Id": NET, "Scope": "swarm"}
                self.networks[NET] = made
                return {"Id": NET}
            case ["services", "create"]:
                identifier = f"service-{value['Name']}"
                if "freeflow.upgrade" in value["Labels"]:
                    self.upgraded.append(value["Labels"]["freeflow.upgrade"])
                vips = [{"NetworkID": NET, "Addr": "10.0.1.99/24"}]
                self.services[identifier] = {
                    "ID": identifier,
                    "Spec": value,
                    "Endpoint": {"VirtualIPs": vips, "Ports": []},
                }
                return {"ID": identifier}
            case ["containers", "create"]:
                identifier = f"container{next(self._numbers)}"
                self.containers[identifier] = {**value, "Id": identifier}
                return {"Id": identifier}
            case ["containers", _, "start"]:
                return None
        raise AssertionError(url)

    def work(self, url: str, *_: Any) -> None:
        self._note("POST", url)
        self.images.add("made")

    def read(self, url: str) -> bytes:
        """What the tasks of a service have said."""
        self._note("GET", url)
        (service,) = (each for each in self.services if each in url)
        node = self.services[service]["Spec"]["Labels"]["freeflow.upgrade"]
        text = f"begun\nerror: {self.failing[node]}\n".encode()
        return struct.pack("!BxxxI", 1, len(text)) + text

    def attach(self, container: str) -> socket.socket:
        own, theirs = socket.socketpair()
        threading.Thread(target=self._gateway, args=(container, theirs), daemon=True).start()
        return own

    # --- inside

    def _note(self, method: str, url: str) -> None:
        self.requests.append(f"{method} {url.partition('?')[0]}")
        why = self.refuse(method, url)
        if why:
            raise EngineError(f"the engine refused {method} {url}", cause=why)

    @staticmethod
    def _filter(url: str, name: str) -> list[str]:
        filters = json.loads(parse_qs(urlparse(url).query).get("filters", ["{}"])[0])
        return list(filters.get(name, []))

    def _labelled(self, url: str, objects: dict[str, Any], spec: Callable[[Any], Any]) -> list[Any]:
        (wanted,) = self._filter(url, "label")
        name, _, value = wanted.partition("=")
        return [
            each
            for each in objects.values()
            if name in (spec(each).get("Labels") or {})
            and (not value or spec(each)["Labels"][name] == value)
        ]

    def _tasks(self, services: list[str]) -> Iterator[dict[str, Any]]:
        for service in services:
            node = self.services[service]["Spec"]["Labels"].get("freeflow.upgrade")
            if node:
                yield {"Status": {"State": "failed" if node in self.failing else "complete"}}
                return
        for number, host in enumerate(self.hosts, 1):
            for service in services:
                last = number if service.endswith("-one") else 100 + number
                why = self.lacking.get(host)
                yield {
                    "NodeID": f"node-{host}",
                    "Status": {"State": "rejected", "Err": why} if why else {"State": "running"},
                    "NetworksAttachments": [
                        {"Network": {"ID": NET}, "Addresses": [f"10.0.1.{last}/24"]}
                    ],
                }

    def _gateway(self, container: str, stream: socket.socket) -> None:
        def say(value: dict[str, Any]) -> None:
            text = json.dumps(value).encode() + b"\n"
            # In two frames, as the engine may cut them.
            for part in (text[:3], text[3:]):
                stream.sendall(struct.pack("!BxxxI", 1, len(part)) + part)

        try:
            self._serve(stream, say)
        except OSError:
            pass
        # As with AutoRemove: it ends with its standard input.
        self.containers.pop(container, None)

    def _serve(self, stream: socket.socket, say: Callable[[dict[str, Any]], None]) -> None:
        say({"ready": True})
        for line in stream.makefile():
            request = json.loads(line)
            answer: dict[str, Any] = {"id": request["id"]}
            try:
                known = self.answers[request["call"]]
                answer["value"] = known(request["to"], request["call"], request["arguments"])
            except UnreachedError as error:
                answer["unreachable"] = str(error)
            except Exception as error:
                answer["error"] = f"{type(error).__name__}: {error}"
            say(answer)


def _node(name: str, number: int) -> dict[str, Any]:
    return {
        "ID": f"node-{name}",
        "Description": {"Hostname": name, "Engine": {"Plugins": [{"Name": DRIVER}]}},
        "Status": {"State": "ready", "Addr": f"192.0.2.{number}"},
        "Spec": {"Availability": "active"},
    }
