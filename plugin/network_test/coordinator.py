"""The order of a run: look at the Swarm, place the probes, check, remove everything.

Removal happens whatever happened before: an error, Ctrl-C, an engine that ended half way.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from driver.errors import FreeFlowError
from driver.names import is_freeflow
from plugin.cli.client import Client, Engine, host_run
from plugin.network_test.checks_names import check_dns, check_ports, check_reach, check_vip
from plugin.network_test.checks_pairs import (
    check_ipv6,
    check_mtu,
    check_spoofing,
    check_transfer,
    check_udp,
    measure,
)
from plugin.network_test.checks_paths import check_between, check_shm
from plugin.network_test.checks_verbs import check_verbs
from plugin.network_test.gateway import Gateway
from plugin.network_test.interruption import REASON, REMEDY, Interruption
from plugin.network_test.outcomes import NetworkReport
from plugin.network_test.placement import (
    ProbedHost,
    ProbePlacement,
    RunningTest,
    TestedNetwork,
)
from plugin.network_test.plan import Check, TestPlan
from plugin.network_test.probe_image import chosen_image
from plugin.network_test.scene import Ledger, Scene, failed, names, not_here, passed
from plugin.version import VERSION

_IPVS: Final = Path("/proc/net/ip_vs")
_MANAGER: Final = "run it on a manager: docker node ls says which those are"


class Unsuitable(FreeFlowError):
    """This host, or its Swarm, can't be tested."""


@contextmanager
def only_one(folder: Path, command: str = "test") -> Iterator[None]:
    """Hold the lock of a command of this host. Raises RunningTest."""
    with (folder / f"freeflow-{command}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunningTest(
                f"another freeflow {command} runs on this host", remedy="wait until it has ended"
            ) from None
        yield


def manager_info(engine: Engine) -> dict[str, Any]:
    """What the engine says of itself. Raises Unsuitable if it is no manager, EngineError."""
    info: dict[str, Any] = engine.get("/info")
    swarm = info.get("Swarm") or {}
    if swarm.get("LocalNodeState") != "active" or not swarm.get("ControlAvailable"):
        raise Unsuitable("this host is no manager of a Swarm", remedy=_MANAGER)
    return info


def _address_of(node: Mapping[str, Any]) -> str:
    """A node's address. Engines say 0.0.0.0 of the leader, which has reached itself."""
    address = str((node.get("Status") or {}).get("Addr"))
    manager = str((node.get("ManagerStatus") or {}).get("Addr") or "")
    if address in ("0.0.0.0", "::") and manager:
        return manager.rpartition(":")[0].strip("[]")
    return address


def find_driver(engine: Engine) -> str:
    """The name of the plugin's driver. Raises Unsuitable if it is not enabled, EngineError."""
    for plugin in engine.get("/plugins") or ():
        if plugin.get("Enabled") and is_freeflow(str(plugin.get("Name", ""))):
            return str(plugin["Name"])
    raise Unsuitable("the plugin", cause="it is not enabled on this host", remedy="freeflow")


