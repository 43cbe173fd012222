"""A router without a driver, for programs that speak to it: `python -m tests.verbs.router FOLDER`.

It is the real router. What the driver would tell it comes from the test: which network namespaces
are containers, and their addresses. By default the caller's own namespace is the only container, so
that two programs, or one with two queue pairs, can be paired without any namespace of their own.

On the command line: FOLDER [NAMESPACE=ADDRESS[,ADDRESS]]..., where NAMESPACE is a path such as
/proc/PID/ns/net. The router's socket is FOLDER/router.sock: programs find it by FREEFLOW_ROUTER. It
ends with its standard input.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Final

from dataplane.control import EndpointFact, NetworkFact, RouterSettings, RouterSnapshot
from dataplane.errors import RouterAway
from dataplane.router_client import RouterClient
from testbed.patience import patience

TOP: Final = Path(__file__).parents[2]
OWN: Final = Path("/proc/self/ns/net")
NETWORK: Final = "verbsnet"

Containers = Mapping[Path, Sequence[str]]
"""Paths of network namespaces, with their addresses."""
ALONE: Final[Containers] = {OWN: ("10.0.4.1", "fd00::1")}


def snapshot(
    containers: Containers, settings: RouterSettings, *, direct: bool = False
) -> RouterSnapshot:
    """What a driver would say, with all containers on one network. `direct`: their processes may
    map each other's registered memory.
    """
    addresses = [address for each in containers.values() for address in each]
    subnets = {
        str(ip_network(f"{address}/{64 if ':' in address else 24}", strict=False))
        for address in addresses
    }
    return RouterSnapshot(
        endpoints=tuple(
            EndpointFact(
                id=f"endpoint{number}",
                network=NETWORK,
                addresses=tuple(each),
                namespace=path.stat().st_ino,
                container=f"container{number}",
            )
            for number, (path, each) in enumerate(containers.items())
        ),
        networks=(NetworkFact(id=NETWORK, subnets=tuple(sorted(subnets)), verbs_direct=direct),),
        settings=settings,
    )


@dataclass
class TestRouter:
    """A router in a process of its own."""

    __test__ = False  # not a class of tests

    folder: Path
    containers: Containers
    settings: RouterSettings = field(default_factory=RouterSettings)
    direct: bool = False
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Where programs reach it."""
        return self.folder / "router.sock"

    @property
    def environment(self) -> dict[str, str]:
        """What tells the library where it is."""
        return {"FREEFLOW_ROUTER": str(self.socket)}

    @property
    def client(self) -> RouterClient:
        """Its control socket."""
        return RouterClient(self.folder / "control.sock")

    def learn(self, containers: Containers) -> None:
        """Tell it of other containers."""
        self.containers = containers
        self.client.replace_snapshot(snapshot(containers, self.settings, direct=self.direct))

    def start(self) -> None:
        """Start it; it serves when this returns."""
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "dataplane.router",
                f"--socket={self.socket}",
                f"--control={self.folder / 'control.sock'}",
                "--watch-stdin",
            ],
            cwd=TOP,
            stdin=subprocess.PIPE,
            stdout=(self.folder / "router.log").open("ab"),
        )
        until = time.monotonic() + patience(5)
        while True:
            try:
                self.learn(self.containers)
                return
            except RouterAway:
                if time.monotonic() > until or self.process.poll() is not None:
                    raise
                time.sleep(0.02)

    def kill(self) -> None:
        """Kill it, as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def restart(self) -> None:
        """Another one takes its place."""
        self.kill()
        self.start()


@contextlib.contextmanager
def router(
    folder: Path,
    containers: Containers = ALONE,
    settings: RouterSettings | None = None,
    *,
    direct: bool = False,
) -> Iterator[TestRouter]:
    """A router that knows these containers; it must survive without a bug."""
    made = TestRouter(folder, containers, settings or RouterSettings(), direct)
    made.start()
    try:
        yield made
    finally:
        made.kill()
    log = (folder / "router.log").read_text()
    assert "a bug in the router" not in log, log


@contextlib.contextmanager
def container(address: str) -> Iterator[Path]:
    """A network namespace with this address, which its packets come from; needs root."""
    steps = (
        "ip link set lo up",
        f"ip addr add {address}/32 dev lo",
        f"ip route add 10.0.4.0/24 dev lo src {address}",
        "echo ready",
        "exec sleep inf",
    )
    command = ["unshare", "--net", "sh", "-c", " && ".join(steps)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"ready\n"
            yield Path(f"/proc/{holder.pid}/ns/net")
        finally:
            holder.kill()


def main(arguments: Sequence[str]) -> None:
    """Run until standard input ends."""
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    containers = {
        Path(path): addresses.split(",")
        for path, _, addresses in (each.partition("=") for each in arguments[1:])
    }
    with router(folder, containers or ALONE) as made:
        print(f"FREEFLOW_ROUTER={made.socket}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
