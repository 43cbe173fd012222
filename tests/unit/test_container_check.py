"""`freeflow doctor CONTAINER`: what is said of a container's mount, environment and processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dataplane.control import Connections, VerbsObjects
from plugin.admin import create_admin
from plugin.cli.client import Client, Engine
from plugin.cli.container_check import examine_container
from plugin.cli.doctor import DoctorReport
from plugin.cli.loaded import host_file, inspect_process
from plugin.cli.preload import LIBRARY
from plugin.status import OtherNetworkStatus, Status
from tests.unit.documented import is_documented
from tests.unit.sockets import engine, served
from tests.unit.statuses import LISTED, LISTED_VERBS, admin_answers, network, status

NAME = "web.1.abc"
OURS = ("/run/freeflow/verbs/libibverbs.so.1", "/run/freeflow/verbs/libibverbs.so")
ASKS = "".join(f":{name}" for name in OURS)
STOCK = "/usr/lib/x86_64-linux-gnu/libibverbs.so.1.14.44.0"
MOUNTS = [{"Destination": "/run/freeflow", "Source": "/run/freeflow"}]


class World:
    """A host with a library, and a container with one process, as /proc shows it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run, self.proc = directory / "run", directory / "proc"
        (self.run / "freeflow").mkdir(parents=True)
        self.library = self.run / "freeflow" / LIBRARY
        self.library.write_bytes(b"elf")
        (self.run / "freeflow/verbs").mkdir()
        for name in OURS:
            (self.run / name.removeprefix("/run/")).write_bytes(b"verbs")
        self.status: Status | None = status()
        self.container: dict[str, Any] = {
            "Name": f"/{NAME}",
            "State": {"Running": True},
            "Mounts": MOUNTS,
        }
        self.pids: list[int] = []
        self.process(71)

    def process(
        self,
        pid: int,
        *,
        preload: bool = True,
        library: Path | None = None,
        name: str = "",
        verbs: str = "",
        mapped: tuple[str, ...] = (),
        path: str = "",
    ) -> None:
        """A process, with the host's library if nothing else is said.

        `verbs` stands behind the library in LD_PRELOAD, `path` is LD_LIBRARY_PATH. Of `mapped`
        files those below /run are the host's.
        """
        folder = self.proc / str(pid)
        folder.mkdir(parents=True)
        variables = [b"PATH=/bin", f"LD_LIBRARY_PATH={path}".encode()]
        if preload:
            variables.append(f"LD_PRELOAD=/run/freeflow/libfreeflow.so{verbs}".encode())
        (folder / "environ").write_bytes(b"\0".join(variables) + b"\0")
        (folder / "comm").write_text(f"{name or f'p{pid}'}\n")
        lines = ["55d0-55d1 r-xp 00000000 08:01 42                         /bin/p"]
        own = library or self.library
        if library is None or library.exists():
            lines.append(_line("/run/freeflow/libfreeflow.so", own))
        for file in mapped:
            lines.append(_line(file, self.run / file.removeprefix("/run/")))
        (folder / "maps").write_text("\n".join(lines) + "\n")
        self.pids.append(pid)

    def report(self, name: str = NAME) -> DoctorReport:
        answers: dict[str, Any] = {
            f"/containers/{NAME}/json": self.container,
            f"/containers/{NAME}/top": {
                "Titles": ["PID"],
                "Processes": [[str(pid)] for pid in self.pids],
            },
        }
        admin, docker = self.directory / "admin.sock", self.directory / "docker.sock"
        app = create_admin(
            admin_answers(status=lambda: self.status, connections=_connections, verbs=_verbs)
        )
        with served(app, admin), served(engine(answers), docker):
            client = Client(admin, Engine(docker))
            report = examine_container(client, name, run=self.run, proc=self.proc)
        admin.unlink()
        docker.unlink()
        assert all(is_documented(finding.what) for finding in report.findings)
        assert all(finding.cause and finding.remedy for finding in report.findings)
        return report

    def said(self) -> list[str]:
        return [finding.what for finding in self.report().findings]


def _line(path: str, file: Path) -> str:
    """A line of /proc/PID/maps; a file that isn't there has numbers that no file has."""
    device = inode = 0
    if file.exists():
        device, inode = file.stat().st_dev, file.stat().st_ino
    numbers = f"{os.major(device):02x}:{os.minor(device):02x} {inode}"
    return f"7f00-7f01 r-xp 00000000 {numbers}     {path}"


def _connections() -> Connections:
    return LISTED


def _verbs() -> VerbsObjects:
    return LISTED_VERBS


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_well(world: World) -> None:
    """A container with mount, variable and library passes each check; the router's counts are
    shown.
    """
    report = world.report()
    assert report.findings == []
    assert "1 of 1 processes have this host's library" in report.passed
    assert any(line.startswith("the router knows 4 of its processes") for line in report.passed)


