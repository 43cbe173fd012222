"""Complete systems on two hosts: library, routers, sessions and relays, which share this machine's
memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from dataplane.control import RouterSettings, Rule
from testbed import wait_until
from testbed.kernel_hosts import a_network, lab, missing_tools
from testbed.patience import patience
from tests.dataplane.places import LIBRARY, ROOT, Counts, compile_c, counts_of
from tests.dataplane.test_torture import SOURCE as TORTURE
from tests.kernel.test_router_hosts import PORT, Router
from tests.unit.swarm_ca import Authority, write

SECONDS: Final = int(os.environ.get("TORTURE_SECONDS", "5"))
SEED: Final = os.environ.get("TORTURE_SEED", "")
PATIENCE: Final = 30.0


@dataclass
class Hosts:
    """The routers of client and server."""

    client: Router
    server: Router
    folder: Path
    programs: Path
    ports: Iterator[int]

    @property
    def statistics(self) -> Path:
        return self.folder / "statistics.json"

    def counted(self) -> Counts:
        return counts_of(self.statistics)

    def popen(self, router: Router, arguments: Sequence[str]) -> subprocess.Popen[str]:
        """Start a program in the container of a host."""
        environment = {
            **os.environ,
            "LD_PRELOAD": str(LIBRARY),
            "FREEFLOW_ROUTER": str(router.socket),
            "FREEFLOW_STATS": str(self.statistics),
            "FREEFLOW_EXPECTED": "1",
            "STATIC_CAT": str(self.programs / "static-cat"),
        }
        return router.box.do(
            lambda: subprocess.Popen(
                arguments,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )

    def play(
        self, program: Path, *arguments: str, last: Sequence[str] = (), seconds: float = PATIENCE
    ) -> str:
        """Run both ends of a program; return the client's output."""
        self.statistics.unlink(missing_ok=True)
        common = [str(self.server.box.ipv4), str(next(self.ports)), *arguments]
        ends = {
            "server": self.popen(self.server, [str(program), "server", *common]),
            "client": self.popen(self.client, [str(program), "client", *common, *last]),
        }
        said: dict[str, str] = {}
        try:
            for role in ("client", "server"):
                said[role] = ends[role].communicate(timeout=patience(seconds))[0]
        except subprocess.TimeoutExpired:
            said["late"] = "not over in time"
        finally:
            for role, end in ends.items():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(end.pid, signal.SIGKILL)
                said[role] = said.get(role) or end.communicate()[0]
        killed = -signal.SIGKILL if "killed_whole" in arguments else 0
        codes = (ends["client"].returncode, ends["server"].returncode)
        assert codes == (0, killed), (codes, said)
        return said["client"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Iterator[Hosts]:
    """Two hosts with a link between their relays."""
    if missing := missing_tools():
        pytest.skip(f"missing: {missing}")
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    top = tmp_path_factory.mktemp("hosts")
    relay = top / "freeflow-relay"
    subprocess.run(
        [ROOT / "dataplane/relay/build.sh", "--memory", relay], check=True, capture_output=True
    )
    authority, network = Authority(), a_network()
    # Small rings, so that many bytes wait for room.
    settings = RouterSettings(
        session_port=PORT, rule=Rule(operations=2, age=0), remote_ring=64 << 10
    )
    with lab(2) as made:
        boxes = [host.container(network, number) for number, host in enumerate(made.hosts, 1)]
        made.mesh(network)
        routers = []
        for host, other, box in zip(made.hosts, reversed(made.hosts), boxes, strict=True):
            folder = top / f"host{host.number}"
            folder.mkdir()
            write(folder / "swarm", authority.root, authority.node(f"node{host.number}"))
            routers.append(Router(host, other, box, folder, relay, settings))
        try:
            for router in routers:
                router.start()
            wait_until("a link", lambda: all(router.linked() for router in routers), 30)
            yield Hosts(routers[0], routers[1], top, programs, itertools.count(7100))
        finally:
            for router in routers:
                if router.process is not None:
                    router.kill()


def nothing_left(hosts: Hosts) -> bool:
    """Whether the relays have released all memory."""
    return all(router.rdma().memory == 0 for router in (hosts.client, hosts.server))


@pytest.mark.parametrize(
    ("program", "scenario"),
    [
        *(("ends", name) for name in ("half_close", "half_close_other", "data_then_end", "killed")),
        *(("ends", name) for name in ("killed_whole", "reset_by_unread", "lingering_close")),
        *(("ends", name) for name in ("broken_pipe", "epoll_without_reader")),
        *(("bytes", name) for name in ("wait_all", "urgent")),
        *(
            ("processes", name)
            for name in ("fork_at_once", "exec_late", "exec_static", "pass_away")
        ),
        *(("waiting", name) for name in ("epoll_edge", "epoll_nested", "back_pressure", "idle")),
    ],
)
def test_programs(hosts: Hosts, program: str, scenario: str) -> None:
    """Connections move, wait and end as within a host."""
    hosts.play(hosts.programs / program, scenario)
    counted = hosts.counted()
    assert counted["remote"] >= 1
    assert (counted["broken"], counted["corrupt"]) == (0, 0)


@pytest.mark.timeout(SECONDS + 120)
def test_torture(hosts: Hosts) -> None:
    """No byte is wrong, nothing hangs, and the relays keep no memory."""
    program = compile_c(TORTURE, hosts.folder / "torture")
    seed = SEED or str(int.from_bytes(os.urandom(4), "big"))
    said = hosts.play(program, last=(str(SECONDS), seed, "16", "4"), seconds=SECONDS + 60)
    assert "operations" in said
    counted = hosts.counted()
    assert counted["remote"] >= 5
    assert counted["corrupt"] == 0
    wait_until("nothing to be left", lambda: nothing_left(hosts), 30)


def test_dead_relay(hosts: Hosts) -> None:
    """When a relay is killed, its connections end by a reset, and a new relay carries the next
    ones.
    """
    program = hosts.folder / "wait.py"
    program.write_text(WAIT)
    listener = hosts.popen(hosts.server, [sys.executable, str(program), str(hosts.server.box.ipv4)])
    assert listener.stdout is not None
    assert listener.stdout.readline() == "listens\n"
    caller = hosts.popen(
        hosts.client, [sys.executable, str(program), str(hosts.server.box.ipv4), "call"]
    )
    wait_until("it", lambda: hosts.client.rdma().connections == 1, 20)
    for pid in Path(f"/proc/{hosts.client.process.pid}/task").glob("*/children"):  # type: ignore[union-attr]
        for child in pid.read_text().split():
            if b"freeflow-relay" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)
    for end in (caller, listener):
        assert "ConnectionResetError" in end.communicate(timeout=patience(20))[0]
    wait_until("a link", lambda: hosts.client.linked() and hosts.server.linked(), 30)
    hosts.play(hosts.programs / "ends", "half_close")


WAIT: Final = """
import socket, sys, time
if len(sys.argv) > 2:
    talk = socket.create_connection((sys.argv[1], 7099))
else:
    with socket.create_server((sys.argv[1], 7099)) as listener:
        print("listens", flush=True)
        talk, _ = listener.accept()
try:
    # The answers of the routers are looked for as long as it talks.
    for _ in range(200):
        talk.sendall(b"x")
        talk.recv(1)
        time.sleep(0.005)
    while talk.recv(1):
        pass
except OSError as error:
    print(type(error).__name__)
"""
