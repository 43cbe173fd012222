"""`make demo`: a Swarm of two Docker hosts on this machine, with a stack of services on FreeFlow.

The same stack runs twice: on FreeFlow with its library, and on Docker's `overlay`. This module
shows that it works, `demo_speed.py` how fast it is.

Everything runs in namespaces of its own; the machine's Docker is not touched. Everything is taken
down at the end, also after an error, unless KEEP=1. The exit code is 0 only if all checks passed.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path
from types import FrameType
from typing import Final

from bench import swarm_hosts
from bench.bars import in_terminal
from bench.chart import as_svg
from bench.demo_speed import (
    DATABASE,
    ECHO,
    LIBRARY,
    REDIS,
    ROUNDS,
    STREAM,
    WEB,
    DemoRow,
    DemoTask,
    Meter,
    Subject,
    best_first,
    table,
)
from bench.errors import BenchError
from bench.namespaces import CONGESTION_CONTROL, ProcessNamespaces, congestion_control_allowed
from bench.report import times
from bench.stats import FREEFLOW, OVERLAY
from testbed import Bed, BedInUseError, CommandError, Host, wait_until
from testbed.images import cache
from testbed.prepare import prepare

TOP: Final = Path(__file__).resolve().parents[1]
STACK_FILE: Final = Path(__file__).with_name("demo-stack.yml")
NAME: Final = "demo"
STACKS: Final = (FREEFLOW, OVERLAY)
SERVICES: Final = ("web", "cache", "db", "sink", "echo")
PICTURE: Final = TOP / "build/demo.svg"
MIB: Final = 64
"""Size of the large file."""


class DemoError(Exception):
    """A check of the demo failed."""


@dataclass(slots=True)
class Teller:
    """Prints each step, with its reason and the seconds since the start."""

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
    """The containers of the stack on one network."""

    name: str
    client: str
    """ID of the client's container."""
    client_namespaces: ProcessNamespaces
    containers: list[ProcessNamespaces]
    tasks: dict[str, list[DemoTask]]
    """By service."""

    def addresses(self, service: str, host: Host) -> list[str]:
        return [task.address for task in self.tasks[service] if task.host is host]

    def subject(self, manager: Host) -> Subject:
        return Subject(self.name, self.client_namespaces, manager, self.tasks)