class Coordinator:
    """One run. `say` shows a line of progress."""

    def __init__(self, client: Client, plan: TestPlan, say: Callable[[str], None]) -> None:
        self._client = client
        self._engine = client.engine
        self._plan = plan
        self._ledger = Ledger(say)
        self._hosts: list[ProbedHost] = []
        self._network: TestedNetwork | None = None
        self._gateway: Gateway | None = None
        self._ingress = False
        self._interruption = Interruption()

    def run(self) -> NetworkReport:
        """Raises FreeFlowError before anything was made."""
        started, begin = datetime.now(UTC), time.monotonic()
        error = remedy = ""
        with only_one(host_run()), Interruption() as self._interruption:
            info = manager_info(self._engine)
            driver = "" if self._plan.network else find_driver(self._engine)
            node = str(info["Swarm"]["NodeID"])
            placement = ProbePlacement(self._engine, node)
            for older in placement.remove_older():
                self._ledger.note(f"removed what the test {older} had left")
            try:
                try:
                    self._test(placement, node, str(info["Swarm"].get("NodeAddr", "")), driver)
                finally:
                    self._interruption.hold(self._still_removing)
            except FreeFlowError as caught:
                error, remedy = caught.reason, caught.remedy
            except KeyboardInterrupt:
                self._interruption.hold(self._still_removing)
            finally:
                left = self._remove(placement)
            if self._interruption.came:
                error, remedy = REASON, REMEDY
        return NetworkReport(
            version=VERSION,
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - begin, 3),
            network=self._network.name if self._network else "",
            driver=self._network.driver if self._network else driver,
            hosts=[host.name for host in self._hosts],
            checks=self._ledger.results,
            measurements=self._ledger.measurements,
            error=error,
            remedy=remedy,
            left=left,
        )

    # --- the run

    def _test(self, placement: ProbePlacement, node: str, address: str, driver: str) -> None:
        note = self._ledger.note
        image = chosen_image(self._engine, self._plan)
        if self._plan.network:
            self._network = placement.find_network(self._plan.network)
        else:
            options = {"ipv6": "on"} if self._plan.has(Check.IPV6) else {}
            self._network = placement.make_network(driver, options)
        network = self._network
        note(f"network {network.name} of driver {network.driver}, image {image}")
        self._hosts = self._nodes(node, address, network)
        library = is_freeflow(network.driver) or "freeflow.accelerate" in network.labels
        self._ingress = self._plan.has(Check.PORTS) and _IPVS.exists()
        placement.make_services(network, image, library=library, ingress=self._ingress)
        note(f"waiting for probes on {names(self._hosts)}")
        placement.wait_for_tasks(self._hosts, network, self._plan.seconds)
        self._hosts = [host for host in self._hosts if self._has_probes(host)]
        if not self._hosts:
            why = next(each.detail for each in self._ledger.results if each.detail)
            raise Unsuitable("no host runs a probe", cause=why, remedy=self._image_remedy())
        self._gateway = placement.make_gateway(network, image)
        self._check(
            Scene(
                plan=self._plan,
                client=self._client,
                placement=placement,
                network=network,
                gateway=self._gateway,
                ledger=self._ledger,
                hosts=list(self._hosts),
            )
        )

    def _image_remedy(self) -> str:
        if self._plan.image:
            return f"docker pull {self._plan.image}, on that host"
        return "freeflow test --prepare, on that host; or --image IMAGE, or --registry REGISTRY"

    def _nodes(self, own: str, own_address: str, network: TestedNetwork) -> list[ProbedHost]:
        """The hosts that should run probes."""
        found = []
        for node in self._engine.get("/nodes"):
            description = node.get("Description") or {}
            name = str(description.get("Hostname") or node["ID"])
            state = str((node.get("Status") or {}).get("State"))
            availability = str((node.get("Spec") or {}).get("Availability"))
            address = own_address if node["ID"] == own and own_address else _address_of(node)
            if availability != "active":
                self._ledger.add(Check.PROBE, name, not_here(f"the node is {availability}"))
                continue
            if state != "ready":
                why = f"the node is {state}"
                self._ledger.add(Check.PROBE, name, failed(why, "docker node ls"))
                continue
            plugins = (description.get("Engine") or {}).get("Plugins") or ()
            if is_freeflow(network.driver) and not any(
                each.get("Name") == network.driver for each in plugins
            ):
                why = f"the node has not reported the driver {network.driver}"
                remedy = "docker plugin enable, on that host; it reports it within 20 s"
                self._ledger.add(Check.PROBE, name, failed(why, remedy))
                continue
            found.append(ProbedHost(name, str(node["ID"]), address, node["ID"] == own))
        return sorted(found, key=lambda host: (not host.own, host.name))

    def _has_probes(self, host: ProbedHost) -> bool:
        if host.why:
            self._ledger.add(Check.PROBE, host.name, failed(host.why, self._image_remedy()))
            return False
        self._ledger.add(Check.PROBE, host.name, passed("two probes run"))
        return True

    def _check(self, scene: Scene) -> None:
        steps: tuple[tuple[Check, Callable[[Scene], None]], ...] = (
            (Check.REACH, check_reach),
            (Check.DNS, check_dns),
            (Check.VIP, check_vip),
            (Check.MTU, check_mtu),
            (Check.UDP, check_udp),
            (Check.TRANSFER, check_transfer),
            (Check.IPV6, check_ipv6),
            (Check.SPOOFING, check_spoofing),
            (Check.PORTS, lambda it: check_ports(it, self._ingress)),
            (Check.SHM, check_shm),
            (Check.RELAY, check_between),
            (Check.VERBS, check_verbs),
            (Check.MEASURE, measure),
        )
        for check, step in steps:
            if self._plan.has(check):
                self._ledger.note(f"{check.value}: {names(scene.hosts)}")
                step(scene)
            self._interruption.check()

    def _remove(self, placement: ProbePlacement) -> list[str]:
        self._ledger.note("removing the probes")
        if self._gateway is not None:
            self._gateway.close()
        return placement.remove()

    def _still_removing(self) -> None:
        self._ledger.note("still removing the probes; the next run would do it")
