"""What a run makes in the Swarm, and its removal: a network, two services with a task on each host,
and the gateway's container.

Everything has the label `freeflow.test`. Removal lists by that label and does not trust memory: the
engine may have made something although its answer was lost. A run that was killed is cleaned up by
the next one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote

import msgspec

from driver.errors import EngineError, FreeFlowError
from plugin.cli.client import Engine
from plugin.cli.preload import FOLDER
from plugin.network_test import boot
from plugin.network_test.gateway import Gateway
from plugin.network_test.probe.probe_wire import IDENTITY

LABEL: Final = "freeflow.test"
UNTIL: Final = "freeflow.test.until"
"""The label with the time, in seconds since 1970, at which the run is over for certain."""
NODE: Final = "freeflow.test.node"
"""The label with the ID of the node where the run's command is."""
LONGEST_RUN: Final = 1800.0
ROLES: Final = ("one", "two")
"""The services; the first has a VIP."""
_ENDED: Final = frozenset({"complete", "shutdown", "failed", "rejected", "remove", "orphaned"})
_REMOVAL: Final = 90.0
"""Seconds: Docker itself takes up to 20 to detach what has failed."""
_ATTACHING: Final = 4
_PAUSE: Final = 0.5


class RunningTest(FreeFlowError):
    """Another run has not ended yet."""


@dataclass(slots=True)
class ProbedHost:
    """A host of the Swarm and its two probes; `own`: it is this one. `why`: it has none."""

    name: str
    node: str
    address: str
    own: bool = False
    probes: dict[str, str] = field(default_factory=dict)
    """Role to address on the network,"""
    ports: dict[str, int] = field(default_factory=dict)
    """and to the port that is published on the host."""
    why: str = ""

    @property
    def one(self) -> str:
        return self.probes["one"]

    @property
    def two(self) -> str:
        return self.probes["two"]


@dataclass(frozen=True, slots=True)
class TestedNetwork:
    """The network under test; `made`: by this run."""

    __test__ = False

    id: str
    name: str
    driver: str
    made: bool
    options: Mapping[str, str]
    labels: Mapping[str, str]


def _filters(**wanted: list[str]) -> str:
    return "filters=" + quote(msgspec.json.encode(wanted).decode())


