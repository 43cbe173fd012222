"""`make demo`: a Swarm of two Docker hosts on this machine, a stack of real services on FreeFlow, and how fast it is.

Everything happens in namespaces of its own; the machine's Docker, if any, isn't touched. Whatever happens, all is
taken down at the end, unless KEEP=1. The exit code is 0 only if everything shown worked.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from types import FrameType
from typing import Any, Final

from bench import bed, parse
from bench.errors import BenchError
from bench.place import CONGESTION_CONTROL, Place, congestion_control_allowed
from bench.report import columns, number, times
from bench.stats import FREEFLOW, OVERLAY
from tests.testbed import Bed, BedInUseError, CommandError, Host, wait_until

TOP: Final = Path(__file__).resolve().parents[1]
STACK_FILE: Final = Path(__file__).with_name("demo-stack.yml")
NAME: Final = "demo"
ROUNDS: Final = 3
NETWORKS: Final = {FREEFLOW: bed.PLUGIN, OVERLAY: "overlay"}


class DemoError(Exception):
    """Something that the demo shows didn't work."""


@dataclass(slots=True)
class Teller:
    """Says what happens, why, and since when."""

    start: float = field(default_factory=time.monotonic)

    def step(self, what: str, why: str = "") -> None:
        print(f"\n[{time.monotonic() - self.start:5.0f} s] {what}", flush=True)
        if why:
            print(f"          {why}", flush=True)

    def command(self, host: Host, line: str) -> None:
        print(f"          {host.name}# {line}", flush=True)

    def seen(self, what: str) -> None:
        print(f"          {what}", flush=True)