def test_the_way_of_the_library(world: World) -> None:
    """The report says whether the stack has mounted the library, or the runtime has added it."""
    assert any("freeflow inject" in line for line in world.report().passed)
    world.container["Mounts"] = []
    world.container["State"]["Pid"] = 71
    table = "31 30 0:25 /freeflow-admin/public /run/freeflow ro,nosuid,nodev - tmpfs tmpfs rw\n"
    (world.proc / "71/mountinfo").write_text("x\n" + table)
    report = world.report()
    assert report.findings == []
    assert any("added by the runtime" in line for line in report.passed)


@pytest.mark.parametrize(
    ("runtime", "labels", "variables", "reason"),
    [
        ("runc", {}, [], "its runtime isn't freeflow"),
        ("freeflow", {"freeflow.accelerate": "off"}, [], "its label freeflow.accelerate is off"),
        ("freeflow", {}, ["FREEFLOW=off"], "its variable FREEFLOW is off"),
        ("freeflow", {}, [], "was on no FreeFlow network when it started"),
    ],
)
def test_why_the_runtime_has_not_added_it(
    world: World, runtime: str, labels: dict[str, str], variables: list[str], reason: str
) -> None:
    """A container without the library is told why the runtime has left it alone."""
    world.container["Mounts"] = []
    world.container["HostConfig"] = {"Runtime": runtime}
    world.container["Config"] = {"Labels": labels, "Env": variables}
    finding = world.report().findings[0]
    assert finding.what == f"{NAME} has no /run/freeflow"
    assert reason in finding.cause


def test_no_container(world: World) -> None:
    """A container that the engine doesn't know is the only finding."""
    assert [finding.what for finding in world.report("nobody").findings] == [
        "nobody can't be inspected"
    ]


def test_not_running(world: World) -> None:
    """A container that has ended is the only finding."""
    world.container["State"] = {"Running": False}
    assert world.said() == [f"{NAME} isn't running"]


def test_no_mount(world: World) -> None:
    """A missing mount is found, and the remedy shows it."""
    world.container["Mounts"] = None
    (finding,) = world.report().findings
    assert finding.what == f"{NAME} has no /run/freeflow"
    assert (
        "--mount type=bind,src=/run/freeflow,dst=/run/freeflow --env LD_PRELOAD=" in finding.remedy
    )


def test_no_variable(world: World) -> None:
    """A missing variable is found, and the remedy shows it."""
    world.pids.clear()
    world.process(72, preload=False, library=Path("/nonexistent"))
    assert world.said() == [f"no process of {NAME} loads the library"]


def test_init_of_docker(world: World) -> None:
    """The static docker-init of `docker run --init` is not reported."""
    world.process(72, library=Path("/nonexistent"), name="docker-init")
    assert not world.report().findings


def test_static_program(world: World) -> None:
    """A program that has the variable and not the library is named."""
    world.process(72, library=Path("/nonexistent"))
    (finding,) = world.report().findings
    assert finding.what == f"1 of 2 processes of {NAME} can't load the library"
    assert "p72" in finding.cause


def test_older_library(world: World) -> None:
    """A process that mapped a library which was replaced since is found, by the file and not its
    name.
    """
    older = world.directory / "older.so"
    older.write_bytes(b"older")
    world.process(72, library=older)
    (finding,) = world.report().findings
    assert finding.what.startswith(f"1 of 2 processes of {NAME} run with another library")
    assert "p72" in finding.cause


def test_no_library_on_the_host(world: World) -> None:
    """A library that the plugin has not installed is reported, and not the consequences."""
    world.library.unlink()
    assert world.said() == ["this host has no /run/freeflow/libfreeflow.so"]


def test_other_networks(world: World) -> None:
    """A container without a FreeFlow network, or without an accelerated one, is found."""
    world.status = status(networks=[network(endpoints=[])])
    assert world.said() == [f"{NAME} is on no network that is accelerated"]


def test_a_network_of_another_driver(world: World) -> None:
    """A container on an accelerated bridge is well; one on a bridge that asks in vain is not."""
    found = OtherNetworkStatus(
        id="b", name="app", driver="bridge", containers={NAME: ["172.20.0.2"]}
    )
    world.status = status(networks=[], other_networks=[found])
    report = world.report()
    assert report.findings == []
    assert "on app (bridge) connections move within this host" in report.passed
    found = OtherNetworkStatus(id="b", name="app", driver="macvlan", reason="it is a macvlan")
    world.status = status(networks=[], other_networks=[found])
    (finding,) = world.report().findings
    assert finding.what == f"{NAME} is on no network that is accelerated"
    assert finding.cause.startswith("only FreeFlow networks are")
    world.container["NetworkSettings"] = {"Networks": {"app": {"NetworkID": "b"}}}
    (finding,) = world.report().findings
    assert finding.cause == "app: it is a macvlan"
    world.status = status(networks=[network(acceleration=False)])
    assert world.said() == [f"acceleration is off on all networks of {NAME}"]
    world.status = status(settings={"ACCELERATION": "off"})
    assert world.said() == ["acceleration is off on this host"]


def test_no_router(world: World) -> None:
    """A router that doesn't answer is found."""
    world.status = status(router=None)
    assert world.said() == ["the router does not answer; new connections stay on the overlay"]


def only_with(world: World, **process: Any) -> DoctorReport:
    """The report of a container with one process like that."""
    world.pids.clear()
    world.process(72, **process)
    return world.report()


