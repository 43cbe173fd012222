"""The checks of reaching probes: by address, by name, by the VIP, by published ports."""

from __future__ import annotations

import socket
import time
from typing import Any, Final

from plugin.network_test.gateway import PendingAnswer, ProbeError, Unreachable
from plugin.network_test.placement import ROLES, ProbedHost
from plugin.network_test.plan import Check
from plugin.network_test.scene import Scene, Verdict, failed, names, not_here, passed

_GOSSIP: Final = 30.0
"""Seconds until all hosts know of all tasks."""
_WITNESSES: Final = 3
_CONNECTING: Final = 5.0


def check_reach(scene: Scene) -> None:
    """Whether the probes of all hosts answer over the network. Those that don't are left out."""
    end = time.monotonic() + _GOSSIP
    missing: dict[str, str] = {}
    while True:
        pending = {
            address: scene.gateway.start(address, "hello", 5.0)
            for host in scene.hosts
            for address in host.probes.values()
            if address not in scene.facts
        }
        missing = {}
        for address, answer in pending.items():
            try:
                scene.facts[address] = dict(answer.result())
            except (Unreachable, ProbeError, TypeError, ValueError) as error:
                missing[address] = str(error)
        if not missing or time.monotonic() > end:
            break
        time.sleep(0.3)
    lost = [host for host in scene.hosts if missing.keys() & set(host.probes.values())]
    scene.hosts = [host for host in scene.hosts if host not in lost]
    for host in scene.hosts:
        scene.ledger.add(Check.REACH, host.name, passed("both probes answer"))
    for host in lost:
        scene.ledger.add(Check.REACH, host.name, _unreached(scene, host, missing))


def _unreached(scene: Scene, host: ProbedHost, missing: dict[str, str]) -> Verdict:
    """Who else does not reach a host's probes: where the fault is."""
    why = next(missing[each] for each in host.probes.values() if each in missing)
    witnesses = scene.hosts[:_WITNESSES]
    pending = [
        (witness, scene.gateway.start(witness.two, "identities", 20.0, to=host.one, **_ONCE))
        for witness in witnesses
    ]
    reaching: list[ProbedHost] = []
    failing: list[ProbedHost] = []
    for witness, answer in pending:
        try:
            (reaching if answer.result()["answers"] else failing).append(witness)
        except (Unreachable, ProbeError, KeyError, TypeError):
            failing.append(witness)
    port = scene.network.options.get("freeflow.port", "4789")
    text = f"this host gets no answer from its probe ({why}); nor do {names(failing)}"
    if reaching:
        text += f"; it answers {names(reaching)}"
    return failed(
        text,
        f"open UDP port {port} between {host.address} and the other hosts, in both directions; "
        "then, on that host: freeflow doctor",
    )


_ONCE: Final[dict[str, Any]] = {"count": 1, "seconds": 6.0, "enough": 1}


def check_dns(scene: Scene) -> None:
    """Docker's names on each host: the service's is its VIP, tasks.SERVICE are all its tasks; the
    name of a service without a VIP, too.
    """
    one, two = (scene.placement.service_name(role) for role in ROLES)
    tasks = {role: {host.probes[role] for host in scene.hosts} for role in ROLES}
    wanted = {
        one: set(scene.placement.vips(scene.network)),
        f"tasks.{one}": tasks["one"],
        two: tasks["two"],
        f"tasks.{two}": tasks["two"],
    }
    end = time.monotonic() + _GOSSIP
    begin = time.monotonic()
    left = list(scene.hosts)
    while left:
        late = time.monotonic() > end
        pending = [
            (host, scene.gateway.start(host.two, "resolve", 30.0, names=list(wanted)))
            for host in left
        ]
        left = []
        for host, answer in pending:
            verdict = scene.judged(answer, lambda found: _names_right(found, wanted))
            if verdict[0] == "passed" or late:
                scene.ledger.add(Check.DNS, host.name, verdict, time.monotonic() - begin)
            else:
                left.append(host)
        if left:
            time.sleep(0.5)


