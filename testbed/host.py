"""One Docker host: an engine of some version, in its own mount, PID, UTS and network namespaces.

When process 1 of the host's PID namespace is killed, the kernel kills every process of the host and
removes its mounts, which is almost a power failure. Files on disk stay; `Bed.reboot` uses that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

from docker import DockerClient

from testbed.images import SYSTEMD, WORKLOAD_IMAGE, engine_root
from testbed.patience import patience
from testbed.process import CommandError, run, wait_until

_INIT: Final = Path(__file__).with_name("host_init.sh")
_CGROUP_DRIVER: Final = "--exec-opt=native.cgroupdriver"
PLUGIN: Final = "freeflow:latest"


class Host:
    """A host of a bed; made by `Bed`."""

    def __init__(self, bed: str, number: int, engine: str, work: Path, underlay_pid: int) -> None:
        self.name = f"h{number}"
        self.number = number
        self.engine = engine
        self.address = IPv4Address("192.168.77.0") + number
        self.work = work / self.name
        self.underlay_pid = underlay_pid
        self._bed = bed
        self._outer: subprocess.Popen[bytes] | None = None
        self._dockerd: subprocess.Popen[bytes] | None = None
        self.pid = 0

    # --- life

    @property
    def cgroup(self) -> str:
        return f"freeflow-{self._bed}-{self.name}"

    @property
    def has_systemd(self) -> bool:
        """Whether systemd is process 1, and makes the control groups of containers."""
        return self.engine.endswith(SYSTEMD)

    @property
    def root(self) -> Path:
        """The host's file system, seen from outside."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def port(self) -> str:
        """The underlay's end of the host's link."""
        return f"u{self.number}"

    def start(self) -> None:
        """Make the host's namespaces and its link to the underlay, then start its engine."""
        self.boot()
        self.start_dockerd()

    def boot(self) -> None:
        engine = engine_root(self.engine)
        self.work.mkdir(parents=True, exist_ok=True)
        log = (self.work / "init.log").open("ab")
        self._outer = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--uts",
                "--pid",
                "--net",
                "--fork",
                "--kill-child",
                str(_INIT),
                self.name,
                str(engine),
                str(self.work),
                *((self.cgroup,) if self.has_systemd else ()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        outer = self._outer.pid
        # For `remove_leftovers`, if this process is killed. Process 1 ends with this one.
        with (self.work.parent / "pids").open("a") as pids:
            pids.write(f"{outer}\n")
        children = Path(f"/proc/{outer}/task/{outer}/children")

        def alive(what: str) -> str:
            if self._outer is None or self._outer.poll() is not None:
                raise RuntimeError(
                    f"{self.name}: no {what}\n{(self.work / 'init.log').read_text()}"
                )
            return children.read_text().strip()

        self.pid = int(wait_until(f"{self.name}: process 1", lambda: alive("process 1")))
        up = self.root / ("run/systemd/private" if self.has_systemd else "run/host-is-up")
        wait_until(f"{self.name}: file system", lambda: alive("file system") and up.exists())
        self._plug_in()

    def _plug_in(self) -> None:
        in_underlay = ["nsenter", f"--net=/proc/{self.underlay_pid}/ns/net", "ip"]
        run([*in_underlay, "link", "del", self.port], check=False)
        run(
            [
                *(*in_underlay, "link", "add", self.port, "master", "underlay", "type", "veth"),
                *("peer", "name", "eth0", "netns", str(self.pid)),
            ]
        )
        run([*in_underlay, "link", "set", self.port, "up"])
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "addr", "add", f"fd77::{self.number}/64", "dev", "eth0", "nodad")
        self.run("ip", "link", "set", "eth0", "up")
        # Docker finds its own address by the default route.
        self.run("ip", "route", "add", "default", "via", "192.168.77.254", "dev", "eth0")

    def start_dockerd(self, timeout: float = 60) -> None:
        log = (self.work / "dockerd.log").open("ab")
        self._dockerd = subprocess.Popen(
            [
                *self._enter(),
                *self._cgroup_words(),
                "--host=unix:///run/docker.sock",
                f"--bip=172.30.{self.number}.1/24",
                # Large enough for hundreds of containers on docker_gwbridge.
                "--default-address-pool=base=172.24.0.0/14,size=21",
                "--insecure-registry=192.168.77.0/24",
                "--storage-driver=overlay2",
                "--log-level=info",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        wait_until(f"{self.name}: engine {self.engine}", self._engine_up, timeout)

    def _cgroup_words(self) -> tuple[str, ...]:
        """The first words of dockerd's command, with what decides on its control groups."""
        if self.has_systemd:
            # As a unit of systemd's, which moves only its own processes between groups.
            return ("systemd-run", "--scope", "--quiet", "dockerd", f"{_CGROUP_DRIVER}=systemd")
        return ("dockerd", f"{_CGROUP_DRIVER}=cgroupfs", f"--cgroup-parent={self.cgroup}")

    def _engine_up(self) -> bool:
        if self._dockerd is not None and self._dockerd.poll() is not None:
            raise RuntimeError(f"{self.name}: dockerd ended\n{self.log_tail()}")
        return bool(self.docker("version", "--format", "{{.Server.Version}}", timeout=10).strip())

    def dockerd_pid(self) -> int:
        """dockerd's PID as the host sees it."""
        return int((self.root / "run/docker.pid").read_text())

    def stop_dockerd(self, timeout: float = 60) -> None:
        """Stop dockerd as `systemctl stop docker` does: SIGTERM, and wait."""
        self.run("kill", "-TERM", str(self.dockerd_pid()))
        self._wait_dockerd(timeout)

    def kill_dockerd(self) -> None:
        """Send SIGKILL to dockerd alone; containers and their shims continue."""
        self.run("kill", "-KILL", str(self.dockerd_pid()))
        self._wait_dockerd(10)
        (self.root / "run/docker.pid").unlink(missing_ok=True)

    def _wait_dockerd(self, timeout: float) -> None:
        if self._dockerd is not None:
            self._dockerd.wait(patience(timeout))
            self._dockerd = None

    def restart_dockerd(self) -> None:
        self.stop_dockerd()
        self.start_dockerd()

    def power_off(self) -> None:
        """Kill every process of the host at once; files on disk stay."""
        if self.pid:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.pid = 0
        for process in (self._outer, self._dockerd):
            if process is not None:
                try:
                    process.wait(patience(20))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(patience(5))
        self._outer = self._dockerd = None

    def destroy(self) -> None:
        """Power the host off and remove its files."""
        self.power_off()
        run(
            ["nsenter", f"--net=/proc/{self.underlay_pid}/ns/net", "ip", "link", "del", self.port],
            check=False,
        )
        remove_cgroups(self.cgroup)
        for _ in range(20):
            shutil.rmtree(self.work, ignore_errors=True)
            if not self.work.exists():
                return
            time.sleep(0.2)

    # --- using it

    def _enter(self) -> list[str]:
        groups = ("--cgroup",) if self.has_systemd else ()
        namespaces = ("--mount", "--uts", "--net", "--pid", *groups)
        return ["nsenter", f"--target={self.pid}", *namespaces, "--"]

    def run(
        self, *command: str, timeout: float = 120, check: bool = True, stdin: str | None = None
    ) -> str:
        """Run a command on the host. Raises CommandError."""
        return run([*self._enter(), *command], timeout=timeout, check=check, stdin=stdin)

    def spawn(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command on the host and return at once; the caller waits for or kills it."""
        return subprocess.Popen([*self._enter(), *command], text=True, **options)

    def docker(
        self, *arguments: str, timeout: float = 120, check: bool = True, stdin: str | None = None
    ) -> str:
        """Run the host's docker command. Raises CommandError."""
        return self.run("docker", *arguments, timeout=timeout, check=check, stdin=stdin)

    def inspect(self, *arguments: str) -> Any:
        """The first object that a `docker … inspect` prints."""
        return json.loads(self.docker(*arguments))[0]

    def client(self) -> DockerClient:
        """The Docker SDK on this host's engine."""
        return DockerClient(f"unix://{self.root}/run/docker.sock", timeout=round(patience(60)))

    def exec(self, container: str, *command: str, timeout: float = 60, check: bool = True) -> str:
        """Run a command in a container of this host."""
        return self.docker("exec", container, *command, timeout=timeout, check=check)

    def freeflow(self, *arguments: str, check: bool = True, timeout: float = 60) -> str:
        """Run the `freeflow` command as the host's root would."""
        return self.run("/usr/local/bin/freeflow", *arguments, check=check, timeout=timeout)

    def status(self) -> Any:
        """`freeflow status --json`."""
        return json.loads(self.freeflow("status", "--json", check=False))

    def in_overlay(self, *command: str, check: bool = True) -> str:
        """Run a command of this host in FreeFlow's overlay namespace."""
        pin = "/run/freeflow-admin/netns/overlay"
        return self.run("nsenter", f"--net={pin}", *command, check=check)

    def cut_underlay(self) -> None:
        self._set_underlay("down")

    def heal_underlay(self) -> None:
        self._set_underlay("up")

    def _set_underlay(self, state: str) -> None:
        namespace = f"--net=/proc/{self.underlay_pid}/ns/net"
        run(["nsenter", namespace, "ip", "link", "set", self.port, state])

    def load_workload(self, archive: Path) -> None:
        """Import the workload image, once."""
        if self.docker("image", "ls", "-q", WORKLOAD_IMAGE).strip():
            return
        with archive.open("rb") as stream:
            done = subprocess.run(
                [*self._enter(), "docker", "import", "-", WORKLOAD_IMAGE],
                stdin=stream,
                capture_output=True,
                timeout=patience(300),
                check=False,
            )
        if done.returncode:
            raise CommandError(["docker", "import"], done.returncode, done.stderr.decode())

    def install_plugin(self, plugin: Path, settings: dict[str, str] | None = None) -> None:
        """`docker plugin create`, set and enable from a directory with config.json and rootfs/."""
        self.create_plugin(plugin)
        for name, value in (settings or {}).items():
            self.docker("plugin", "set", PLUGIN, f"{name}={value}")
        self.docker("plugin", "enable", PLUGIN)

    def create_plugin(self, plugin: Path) -> None:
        """`docker plugin create`: afterwards the plugin is installed and not enabled."""
        inside = self.work / "upper/tmp/plugin"
        if inside.exists():
            shutil.rmtree(inside)
        # Through the host's own root, because dockerd packs the plugin from there.
        target = self.root / "tmp/plugin"
        run(["cp", "-a", str(plugin), str(target)])
        self.docker("plugin", "create", PLUGIN, "/tmp/plugin", timeout=180)
        run(["rm", "-rf", str(target)])

    def plugin_pids(self) -> list[int]:
        """The plugin's processes, gunicorn's master first, as the machine sees them."""
        own = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
                same = os.readlink(entry / "ns/pid") == os.readlink(f"/proc/{self.pid}/ns/pid")
            except OSError:
                continue
            if same and (b"plugin" in command or b"gunicorn: master [freeflow]" in command):
                own.append(int(entry.name))
        return sorted(own)

    def kill_plugin(self) -> None:
        """Send SIGKILL to every process of the plugin."""
        for pid in self.plugin_pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def log_tail(self, lines: int = 40) -> str:
        log = self.work / "dockerd.log"
        text = log.read_text(errors="replace") if log.exists() else "(no log)"
        return "\n".join(text.splitlines()[-lines:])


def remove_cgroups(name: str, patience: float = 2.0) -> None:
    """Remove a host's cgroups, deepest first; they are empty soon after its processes are gone."""
    root = Path("/sys/fs/cgroup")
    end = time.monotonic() + patience
    while True:
        # One hierarchy (version 2), or one per controller. Not `**`, because other beds' groups
        # appear and disappear meanwhile.
        tops = [top for top in (root / name, *root.glob(f"*/{name}")) if top.exists()]
        for top in tops:
            for path, _, _ in os.walk(top, topdown=False):
                try:
                    Path(path).rmdir()
                except OSError:
                    continue
        if not tops or time.monotonic() > end:
            return
        time.sleep(0.05)