@dataclass(frozen=True, slots=True)
class Stack:
    """The stack on one network, as found on the hosts: service -> host -> containers' addresses."""

    network: str
    client: str
    client_place: Place
    places: list[Place]
    tasks: dict[str, dict[str, list[str]]]


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the final table; `measure` gives a figure for a client and an address."""

    what: str
    host: str
    path: str
    unit: str
    measure: Callable[[Stack, str], float]
    service: str


class Demo:
    """The steps, in order. Each raises `DemoError` if what it shows isn't so."""

    def __init__(self, testbed: Bed, tell: Teller) -> None:
        self.bed = testbed
        self.tell = tell

    @property
    def manager(self) -> Host:
        return self.bed.hosts[0]

    def docker(self, *arguments: str, env: str = "") -> str:
        """A command of the manager's, shown as a user would type it."""
        self.tell.command(self.manager, f"{env} docker {' '.join(arguments)}".strip())
        if env:
            return self.manager.run("env", env, "docker", *arguments)
        return self.manager.docker(*arguments)

    # --- what is brought up

    def swarm(self) -> None:
        first = self.manager
        self.tell.command(first, f"docker swarm init --advertise-addr {first.address}")
        for host in self.bed.hosts[1:]:
            self.tell.command(host, f"docker swarm join --token … {first.address}:2377")
        self.bed.swarm()
        for line in first.docker("node", "ls").splitlines():
            self.tell.seen(line)

    def plugin(self) -> None:
        for host in self.bed.hosts:
            self.tell.command(host, "docker plugin create freeflow:latest build/plugin")
            self.tell.command(host, "docker plugin enable freeflow:latest")
        self.bed.install_plugin(bed.PLUGIN_DIR)

    def networks(self) -> None:
        for name, driver in NETWORKS.items():
            self.docker("network", "create", "-d", driver, "--attachable", f"on-{name}")

    def stacks(self) -> dict[str, Stack]:
        text = STACK_FILE.read_text()
        print("\n" + "".join(f"          | {line}\n" for line in text.splitlines()))
        inside = self.manager.root / "root/demo-stack.yml"
        inside.parent.mkdir(exist_ok=True)
        inside.write_text(text)
        for name in NETWORKS:
            self.docker(
                *(
                    "stack",
                    "deploy",
                    "--resolve-image",
                    "never",
                    "-c",
                    "/root/demo-stack.yml",
                    name,
                ),
                env=f"NETWORK=on-{name}",
            )
        self.tell.seen("waiting until all tasks run …")
        wait_until("all tasks running", self._all_running, 120, 0.5)
        for line in self.manager.docker("service", "ls").splitlines():
            self.tell.seen(line)
        return {name: self._find(name) for name in NETWORKS}

    def _all_running(self) -> bool:
        said = self.manager.docker("service", "ls", "--format", "{{.Replicas}}").split()
        return len(said) == 3 * len(NETWORKS) and all(len(set(n.split("/"))) == 1 for n in said)

    def _find(self, name: str) -> Stack:
        network = f"on-{name}"
        tasks: dict[str, dict[str, list[str]]] = {}
        places: list[Place] = []
        clients: list[tuple[str, Place]] = []
        for service in ("web", "cache", "client"):
            for host in self.bed.hosts:
                label = f"label=com.docker.swarm.service.name={name}_{service}"
                for identifier in host.docker("ps", "-q", "--filter", label).split():
                    found = host.inspect("inspect", identifier)
                    where = found["NetworkSettings"]["Networks"][network]["IPAddress"]
                    tasks.setdefault(service, {}).setdefault(host.name, []).append(where)
                    process = host.root / "proc" / str(found["State"]["Pid"])
                    places.append(Place(process, IPv4Address(where)))
                    if service == "client":
                        clients.append((identifier, places[-1]))
        if len(clients) != 1:
            raise DemoError(f"stack {name} has {len(clients)} clients on its manager, not one")
        identifier, place = clients[0]
        for service in ("web", "cache"):
            if set(tasks.get(service, {})) != {host.name for host in self.bed.hosts}:
                raise DemoError(f"{name}_{service} doesn't run on both hosts: {tasks.get(service)}")
        return Stack(network, identifier, place, places, tasks)

    # --- what is shown to work

    def in_client(self, stack: Stack, *command: str, stdin: str | None = None) -> str:
        return self.manager.docker("exec", "-i", stack.client, *command, stdin=stdin, timeout=60)

    def names(self, stack: Stack) -> str:
        """The service's name is one address, tasks.NAME are all of them."""
        vip = {
            line.split()[0] for line in self.in_client(stack, "getent", "hosts", "web").splitlines()
        }
        every = {
            line.split()[0]
            for line in self.in_client(stack, "getent", "ahostsv4", "tasks.web").splitlines()
        }
        running = {one for found in stack.tasks["web"].values() for one in found}
        if every != running:
            raise DemoError(f"tasks.web are {sorted(every)}, but {sorted(running)} run")
        if len(vip) != 1 or vip & running:
            raise DemoError(f"web is {sorted(vip)}, not one virtual address")
        return f"web is {vip.pop()} (virtual), tasks.web are {', '.join(sorted(every))}"

    def balanced(self, stack: Stack) -> str:
        """Requests to the virtual address are answered by tasks on both hosts."""
        # A task runs, and is given connections, before its program listens.
        urls = [f"http://{task}/" for found in stack.tasks["web"].values() for task in found]
        asking = ("curl", "-sS", "--fail-early", "--max-time", "1", "http://web/", *urls)
        wait_until("each task of web", lambda: self.in_client(stack, *asking), 20)
        script = "for i in $(seq 40); do curl -sS --max-time 5 http://web/ || exit 1; done"
        answers = Counter(self.in_client(stack, "sh", "-c", script).split())
        if set(answers) != {host.name for host in self.bed.hosts} or sum(answers.values()) != 40:
            raise DemoError(f"40 requests to http://web/ were answered by {dict(answers)}")
        return "40 × curl http://web/: " + ", ".join(
            f"{n} by {h}" for h, n in sorted(answers.items())
        )

    def redis(self, stack: Stack) -> str:
        said = self.in_client(
            stack, "redis-cli", "-h", "cache", stdin="SET k hello\nGET k\n"
        ).split()
        if said != ["OK", "hello"]:
            raise DemoError(f"redis-cli -h cache answered {said}")
        return "redis-cli -h cache: SET k hello, GET k = hello"

    def intact(self, stack: Stack) -> str:
        """A large file from the other host arrives as it was sent."""
        other = self.bed.hosts[1]
        where = stack.tasks["web"][other.name][0]
        here = self.in_client(
            stack, "sh", "-c", f"curl -sS --max-time 30 http://{where}/big | sha256sum"
        ).split()[0]
        label = f"label=com.docker.swarm.service.name={FREEFLOW}_web"
        there = {
            other.docker("exec", identifier, "sha256sum", "/var/www/html/big").split()[0]
            for identifier in other.docker("ps", "-q", "--filter", label).split()
        }
        if here not in there:
            raise DemoError(f"128 MiB from {where} arrived as {here}, were sent as {sorted(there)}")
        return f"128 MiB from a web on {other.name}: SHA-256 {here[:16]}… on both sides"

    def healthy(self, _stack: Stack) -> str:
        verdicts = []
        for host in self.bed.hosts:
            self.tell.command(host, "freeflow status")
            done = host.spawn(
                "/usr/local/bin/freeflow",
                "status",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            said, _ = done.communicate(timeout=60)
            for line in said.splitlines():
                self.tell.seen(f"| {line}")
            if done.returncode != 0:
                raise DemoError(f"freeflow status on {host.name} ends with code {done.returncode}")
            verdicts.append(f"{host.name} is healthy")
        return ", ".join(verdicts)

    def checks(self, stack: Stack) -> list[str]:
        """What failed."""
        failed = []
        for what, check in (
            ("names", self.names),
            ("virtual address", self.balanced),
            ("redis", self.redis),
            ("large transfer", self.intact),
            ("status", self.healthy),
        ):
            try:
                self.tell.seen(f"ok      {what}: {check(stack)}")
            except (DemoError, CommandError, TimeoutError, subprocess.SubprocessError) as error:
                self.tell.seen(f"FAILED  {what}: {' '.join(str(error).split())}")
                failed.append(what)
        return failed

    # --- how fast it is

    def path_to(self, address: str) -> str:
        """Where `freeflow ping` finds an address, and over which path."""
        found: dict[str, Any] = json.loads(self.manager.freeflow("ping", address, "--json"))
        if not found["round_trips_ms"]:
            raise DemoError(f"freeflow ping {address}: no answer")
        if found["local"]:
            return f"{found['path']}, one host"
        return f"{found['path']}, to {found['host_address']}"

    def table(self, stacks: dict[str, Stack]) -> str:
        on_freeflow = stacks[FREEFLOW]
        lines = []
        for host in self.bed.hosts:
            for service, unit, measure in (
                ("web", "requests/s", _requests),
                ("web", "Gbit/s, a file", _download),
                ("cache", "GET/s", _gets),
            ):
                path = self.path_to(on_freeflow.tasks[service][host.name][0])
                lines.append(
                    Line(f"client on h1 → {service}", host.name, path, unit, measure, service)
                )
        body: list[tuple[str, ...]] = []
        for line in lines:
            figures: dict[str, list[float]] = {name: [] for name in stacks}
            for _ in range(ROUNDS):
                for name, stack in stacks.items():
                    target = stack.tasks[line.service][line.host][0]
                    figures[name].append(line.measure(stack, target))
            ours, theirs = (statistics.median(figures[name]) for name in (FREEFLOW, OVERLAY))
            figures_of = (number(ours), number(theirs), times(ours / theirs))
            body.append((line.what, line.host, line.path, line.unit, *figures_of))
            self.tell.seen(f"measured {line.what} on {line.host}, {line.unit}")
        body.append(self._by_vip(stacks))
        header = ("what talks to what", "host", "path", "how fast", "freeflow", "overlay", "ratio")
        return columns(header, body, left=4)

    def _by_vip(self, stacks: dict[str, Stack]) -> tuple[str, ...]:
        """The line of the virtual address. Docker's own has none on a kernel without IPVS."""
        ours = statistics.median(self._vip_rates(stacks[FREEFLOW]))
        theirs: float | None
        try:
            theirs = statistics.median(self._vip_rates(stacks[OVERLAY]))
        except DemoError:
            theirs = None
        self.tell.seen("measured client on h1 → web by its virtual address, requests/s")
        return (
            *("client on h1 → web", "all", "overlay, virtual address", "requests/s"),
            *(number(ours), number(theirs) if theirs else "no answer"),
            times(ours / theirs if theirs else None),
        )

    def _vip_rates(self, stack: Stack) -> list[float]:
        vip = self._vip(stack)
        _run(stack, "curl", "-sS", "-o", "/dev/null", "--max-time", "2", f"http://{vip}/")
        return [_requests(stack, vip) for _ in range(ROUNDS)]

    def _vip(self, stack: Stack) -> str:
        return self.in_client(stack, "getent", "hosts", "web").split()[0]


def _run(stack: Stack, *command: str) -> str:
    done = subprocess.run(
        stack.client_place.enter(*command), capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        raise DemoError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _requests(stack: Stack, where: str) -> float:
    return parse.wrk(_run(stack, "wrk", "-t", "2", "-c", "50", "-d", "1s", f"http://{where}:80/"))


def _gets(stack: Stack, where: str) -> float:
    load = ("redis-benchmark", "-h", where, "-t", "get", "-c", "50", "-n", "40000", "--csv")
    return parse.redis_benchmark(_run(stack, *load))


def _download(stack: Stack, where: str) -> float:
    load = ("curl", "-sS", "-o", "/dev/null", "-w", "%{speed_download}", f"http://{where}/big")
    return float(_run(stack, *load)) * 8 / 1e9


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def need_plugin(tell: Teller) -> None:
    if (bed.PLUGIN_DIR / "config.json").exists():
        return
    tell.step("Building the plugin (make plugin)", "the first time this takes some minutes")
    subprocess.run(["make", "plugin"], cwd=TOP, check=True)


def play(testbed: Bed, tell: Teller) -> int:
    """All of it on hosts that are up; the exit code."""
    demo = Demo(testbed, tell)
    tell.step("A Swarm over them", "Docker's own: FreeFlow brings no cluster store with it")
    demo.swarm()
    tell.step(
        "The image of the services", "nginx and redis from the Debian archive; no registry is asked"
    )
    bed.load_image([bed.host_of(host) for host in testbed.hosts])
    tell.step(
        "The plugin on both hosts",
        "a manager schedules on a worker once it has reported its plugins",
    )
    demo.plugin()
    tell.step("Two networks", "the second one is Docker's own, to compare with")
    demo.networks()
    tell.step("One stack, deployed on each", "only the network differs")
    stacks = demo.stacks()
    tell.step("Does it work? On FreeFlow, from the client on h1:")
    failed = demo.checks(stacks[FREEFLOW])
    tell.step(
        "How fast is it?",
        f"{ROUNDS} runs in turn on each network, medians; TCP {CONGESTION_CONTROL}",
    )
    with congestion_control_allowed():
        for stack in stacks.values():
            for place in stack.places:
                place.set_congestion_control()
        table = demo.table(stacks)
    print("\n" + table)
    if failed:
        print(f"FAILED: {', '.join(failed)}")
        return 1
    print(
        "Everything shown worked. FreeFlow's connections all ran on its overlay (VXLAN); make bench measures properly."
    )
    return 0


def main() -> int:
    signal.signal(signal.SIGTERM, _stop)
    keep = os.environ.get("KEEP", "") not in ("", "0")
    engine = os.environ.get("ENGINE", "26.1")
    tell = Teller()
    testbed = Bed(NAME, [engine, engine])
    code = 1
    try:
        need_plugin(tell)
        tell.step(
            f"Two Docker hosts with engine {engine}, in namespaces of their own",
            "this machine's own Docker isn't touched; the first time their file systems are made, a minute or two",
        )
        testbed.up()
        code = play(testbed, tell)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except (
        *(BenchError, DemoError, CommandError, BedInUseError),
        *(TimeoutError, subprocess.SubprocessError),
    ) as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
    finally:
        # Another Ctrl-C must not leave half of it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if keep and testbed.hosts:
            tell.step("Left up (KEEP=1). To look around:")
            for host in testbed.hosts:
                tell.seen(
                    f"nsenter -t {host.pid} -m -u -n -p bash    # {host.name}, then: freeflow status"
                )
            tell.seen("To take it down:")
            tell.seen(f"cd {TOP} && {sys.executable} -m tests.testbed down --name {NAME}")
        else:
            tell.step("Taking everything down")
            testbed.down()
            tell.step("Done: nothing is left but what was built, in build/ and /var/cache/freeflow")
    return code


if __name__ == "__main__":
    sys.exit(main())