def test_verbs(world: World) -> None:
    """A container whose processes have our libibverbs passes, and its devices are noted."""
    report = only_with(world, verbs=ASKS, mapped=OURS)
    assert report.findings == []
    assert "1 of 1 processes have this host's libibverbs" in report.passed
    assert "a network of it has verbs" in report.passed
    assert report.notes == [
        "process 4711 has a device of verbs with 10.0.4.7, fd00::7, and 2 queue pairs"
    ]


def test_without_verbs(world: World) -> None:
    """A container without verbs has nothing wrong; if a process of it uses the image's libibverbs,
    a note says so.
    """
    report = world.report()
    assert (report.findings, report.notes) == ([], [])
    assert not any("verbs" in line for line in report.passed)
    report = only_with(world, mapped=(STOCK,))
    assert report.findings == []
    (note,) = report.notes
    assert note.startswith(
        f"verbs are not added; 1 of 1 processes use another libibverbs ({STOCK})"
    )


@pytest.mark.parametrize(
    ("process", "what", "cause"),
    [
        ({"verbs": ASKS}, "processes of NAME have not loaded our libibverbs", "no libibverbs is"),
        ({"verbs": ASKS, "mapped": (STOCK,)}, "have not loaded our libibverbs", f"{STOCK} is"),
        ({"verbs": ASKS, "mapped": (*OURS, STOCK)}, "have two libibverbs", STOCK),
        ({"verbs": ASKS, "mapped": OURS[:1]}, "lack the companion of our libibverbs", "of the image"),
        (
            {"verbs": ASKS, "mapped": OURS, "library": Path("/nonexistent")},
            "processes of NAME lack libfreeflow.so",
            "no device",
        ),
    ],
)  # fmt: skip
def test_which_libibverbs_wins(
    world: World, process: dict[str, Any], what: str, cause: str
) -> None:
    """A process with another libibverbs than ours, with both, or with a part of ours, is named."""
    found = [
        finding
        for finding in only_with(world, **process).findings
        if what.replace("NAME", NAME) in finding.what
    ]
    (finding,) = found
    assert finding.what.startswith("1 of 1 ")
    assert "p72" in finding.cause
    assert cause in finding.cause


def test_older_libibverbs(world: World) -> None:
    """A process that mapped a libibverbs which was replaced since is found by its file."""
    world.process(72, verbs=ASKS, mapped=OURS)
    file = world.run / "freeflow/verbs/libibverbs.so.1"
    # The old file has to be there still, or the new one may get its number.
    file.rename(world.directory / "older")
    file.write_bytes(b"new")
    (finding,) = world.report().findings
    assert finding.what.startswith(f"1 of 2 processes of {NAME} run with another libibverbs")
    file.unlink()
    assert world.said() == ["this host has no /run/freeflow/verbs/libibverbs.so.1"]


def test_verbs_that_are_off(world: World) -> None:
    """A network or a host without verbs is found, where verbs were added."""
    world.status = status(networks=[network(verbs=False)])
    assert world.said() == []
    world.process(72, verbs=ASKS, mapped=OURS)
    assert world.said() == [f"verbs are off on all networks of {NAME}"]
    world.status = status(settings={"VERBS": "off"})
    assert world.said() == ["verbs are off on this host"]


def test_verbs_with_musl(world: World) -> None:
    """A process of musl without our folder in LD_LIBRARY_PATH is noted."""
    musl = (*OURS, "/lib/ld-musl-x86_64.so.1")
    notes = only_with(world, verbs=ASKS, mapped=musl).notes
    assert any(note.startswith("p72: musl loads ") for note in notes)
    world.pids.clear()
    world.process(73, verbs=ASKS, mapped=musl, path="/x:/run/freeflow/verbs")
    assert not any("musl" in note for note in world.report().notes)


def test_a_process_that_ends_meanwhile(world: World) -> None:
    """A process that has ended since the engine listed it is no finding."""
    world.pids.append(99)
    assert world.said() == []


def test_a_real_process(tmp_path: Path) -> None:
    """A mapped file with the library's name is recognised in a real process's /proc."""
    python = Path(sys.executable).resolve()
    folder = tmp_path / "freeflow"
    folder.mkdir()
    shutil.copy(python, folder / LIBRARY)
    code = (
        f"import mmap, sys; f = open({str(folder / LIBRARY)!r}, 'rb'); "
        "m = mmap.mmap(f.fileno(), 4096, prot=mmap.PROT_READ); print('ready', flush=True); sys.stdin.read()"
    )
    # The loader complains of what it can't preload, and goes on.
    environment = {**os.environ, "LD_PRELOAD": f"/nonexistent/{LIBRARY}"}
    with subprocess.Popen(
        [str(python), "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        found = inspect_process(process.pid)
        assert found is not None
        assert (found.preloads, found.library) == (
            True,
            host_file(tmp_path, f"/run/freeflow/{LIBRARY}"),
        )
        (folder / LIBRARY).unlink()
        found = inspect_process(process.pid)
        assert found is not None
        assert found.library is not None
        process.stdin.close()
    assert inspect_process(process.pid) is None