class ProbePlacement:
    """The objects of one run. `identifier` is in their names."""

    def __init__(
        self,
        engine: Engine,
        node: str,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._node = node
        self._sleep = sleep
        self._clock = clock
        self.identifier = secrets.token_hex(4)
        self._key = secrets.token_bytes(32)
        self._services: dict[str, str] = {}

    @property
    def _labels(self) -> dict[str, str]:
        until = str(int(time.time() + LONGEST_RUN))
        return {LABEL: self.identifier, UNTIL: until, NODE: self._node}

    def service_name(self, role: str) -> str:
        """The name of a service, which Docker's DNS has."""
        return f"freeflow-test-{self.identifier}-{role}"

    def vips(self, network: TestedNetwork) -> list[str]:
        """The VIPs of the first service. Raises EngineError."""
        found = self._engine.get(f"/services/{self._services['one']}")
        return [
            str(each.get("Addr", "")).partition("/")[0]
            for each in (found.get("Endpoint") or {}).get("VirtualIPs") or ()
            if each.get("NetworkID") == network.id
        ]

    def ingress_port(self) -> int:
        """The port of the first service on every host, 0 without one. Raises EngineError."""
        found = self._engine.get(f"/services/{self._services['one']}")
        ports = (found.get("Endpoint") or {}).get("Ports") or ()
        return next((int(each.get("PublishedPort", 0)) for each in ports), 0)

    # --- making

    def make_network(self, driver: str, options: Mapping[str, str]) -> TestedNetwork:
        """Raises EngineError."""
        name = f"freeflow-test-{self.identifier}"
        self._engine.change(
            "POST",
            "/networks/create",
            {
                "Name": name,
                "Driver": driver,
                "Attachable": True,
                "Options": dict(options),
                "Labels": self._labels,
            },
        )
        return self.find_network(name, made=True)

    def find_network(self, name: str, *, made: bool = False, seconds: float = 20) -> TestedNetwork:
        """Raises EngineError, if it isn't there or the manager did not allocate it."""
        end = self._clock() + seconds
        while True:
            found = self._engine.find(f"/networks/{quote(name, safe='')}")
            # A network without a driver has not been allocated yet, or has been refused.
            if found and found.get("Driver"):
                break
            if not made or self._clock() > end:
                raise EngineError(
                    f"network {name}",
                    cause="the Swarm did not allocate it" if found else "it doesn't exist",
                    remedy="freeflow status" if found else "docker network ls",
                )
            self._sleep(0.3)
        if not found.get("Attachable") or found.get("Scope") != "swarm":
            raise EngineError(
                f"network {name}",
                cause="the test's containers can join only attachable networks of the Swarm",
                remedy="docker network create --attachable, or test without --network",
            )
        return TestedNetwork(
            id=str(found["Id"]),
            name=str(found["Name"]),
            driver=str(found["Driver"]),
            made=made,
            options=found.get("Options") or {},
            labels=found.get("Labels") or {},
        )

    def make_services(
        self, network: TestedNetwork, image: str, *, library: bool, ingress: bool
    ) -> None:
        """Raises EngineError."""
        for role in ROLES:
            port = {"Protocol": "tcp", "TargetPort": IDENTITY}
            ports = [{**port, "PublishMode": "host"}] if role == "two" else []
            if role == "one" and ingress:
                ports = [{**port, "PublishMode": "ingress"}]
            variables = boot.environment(boot.PROBE, self._key, f"{{{{.Node.ID}}}}/{role}")
            mount = {"Type": "bind", "Source": FOLDER, "Target": FOLDER}
            made = self._engine.change(
                "POST",
                "/services/create",
                {
                    "Name": self.service_name(role),
                    "Labels": self._labels,
                    "TaskTemplate": {
                        "ContainerSpec": {
                            "Image": image,
                            "Command": list(boot.COMMAND),
                            "User": "0",
                            "Env": [f"{name}={value}" for name, value in variables.items()],
                            "Mounts": [mount] if library else [],
                            "StopGracePeriod": 1_000_000_000,
                        },
                        "RestartPolicy": {"Condition": "none"},
                        "Networks": [{"Target": network.id}],
                    },
                    "Mode": {"Global": {}},
                    "EndpointSpec": {"Mode": "vip" if role == "one" else "dnsrr", "Ports": ports},
                },
            )
            self._services[role] = str(made["ID"])

    def wait_for_tasks(
        self, hosts: list[ProbedHost], network: TestedNetwork, seconds: float
    ) -> None:
        """Wait until each host has both probes, or it is known why not. Raises EngineError."""
        end = self._clock() + seconds
        waiting = True
        while waiting and self._clock() < end:
            self._sleep(_PAUSE)
            waiting = self._look(hosts, network)
        for host in hosts:
            if len(host.probes) < len(ROLES) and not host.why:
                host.why = f"no task ran within {seconds:g} s"

    def _look(self, hosts: list[ProbedHost], network: TestedNetwork) -> bool:
        """Read the tasks; whether some host may still get its probes."""
        by_node = {host.node: host for host in hosts}
        waiting: dict[str, str] = {}
        for role, service in self._services.items():
            for task in self._engine.get(f"/tasks?{_filters(service=[service])}"):
                host = by_node.get(str(task.get("NodeID", "")))
                if host is None:
                    continue
                status = task.get("Status") or {}
                state = status.get("State")
                if state == "running":
                    host.probes[role] = _address(task, network)
                    for port in (status.get("PortStatus") or {}).get("Ports") or ():
                        if port.get("PublishMode") == "host":
                            host.ports[role] = int(port.get("PublishedPort", 0))
                elif state in _ENDED:
                    host.why = str(status.get("Err") or status.get("Message") or state)[:300]
                else:
                    waiting[host.node] = str(status.get("Err") or "")
        return any(len(host.probes) < len(ROLES) and not host.why for host in hosts)

    def make_gateway(self, network: TestedNetwork, image: str) -> Gateway:
        """Raises EngineError, GatewayLost."""
        for attempt in range(1, _ATTACHING + 1):
            try:
                return self._make_gateway(network, image, attempt)
            except EngineError as error:
                # The Swarm was busy (it has 20 s), or withdrew a late attachment.
                late = "attaching to network failed" in str(error) or "not found" in str(error)
                if not late or attempt == _ATTACHING:
                    raise
                self._sleep(1)
        raise AssertionError

    def _make_gateway(self, network: TestedNetwork, image: str, attempt: int) -> Gateway:
        variables = boot.environment(boot.GATEWAY, self._key)
        made = self._engine.change(
            "POST",
            f"/containers/create?name={self.service_name('gateway')}-{attempt}",
            {
                "Image": image,
                "Entrypoint": list(boot.COMMAND),
                "Cmd": [],
                "User": "0",
                "Env": [f"{name}={value}" for name, value in variables.items()],
                "Labels": self._labels,
                "OpenStdin": True,
                "StdinOnce": True,
                "AttachStdin": True,
                "AttachStdout": True,
                "AttachStderr": True,
                "StopTimeout": 1,
                "HostConfig": {
                    "NetworkMode": network.name,
                    "AutoRemove": True,
                    "LogConfig": {"Type": "none"},
                },
            },
        )
        container = str(made["Id"])
        stream = self._engine.attach(container)
        try:
            self._engine.change("POST", f"/containers/{container}/start")
        except BaseException:
            stream.close()
            raise
        gateway = Gateway(stream)
        gateway.wait_ready(30)
        return gateway

    # --- removal

    def remove(self, identifier: str = "", seconds: float = _REMOVAL) -> list[str]:
        """Remove what a run has made, by default this one; what is left after `seconds`."""
        wanted = f"{LABEL}={identifier or self.identifier}"
        end = self._clock() + seconds
        while True:
            try:
                left = self._remove_once(wanted)
            except EngineError as error:
                left = [f"everything with the label {wanted} ({error.reason})"]
            if not left or self._clock() > end:
                return left
            self._sleep(_PAUSE)

    def _remove_once(self, wanted: str) -> list[str]:
        """Remove containers, then services, then networks: each uses the next."""
        label = _filters(label=[wanted])
        left = []
        for container in self._engine.get(f"/containers/json?all=1&{label}") or ():
            left.append(f"container {str(container['Id'])[:12]}")
            self._try(f"/containers/{container['Id']}?force=1&v=1")
        for service in self._engine.get(f"/services?{label}") or ():
            left.append(f"service {service['Spec']['Name']}")
            self._try(f"/services/{service['ID']}")
        for network in self._engine.get(f"/networks?{label}") or ():
            left.append(f"network {network['Name']}")
            self._try(f"/networks/{network['Id']}")
        return left

    def _try(self, url: str) -> None:
        try:
            self._engine.change("DELETE", url)
        except EngineError:
            # It is listed again, and tried again: a network is in use until its tasks have ended.
            return

    def remove_older(self) -> list[str]:
        """Remove what earlier runs have left, by their labels; which.

        Raises:
            RunningTest: one of them may still run, on another node.
            EngineError: it can't be listed.
        """
        found: dict[str, dict[str, str]] = {}
        label = _filters(label=[LABEL])
        for service in self._engine.get(f"/services?{label}") or ():
            labels = service["Spec"].get("Labels") or {}
            found[labels[LABEL]] = labels
        for kind in ("/networks?", "/containers/json?all=1&"):
            for each in self._engine.get(f"{kind}{label}") or ():
                labels = each.get("Labels") or {}
                found.setdefault(labels[LABEL], labels)
        for identifier, labels in found.items():
            if labels.get(NODE) != self._node and not _is_over(labels.get(UNTIL, "")):
                raise RunningTest(
                    f"the test {identifier} runs, from another manager",
                    cause=f"its services have the label {LABEL}={identifier}",
                    remedy=f"wait until it ends, or: docker service rm $(docker service ls -q --filter label={LABEL}={identifier})",
                )
        for identifier in found:
            self.remove(identifier)
        return sorted(found)


def _is_over(until: str) -> bool:
    """Whether a run with this label has ended. Containers have the labels of their images, which
    may say anything: no run ends later than one that begins now, but for the clocks of managers.
    """
    try:
        return not 0 <= int(until) - time.time() <= 2 * LONGEST_RUN
    except ValueError:
        return True


def _address(task: Mapping[str, Any], network: TestedNetwork) -> str:
    for attachment in task.get("NetworksAttachments") or ():
        if (attachment.get("Network") or {}).get("ID") == network.id:
            for address in attachment.get("Addresses") or ():
                return str(address).partition("/")[0]
    return ""