class Demo:
    """The steps, in order. Each raises `DemoError` if its check fails."""

    def __init__(self, testbed: Bed, tell: Teller) -> None:
        self.bed = testbed
        self.tell = tell

    @property
    def manager(self) -> Host:
        return self.bed.hosts[0]

    def docker(self, *arguments: str, env: str = "") -> str:
        """Run a command on the manager, and print it as a user would type it."""
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
        self.bed.install_plugin(swarm_hosts.PLUGIN_DIR)

    def stacks(self) -> dict[str, Stack]:
        text = STACK_FILE.read_text()
        print("\n" + "".join(f"          | {line}\n" for line in text.splitlines()))
        inside = self.manager.root / "root/demo-stack.yml"
        inside.parent.mkdir(exist_ok=True)
        inside.write_text(text)
        stack, deploy = "/root/demo-stack.yml", "docker stack deploy --resolve-image never"
        self._deploy(f"sed s/freeflow:latest/overlay/ {stack} | {deploy} -c - {OVERLAY}")
        self._wait_running(1)
        # Afterwards, so that the library isn't even loaded in what is compared with.
        for host in self.bed.hosts:
            self.tell.command(host, "freeflow runtime install --default")
            for said in host.freeflow("runtime", "install", "--default").splitlines():
                self.tell.seen(said)
        self._deploy(f"{deploy} -c {stack} {FREEFLOW}")
        self._wait_running(2)
        for line in self.manager.docker("service", "ls").splitlines():
            self.tell.seen(line)
        return {name: self._find(name) for name in STACKS}

    def _deploy(self, line: str) -> None:
        self.tell.command(self.manager, line)
        self.manager.run("sh", "-c", line)

    def _wait_running(self, stacks: int) -> None:
        told = ""

        def all_running() -> bool:
            nonlocal told
            said = self.manager.docker("service", "ls", "--format", "{{.Replicas}}").split()
            pairs = [tuple(int(n) for n in one.split("/")) for one in said]
            now = f"{sum(one for one, _ in pairs)} of {sum(other for _, other in pairs)} tasks run"
            if now != told:
                self.tell.seen(now)
                told = now
            wanted = (len(SERVICES) + 1) * stacks
            return len(pairs) == wanted and all(one == other for one, other in pairs)

        wait_until("all tasks running", all_running, 120, 1)

    def _find(self, name: str) -> Stack:
        tasks: dict[str, list[DemoTask]] = {}
        containers: list[ProcessNamespaces] = []
        clients: list[tuple[str, ProcessNamespaces]] = []
        library = LIBRARY if name == FREEFLOW else ""
        for service in (*SERVICES, "client"):
            for host in self.bed.hosts:
                label = f"label=com.docker.swarm.service.name={name}_{service}"
                for identifier in host.docker("ps", "-q", "--filter", label).split():
                    found = host.inspect("inspect", identifier)
                    where = found["NetworkSettings"]["Networks"][f"{name}_default"]["IPAddress"]
                    pid = int(found["State"]["Pid"])
                    tasks.setdefault(service, []).append(DemoTask(host, where, pid))
                    process = host.root / "proc" / str(pid)
                    containers.append(ProcessNamespaces(process, IPv4Address(where), library))
                    if service == "client":
                        clients.append((identifier, containers[-1]))
        if len(clients) != 1:
            raise DemoError(f"stack {name} has {len(clients)} clients on its manager, not one")
        identifier, namespaces = clients[0]
        for service in SERVICES:
            on = {task.host.name for task in tasks.get(service, [])}
            if on != {host.name for host in self.bed.hosts}:
                raise DemoError(f"{name}_{service} does not run on both hosts, but on {sorted(on)}")
        return Stack(name, identifier, namespaces, containers, tasks)

    # --- what is shown to work

    def in_client(self, stack: Stack, *command: str, stdin: str | None = None) -> str:
        return self.manager.docker("exec", "-i", stack.client, *command, stdin=stdin, timeout=60)

    def names(self, stack: Stack) -> str:
        """The service's name resolves to its VIP, and tasks.NAME to the addresses of its tasks."""
        vip = {
            line.split()[0] for line in self.in_client(stack, "getent", "hosts", "web").splitlines()
        }
        every = {
            line.split()[0]
            for line in self.in_client(stack, "getent", "ahostsv4", "tasks.web").splitlines()
        }
        running = {task.address for task in stack.tasks["web"]}
        if every != running:
            raise DemoError(f"tasks.web are {sorted(every)}, but {sorted(running)} run")
        if len(vip) != 1 or vip & running:
            raise DemoError(f"web is {sorted(vip)}, not one virtual address")
        return f"web is {vip.pop()} (virtual), tasks.web are {', '.join(sorted(every))}"

    def balanced(self, stack: Stack) -> str:
        """Tasks on both hosts answer requests to the VIP."""
        # Docker balances to a task as soon as it runs, before its program listens.
        urls = [f"http://{task.address}/" for task in stack.tasks["web"]]
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
        """A large file from the other host arrives unchanged."""
        other = self.bed.hosts[1]
        where = stack.addresses("web", other)[0]
        here = self.in_client(
            stack, "sh", "-c", f"curl -sS --max-time 30 http://{where}/big | sha256sum"
        ).split()[0]
        label = f"label=com.docker.swarm.service.name={FREEFLOW}_web"
        there = {
            other.docker("exec", identifier, "sha256sum", "/var/www/html/big").split()[0]
            for identifier in other.docker("ps", "-q", "--filter", label).split()
        }
        if here not in there:
            raise DemoError(
                f"{MIB} MiB from {where} arrived as {here}, were sent as {sorted(there)}"
            )
        return f"{MIB} MiB from a web on {other.name}: SHA-256 {here[:16]}… on both sides"

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
        """Run all checks; the names of those that failed."""
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

    def rows(self, stacks: dict[str, Stack]) -> list[DemoRow]:
        """Measure all loads."""
        subjects = [stacks[name].subject(self.manager) for name in STACKS]
        meter = Meter(subjects, self.tell.seen)
        rows = []
        for load in (REDIS, WEB, DATABASE, STREAM, ECHO):
            near = meter.row(
                load,
                "one host",
                lambda subject, load=load: subject.near(load.service).address,  # type: ignore[misc]
                lambda subject, load=load: [subject.near(load.service)],  # type: ignore[misc]
                "shm",
            )
            rows.append(near)
        for load in (REDIS, WEB, STREAM):
            far = meter.row(
                load,
                "two hosts",
                lambda subject, load=load: subject.far(load.service).address,  # type: ignore[misc]
                lambda subject, load=load: [subject.far(load.service)],  # type: ignore[misc]
            )
            rows.append(far)
        vips = {name: self._vip(stack) for name, stack in stacks.items()}
        rows.append(
            meter.row(
                replace(WEB, what="nginx by its VIP, 50 clients"),
                "all tasks",
                lambda subject: vips[subject.name],
                lambda subject: subject.tasks["web"],
            )
        )
        return rows

    def _vip(self, stack: Stack) -> str:
        return self.in_client(stack, "getent", "hosts", "web").split()[0]


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def need_plugin(tell: Teller) -> None:
    if (swarm_hosts.PLUGIN_DIR / "config.json").exists():
        return
    tell.step("Building the plugin (make plugin)", "the first time this takes some minutes")
    subprocess.run(["make", "plugin"], cwd=TOP, check=True)


