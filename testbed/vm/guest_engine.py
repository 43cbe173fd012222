"""Docker in guests: one engine each, with the plugin installed, in one Swarm.

Work that takes an emulated processor minutes is done before, on this machine: a host of the test
bed with the same engine creates the plugin, and its /var/lib/docker becomes a disk of the guests.
The guests have one empty image, whose containers use the guest's own /usr.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from testbed.bed import Bed
from testbed.host import PLUGIN
from testbed.images import cache, forget_others, locked, recipe_key
from testbed.process import wait_until
from testbed.vm.guest import Guest
from testbed.vm.guest_images import ext4

ENGINE: Final = "26.1"  # The version in the guests' Debian release.
MEMORY: Final = 1536
IMAGE: Final = "guest:latest"
RUN: Final = ("--mount", "type=bind,src=/usr,dst=/usr,readonly")
"""Options of a container, or of a service, of that image."""

_MODULES: Final = (
    *(
        "bridge",
        "br_netfilter",
        "ip_vs",
        "ip_vs_rr",
        "iptable_nat",
        "nf_conntrack_netlink",
        "overlay",
    ),
    *("veth", "vxlan", "xt_MASQUERADE", "xt_addrtype", "xt_conntrack", "xt_ipvs"),
)


def engine_disk(plugin: Path) -> Path:
    """An engine's /var/lib/docker with the built plugin, not enabled; makes it if it is absent.

    That takes about half a minute.
    """
    # Each build writes config.json last.
    built = (plugin / "config.json").stat()
    key = recipe_key(str(plugin), str(built.st_mtime_ns), Path(__file__).read_text())
    target = cache() / f"engine-disk-{key}.ext4"
    with locked("engine-disk"):
        if not target.exists():
            with (
                tempfile.TemporaryDirectory(dir=cache(), prefix="new-disk-") as folder,
                Bed(f"disk{os.getpid()}", [ENGINE]) as bed,
            ):
                host = bed.hosts[0]
                host.create_plugin(plugin)
                _write_image(host.root / "tmp/image.tar")
                host.run("sh", "-c", f"docker import - {IMAGE} </tmp/image.tar")
                host.stop_dockerd()
                (host.work / "docker/engine-id").unlink()
                ext4(host.work / "docker", Path(folder) / "disk", 1024)
                (Path(folder) / "disk").rename(target)
        forget_others(target, "engine-disk-*")
    return target


def _write_image(path: Path) -> None:
    with tarfile.open(path, "w") as image:
        for name in ("etc", "run", "tmp", "usr", "var"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            image.addfile(folder)
        for name in ("bin", "lib", "lib64", "sbin"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            image.addfile(link)


class GuestEngine:
    """A guest's engine; the guest was booted with `engine_disk` and `MEMORY`."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def start(self, timeout: float = 180) -> None:
        """Start dockerd and wait until it answers."""
        self.guest.run(["modprobe", "-a", *_MODULES])
        self.guest.sh("mkdir -p /var/lib/docker; mount /dev/vdc /var/lib/docker")
        self.guest.start(["sh", "-c", "exec dockerd >/tmp/dockerd.log 2>&1"])
        wait_until(f"{self.guest.name}: the engine", lambda: self.api("version"), timeout, 0.5)

    def api(self, path: str) -> Any:
        """Read from the engine's API, because the docker command takes a second to start here."""
        command = ["curl", "-sfg", "--unix-socket", "/run/docker.sock", f"http://engine/{path}"]
        return json.loads(self.guest.run(command).stdout)

    def docker(self, *arguments: str, timeout: float = 180, check: bool = True) -> str:
        """Run the docker command. Raises CommandError."""
        return self.guest.run(["docker", *arguments], timeout=timeout, check=check).stdout

    def freeflow(self, *arguments: str, check: bool = True) -> str:
        """Run the `freeflow` command of an enabled plugin. Raises CommandError."""
        return self.guest.run(["freeflow", *arguments], check=check).stdout

    def enable_plugin(self) -> None:
        self.docker("plugin", "enable", PLUGIN, timeout=300)

    def containers(self) -> list[str]:
        """The IDs of its running containers."""
        return [container["Id"] for container in self.api("containers/json")]

    def tasks(self, service: str) -> list[Any]:
        """The running tasks of a service; only on a manager."""
        wanted = json.dumps(
            {"service": [service], "desired-state": ["running"]}, separators=(",", ":")
        )
        tasks = self.api(f"tasks?filters={wanted}")
        return [task for task in tasks if task["Status"]["State"] == "running"]

    def log(self) -> str:
        """dockerd's log."""
        return self.guest.pull("/tmp/dockerd.log").decode(errors="replace")


def make_swarm(engines: list[GuestEngine]) -> None:
    """Start all engines, enable their plugins, and make one Swarm; the first is its manager."""
    with ThreadPoolExecutor(len(engines)) as pool:
        list(pool.map(GuestEngine.start, engines))
        # Before they join: a joining node reports its plugins at once, later only every 20 s.
        list(pool.map(GuestEngine.enable_plugin, engines))
    first = engines[0]
    first.docker("swarm", "init", "--advertise-addr", str(first.guest.address))
    token = first.api("swarm")["JoinTokens"]["Worker"]
    for other in engines[1:]:
        address = str(other.guest.address)
        other.docker(
            *("swarm", "join", "--advertise-addr", address, "--token", token),
            f"{first.guest.address}:2377",
        )
