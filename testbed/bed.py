"""A test bed: hosts on one underlay, a Swarm over them, and their removal at the end.

The underlay is a bridge in its own network namespace. So the machine's firewall does not see its
packets, and several beds can exist side by side.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from testbed.host import PLUGIN, Host, remove_cgroups
from testbed.images import engine_root, workload_tar
from testbed.patience import patience
from testbed.process import BedInUseError, run, wait_until

HOME: Final = Path(os.environ.get("FREEFLOW_BEDS", "/var/lib/freeflow-testbed"))
LOCKS: Final = Path("/run/lock")
REGISTRY_PORT: Final = 5000


def in_parallel(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run all calls at the same time; when all have ended, raise the first exception."""
    with ThreadPoolExecutor(max(len(calls), 1)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def take(name: str) -> int:
    """Lock the name of a bed for this process; the returned descriptor holds the lock.

    Raises:
        BedInUseError: another process holds it.
    """
    LOCKS.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(LOCKS / f"freeflow-testbed-{name}", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BedInUseError(
            f"the hosts of bed {name} are in use by another process on this machine; wait until it ends, or end it"
        ) from error
    return descriptor


class Bed:
    """Hosts with the given engine versions, h1, h2, …; a context manager."""

    def __init__(self, name: str, engines: Sequence[str]) -> None:
        self.name = name
        self.work = HOME / name
        self._engines = list(engines)
        self._lock: int | None = None
        self._underlay: subprocess.Popen[bytes] | None = None
        self._registry: subprocess.Popen[bytes] | None = None
        self.hosts: list[Host] = []

    def __enter__(self) -> Bed:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    def up(self) -> None:
        """Make underlay and hosts. Raises BedInUseError if another process uses this bed."""
        self._lock = take(self.name)
        remove_leftovers(self.name)
        in_parallel([lambda v=version: engine_root(v) for version in set(self._engines)])  # type: ignore[misc]
        self.work.mkdir(parents=True)
        self._underlay = subprocess.Popen(
            ["unshare", "--net", "sleep", "infinity"], start_new_session=True
        )
        (self.work / "pids").write_text(f"{self._underlay.pid}\n")
        pid = self._underlay.pid
        own = os.readlink("/proc/self/ns/net")
        wait_until("the underlay's namespace", lambda: os.readlink(f"/proc/{pid}/ns/net") != own)
        inside = ["nsenter", f"--net=/proc/{pid}/ns/net"]
        # netfilter must not see the underlay's frames. The setting is absent without br_netfilter.
        run([*inside, "sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=0"], check=False)
        run([*inside, "ip", "link", "add", "underlay", "type", "bridge", "mcast_snooping", "0"])
        run([*inside, "ip", "addr", "add", "192.168.77.254/24", "dev", "underlay"])
        run([*inside, "ip", "link", "set", "underlay", "up"])
        run([*inside, "ip", "link", "set", "lo", "up"])
        self.hosts = [
            Host(self.name, number, version, self.work, pid)
            for number, version in enumerate(self._engines, start=1)
        ]
        in_parallel([host.boot for host in self.hosts])
        in_parallel([host.start_dockerd for host in self.hosts])

    def down(self) -> None:
        """Remove everything. Safe at any stage, and when it is called twice."""
        if self._lock is None:
            return
        for host in self.hosts:
            host.power_off()
        in_parallel([host.destroy for host in self.hosts])
        for process in (self._registry, self._underlay):
            if process is not None:
                process.kill()
                process.wait(patience(10))
        self._registry = self._underlay = None
        self.hosts = []
        run(["rm", "-rf", str(self.work)], check=False)
        os.close(self._lock)
        self._lock = None

    # --- a Swarm

    def swarm(self, managers: int = 1) -> None:
        """Make one Swarm of all hosts; the first `managers` of them are managers."""
        first = self.hosts[0]
        first.docker("swarm", "init", "--advertise-addr", str(first.address))
        tokens = {
            role: first.docker("swarm", "join-token", "-q", role).strip()
            for role in ("manager", "worker")
        }

        def join(host: Host) -> None:
            role = "manager" if host.number <= managers else "worker"
            host.docker(
                *("swarm", "join", "--advertise-addr", str(host.address)),
                *("--token", tokens[role], f"{first.address}:2377"),
            )

        for host in self.hosts[1:managers]:
            join(host)
        in_parallel([lambda h=host: join(h) for host in self.hosts[managers:]])  # type: ignore[misc]

    def load_workload(self) -> None:
        archive = workload_tar()
        in_parallel([lambda h=host: h.load_workload(archive) for host in self.hosts])  # type: ignore[misc]

    def install_plugin(self, plugin: Path, settings: dict[str, str] | None = None) -> None:
        """Install the plugin on every host; wait until the manager schedules on all of them."""
        in_parallel([lambda h=host: h.install_plugin(plugin, settings) for host in self.hosts])  # type: ignore[misc]
        self.wait_plugin_reported()

    def wait_plugin_reported(self) -> None:
        """Wait until the manager knows the plugin of every node; workers report every 20 s."""
        manager = self.hosts[0]

        def all_report() -> bool:
            nodes = manager.docker("node", "ls", "-q").split()
            described = json.loads(manager.docker("node", "inspect", *nodes))
            return all(
                any(p["Name"] == PLUGIN for p in node["Description"]["Engine"].get("Plugins") or ())
                for node in described
                if node["Status"]["State"] == "ready"
            )

        wait_until("the plugin reported by every node", all_report, 45, 0.5)

    def reboot(self, host: Host) -> None:
        """Power a host off and on: namespaces, links and /run are new, /var/lib/docker is kept.

        A real host is away for longer than the Swarm needs to notice, 8 to 17 s. If it is back
        sooner, its peers believe that it never left: its engine's gossip may be broken until the
        next restart ("unknown to memberlist"), and its node may be declared lost just after it has
        reported again.
        """
        manager = next(other for other in self.hosts if other is not host)
        node = host.docker("info", "--format", "{{.Swarm.NodeID}}").strip()
        host.power_off()
        wait_until(
            f"the Swarm to miss {host.name}",
            lambda: (
                manager.docker("node", "inspect", "-f", "{{.Status.State}}", node).strip() == "down"
            ),
            60,
            0.5,
        )
        host.boot()
        host.start_dockerd()

    # --- a registry

    @property
    def registry(self) -> str:
        """The address of the bed's registry, which starts at the first access."""
        if self._registry is None:
            assert self._underlay is not None
            config = self.work / "registry.yml"
            config.write_text(
                "version: 0.1\nstorage:\n  filesystem:\n"
                f"    rootdirectory: {self.work}/registry\n"
                f"http:\n  addr: 192.168.77.254:{REGISTRY_PORT}\n"
            )
            log = (self.work / "registry.log").open("ab")
            namespace = f"--net=/proc/{self._underlay.pid}/ns/net"
            self._registry = subprocess.Popen(
                ["nsenter", namespace, "docker-registry", "serve", str(config)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            log.close()
            url = f"http://192.168.77.254:{REGISTRY_PORT}/v2/"
            probe = f"import urllib.request; urllib.request.urlopen({url!r}, timeout=5)"
            wait_until(
                "the registry", lambda: not run(["nsenter", namespace, "python3", "-c", probe])
            )
        return f"192.168.77.254:{REGISTRY_PORT}"


def remove_leftovers(name: str) -> None:
    """Remove what a killed bed of this name has left behind."""
    work = HOME / name
    pids = work / "pids"
    if pids.exists():
        for line in pids.read_text().split():
            command = Path(f"/proc/{line}/cmdline")
            # PIDs are reused, so the command line must be that of a bed's process.
            text = command.read_bytes() if command.exists() else b""
            if str(work).encode() in text or text.startswith(b"sleep\0infinity"):
                os.kill(int(line), signal.SIGKILL)
    if work.exists():
        for number in range(1, 10):
            remove_cgroups(f"freeflow-{name}-h{number}")
        wait_until(
            f"{work} to be free",
            lambda: not run(["rm", "-rf", str(work)], check=False) and not work.exists(),
            20,
        )