def play(testbed: Bed, tell: Teller) -> int:
    """The demo on hosts that are up; the exit code."""
    demo = Demo(testbed, tell)
    tell.step("Making a Swarm of them", "FreeFlow needs no cluster store besides Docker's own")
    demo.swarm()
    tell.step(
        "Loading the image of the services",
        "nginx, redis and PostgreSQL from the Debian archive, no registry",
    )
    swarm_hosts.load_image([swarm_hosts.host_of(host) for host in testbed.hosts])
    tell.step(
        "Installing the plugin on both hosts",
        "a manager schedules on a worker once the worker has reported its plugins",
    )
    demo.plugin()
    tell.step(
        "Deploying one stack twice",
        "on Docker's own overlay, to compare with; and on FreeFlow, where the runtime adds the library to each container",
    )
    stacks = demo.stacks()
    tell.step("Does it work? Checks on FreeFlow, from the client on h1:")
    failed = demo.checks(stacks[FREEFLOW])
    tell.step(
        "How fast is it?",
        f"{ROUNDS} runs in turn on each network, medians; TCP {CONGESTION_CONTROL}. `freeflow connections` shows the paths",
    )
    with congestion_control_allowed():
        for stack in stacks.values():
            for namespaces in stack.containers:
                namespaces.set_congestion_control()
        rows = best_first(demo.rows(stacks))
    show(rows, testbed.hosts[0].engine)
    if failed:
        print(f"FAILED: {', '.join(failed)}")
        return 1
    print(f"All checks passed. The picture is {PICTURE}; `make bench` measures with more care.")
    return 0


def show(rows: list[DemoRow], engine: str) -> None:
    """Print bars and table, and write the picture."""
    bars = [row.bar() for row in rows]
    print("\n" + in_terminal(bars, FREEFLOW, OVERLAY))
    print(table(rows))
    shared = [row for row in rows if row.path == "shm"]
    ratios = [row.ratio for row in shared if row.ratio]
    print(
        f"Within a host, through shared memory (shm): {times(min(ratios))} to {times(max(ratios))} of Docker's overlay, with unchanged programs.\n"
        "Between hosts (without RDMA devices): many busy connections share TCP connections of the hosts (relay),\n"
        "others use TCP on the eBPF fast path (overlay+ebpf)."
    )
    if any(row.theirs is None for row in rows) and not Path("/proc/net/ip_vs").exists():
        print("Docker's overlay needs IPVS for VIPs, which this machine's kernel lacks: no answer.")
    about = (
        f"requests, bytes and round trips per second, medians of {ROUNDS} runs; engine {engine}, Linux {platform.release()}, "
        f"{os.cpu_count()} cores, {datetime.now(UTC):%Y-%m-%d}"
    )
    PICTURE.parent.mkdir(exist_ok=True)
    title = "FreeFlow compared with Docker's overlay, with the same programs"
    PICTURE.write_text(as_svg(bars, title, about, FREEFLOW, OVERLAY))


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
            "Making the hosts' root file systems from the Debian archive",
            "they are cached; the first time this takes a minute or two",
        )
        prepare([f"engine-{engine}", "bench"], tell.seen)
        tell.step(
            f"Two Docker hosts with engine {engine}, in namespaces of their own",
            "this machine's own Docker is not touched",
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
        # Another Ctrl-C must not interrupt the clean-up.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if keep and testbed.hosts:
            tell.step("Left up (KEEP=1). To enter a host:")
            for host in testbed.hosts:
                tell.seen(
                    f"nsenter -t {host.pid} -m -u -n -p bash    # {host.name}, then: freeflow status"
                )
            tell.seen("To take it down:")
            tell.seen(f"cd {TOP} && {sys.executable} -m testbed down --name {NAME}")
        else:
            tell.step("Taking everything down")
            testbed.down()
            tell.step(f"Done: only built files are left, in build/ and {cache()}")
    return code


if __name__ == "__main__":
    sys.exit(main())