def _names_right(found: dict[str, Any], wanted: dict[str, set[str]]) -> Verdict:
    for name, addresses in wanted.items():
        answer = found[name]
        # More may be there: a host that is not reached has a task, too.
        if not isinstance(answer, list):
            return failed(f"{name} is not resolved: {answer}", "freeflow status, on that host")
        lacking = addresses - set(answer)
        if lacking:
            return failed(
                f"{name} lacks {', '.join(sorted(lacking))}: the host has not heard of them",
                "open TCP and UDP port 7946 between the hosts (Swarm's gossip)",
            )
    return passed(f"{len(wanted)} names")


def check_vip(scene: Scene) -> None:
    """From each host the VIP leads to the tasks of all hosts."""
    vips = scene.placement.vips(scene.network)
    count = len(scene.hosts)
    if not vips:
        for host in scene.hosts:
            scene.ledger.add(Check.VIP, host.name, failed("the Swarm gave the service no VIP"))
        return
    even = scene.network.options.get("balance", "even") == "even"
    nodes = {host.node: host.name for host in scene.hosts}

    def start(host: ProbedHost) -> PendingAnswer:
        return scene.gateway.start(
            *(host.two, "identities", 60.0),
            to=vips[0],
            count=40 + 10 * count,
            seconds=30.0,
            enough=count if even else 1,
        )

    def judge(host: ProbedHost, found: Any) -> Verdict:
        if found["failures"]:
            return failed(
                f"connections to the VIP {vips[0]} failed: {found['failures'][0]}",
                "freeflow status, on that host: it lists the service's tasks",
            )
        seen = {nodes.get(str(name).partition("/")[0], "") for name in found["answers"]} - {""}
        lacking = sorted(set(nodes.values()) - seen)
        if (even and lacking) or not seen:
            return failed(
                f"connections to the VIP {vips[0]} never led to {', '.join(lacking)}",
                "freeflow status, on that host: it lists the service's tasks",
            )
        return passed(f"{len(seen)} of {count} tasks answered")

    scene.each_host(Check.VIP, start, judge)


def check_ports(scene: Scene, ingress: bool) -> None:
    """From this host: the port that each host publishes for its own task, and the one of the
    routing mesh.
    """
    for host in scene.hosts:
        begin = time.monotonic()
        port = host.ports.get("two", 0)
        verdict = _published(host.address, port, f"{host.node}/two")
        scene.ledger.add(Check.PORTS, f"{host.name} (host)", verdict, time.monotonic() - begin)
    if not ingress:
        why = "this host's kernel has no IPVS, which Docker's routing mesh needs"
        scene.ledger.add(Check.PORTS, "ingress", not_here(why))
        return
    port = scene.placement.ingress_port()
    for host in scene.hosts:
        begin = time.monotonic()
        verdict = _published(host.address, port, "/one")
        scene.ledger.add(Check.PORTS, f"{host.name} (ingress)", verdict, time.monotonic() - begin)


def _published(address: str, port: int, wanted: str) -> Verdict:
    """Whether a task with this name answers at a published port; some seconds after its start."""
    if not port:
        return failed("Docker has published no port", "docker service ps, journalctl -u docker")
    end = time.monotonic() + 2 * _CONNECTING
    while True:
        try:
            with socket.create_connection((address, port), timeout=_CONNECTING) as connection:
                # In one piece: who sends a byte now and then is no probe, and is not waited for.
                name = connection.recv(200).decode(errors="replace").partition("\n")[0].strip()
            if name.endswith(wanted):
                return passed(f"{address}:{port}")
            why = f"another program answers: {name[:80]}" if name else "nothing answers"
        except OSError as error:
            why = str(error)
        if time.monotonic() > end:
            return failed(
                f"{address}:{port}: {why}",
                "check that no firewall drops this TCP port between this host and that one",
            )
        time.sleep(0.5)
