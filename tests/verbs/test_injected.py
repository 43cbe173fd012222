"""Containers with what `freeflow inject --verbs` adds: namespaces, a router, and nothing more."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plugin import library_file
from plugin.cli import preload, verbs_check
from plugin.cli.loaded import Loaded, host_file, inspect_process
from testbed import wait_until
from testbed.namespace_bed import BedContainer, NamespaceBed, bed
from testbed.patience import patience
from tests.dataplane.places import LIBRARY, compile_c
from tests.dataplane.test_musl import HEADERS as MUSL_HEADERS
from tests.verbs.conftest import HEADER
from tests.verbs.test_gossip import Gossip, check_all

pytestmark = pytest.mark.kernel

PORT = "18515"
PING_PONG = ("ibv_rc_pingpong", "-g", "0", "-p", PORT)
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--bounding-set=-all")  # fmt: skip
OPENS = r"""
#include <dlfcn.h>
#include <stdio.h>

int main(int argc, char **argv)
{
        void *opened = dlopen(argv[argc - 1], RTLD_NOW);
        void **(*list)(int *) = opened ? (void **(*)(int *))dlsym(opened, "ibv_get_device_list") : NULL;
        const char *(*name)(void *) = opened ? (const char *(*)(void *))dlsym(opened, "ibv_get_device_name") : NULL;
        int count = 0;
        void **found = list ? list(&count) : NULL;

        puts(!opened ? "no library" : count ? name(found[0]) : "no device");
        return 0;
}
"""


@pytest.fixture(scope="module")
def made(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NamespaceBed]:
    """Two containers, and the folder as the plugin fills it."""
    if os.geteuid() != 0 or not LIBRARY.exists():
        pytest.skip(f"missing: root or {LIBRARY} (make library)")
    shipped = tmp_path_factory.mktemp("shipped")
    (shipped / "verbs").mkdir()
    shutil.copy(LIBRARY, shipped)
    for name in (library.name, "libibverbs.so"):
        shutil.copy(library.with_name(name), shipped / "verbs")
    with bed("a", "b") as made:
        made.shared.joinpath("router.sock").chmod(0o666)
        assert library_file.place(made.shared, shipped, quietly=True)
        yield made


def command(*program: str, musl: bool = False, verbs: bool = True) -> list[str]:
    """A program as an unprivileged user of a container with what is injected."""
    words = preload.options({}, verbs=verbs, musl=musl)
    variables = [value for option, value in zip(words[::2], words[1::2], strict=True) if option == "--env"]  # fmt: skip
    more = os.environ.get("LD_LIBRARY_PATH")
    if more and not musl:
        variables.append(f"LD_LIBRARY_PATH={more}")
    return [*NOBODY, "env", *variables, *program]


def start(box: BedContainer, *program: str) -> subprocess.Popen[str]:
    return box.popen(
        command(*program), accelerated=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def listens(box: BedContainer) -> bool:
    return f":{PORT}" in box.run(["ss", "-Hltn"], accelerated=False).stdout


def play(made: NamespaceBed, *program: str) -> list[subprocess.Popen[str]]:
    """Both halves of a program, one in each container."""
    if shutil.which(program[0]) is None:
        pytest.skip(f"missing: {program[0]} (make setup)")
    a, b = made.containers.values()
    server = start(a, *program)
    wait_until("the server to listen", lambda: listens(a), 10, 0.05)
    return [server, start(b, *program, str(a.ipv4))]


@pytest.mark.parametrize(
    "program",
    [
        (*PING_PONG, "-n", "1000", "-c"),
        (*PING_PONG, "-n", "1000", "-c", "-e"),
        ("ib_write_lat", "-d", "freeflow0", "-x", "0", "-F", "-n", "200", "-p", PORT),
        ("ib_read_lat", "-d", "freeflow0", "-x", "0", "-F", "-n", "200", "-p", PORT),
        ("ib_atomic_lat", "-d", "freeflow0", "-x", "0", "-F", "-n", "200", "-p", PORT),
        ("ib_send_bw", "-d", "freeflow0", "-x", "0", "-F", "-n", "200", "-p", PORT),
    ],
    ids=lambda program: f"{program[0]} {program[-1]}",
)
def test_programs(made: NamespaceBed, program: tuple[str, ...]) -> None:
    """Debian's programs run unchanged between two containers as a user without privileges."""
    ends = play(made, *program)
    said = [end.communicate(timeout=patience(60))[0] for end in ends]
    assert [end.returncode for end in ends] == [0, 0], said


def test_rdma_cm(made: NamespaceBed) -> None:
    """So does a program that connects by rdma_cm, with the librdmacm that is there."""
    if shutil.which("rping") is None:
        pytest.skip("missing: rping (make setup)")
    a, b = made.containers.values()
    words = ("rping", "-a", str(a.ipv4), "-C", "100", "-V")
    server = start(a, *words, "-s")

    def answered() -> bool:
        assert server.poll() is None, server.communicate()
        done = b.run(command(*words, "-c"), accelerated=False, check=False)
        return done.returncode == 0

    try:
        wait_until("rping to be answered", answered, 10, 0.05)
        assert server.wait(patience(10)) == 0
    finally:
        server.kill()


def test_what_doctor_sees(made: NamespaceBed) -> None:
    """While programs run, doctor finds our libibverbs in them and nothing wrong, and the router
    lists their queue pairs.
    """
    ends = play(made, *PING_PONG, "-n", "100000000", "-e")

    def paths() -> list[str]:
        return [each.path for each in made.router.verbs().queue_pairs if each.operations]

    try:
        wait_until("both queue pairs to work", lambda: paths() == ["shm", "shm"], 20, 0.1)
        devices = made.router.verbs().devices
        assert {device.container for device in devices} == {"a", "b"}
        found = [inspect_process(device.pid) for device in devices]
        processes = [process for process in found if process is not None]
        assert len(processes) == 2
        assert all(process.companion and process.library for process in processes)
        run = made.shared.parent / "run"
        run.mkdir()
        (run / "freeflow").symlink_to(made.shared)
        own, companion = (host_file(run, path) for path in preload.VERBS)
        assert [process.verbs for process in processes] == [own] * 2
        assert not list(verbs_check.check_libraries("a", processes, own, companion))
    finally:
        for end in ends:
            end.kill()
            end.wait()


def test_without_verbs(made: NamespaceBed) -> None:
    """A program of a container without verbs finds no device, and doctor nothing of ours in it."""
    if shutil.which("ibv_devices") is None:
        pytest.skip("missing: ibv_devices (make setup)")
    a = made.containers["a"]
    done = a.run(command("ibv_devices", verbs=False), accelerated=False, check=False)
    assert "freeflow0" not in done.stdout
    assert "freeflow0" in a.run(command("ibv_devices"), accelerated=False).stdout
    off = {"FREEFLOW": "off"}
    done = a.run(command("ibv_devices"), accelerated=False, check=False, env=off)
    assert "freeflow0" not in done.stdout
    sleeping: Any = a.popen(command("sleep", "1000", verbs=False), accelerated=False)

    def processes() -> list[Loaded]:
        found = inspect_process(sleeping.pid)
        return [found] if found is not None and found.name == "sleep" else []

    assert not verbs_check.have_verbs(wait_until("it to sleep", processes, 10, 0.05))


@pytest.mark.parametrize(
    ("compiler", "musl", "name", "said"),
    [
        ("gcc", False, "libibverbs.so.1", "freeflow0"),
        ("gcc", False, "libibverbs.so", "freeflow0"),
        ("musl-gcc", True, "libibverbs.so.1", "freeflow0"),
        ("musl-gcc", True, "libibverbs.so", "freeflow0"),
        ("musl-gcc", False, "libibverbs.so", "no library"),
    ],
)
def test_opened_at_run_time(
    made: NamespaceBed, tmp_path: Path, compiler: str, musl: bool, name: str, said: str
) -> None:
    """A program that opens libibverbs by either name finds ours; with musl it needs the variable
    that `freeflow inject` adds there.
    """
    if shutil.which(compiler) is None:
        pytest.skip(f"missing: {compiler}")
    source = tmp_path / "opens.c"
    source.write_text(OPENS)
    program = compile_c(source, made.shared.parent / f"opens-{compiler}", "-ldl", compiler=compiler)
    done = made.containers["a"].run(command(str(program), name, musl=musl), accelerated=False)
    assert (done.stdout, done.stderr) == (f"{said}\n", "")


@pytest.mark.skipif(
    shutil.which("gcc") is None or not HEADER.exists(), reason="missing: gcc, verbs.h"
)
def test_nccl(made: NamespaceBed) -> None:
    """Everything that NCCL's transport looks up at run time is found, and what it does with it
    works: see `nccl.c`.
    """
    folder = made.shared.parent
    program = compile_c(Path(__file__).with_name("nccl.c"), folder / "nccl", "-ldl")
    board = folder / "board"
    board.write_bytes(bytes(4096))
    board.chmod(0o666)
    ends = [
        start(box, str(program), str(board), str(side))
        for side, box in enumerate(made.containers.values())
    ]
    try:
        said = [end.communicate(timeout=patience(30))[0] for end in ends]
    finally:
        for end in ends:
            end.kill()
            end.wait()
    assert said == ["", ""]
    assert [end.returncode for end in ends] == [0, 0]


class InjectedGossip(Gossip):
    """A process of `gossip.c` in a container with what is injected."""

    def __init__(self, box: BedContainer, program: Path, *, musl: bool) -> None:
        self.process = box.popen(
            command(str(program), musl=musl),
            accelerated=False,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.number = self._answer()


@pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("musl-gcc") is None or not HEADER.exists(),
    reason="missing: gcc, musl-gcc, verbs.h",
)
def test_musl(made: NamespaceBed, library: Path) -> None:
    """A program that is linked with musl and libibverbs, as those of Alpine are, works with others
    of its kind and with those of glibc: it registers memory, sleeps, sends, receives, and joins a
    group.
    """
    source, box = Path(__file__).with_name("gossip.c"), made.containers["a"]
    gossips: list[Gossip] = []
    try:
        for number, compiler in enumerate(["musl-gcc", "gcc", "musl-gcc"]):
            musl = compiler == "musl-gcc"
            options = (*MUSL_HEADERS, "-Wno-error") if musl else ()
            to = made.shared.parent / f"gossip{number}"
            link = ("-Wl,--no-as-needed", str(library))
            program = compile_c(source, to, *options, *link, compiler=compiler)
            gossips.append(InjectedGossip(box, program, musl=musl))
        check_all(gossips)
        assert [each.say("join") for each in gossips[:2]] == ["done", "done"]
        time.sleep(patience(0.5))  # for the router to hear of it
        assert gossips[2].say("cast 10") == "sent"
        assert [each.say("await 10") for each in gossips[:2]] == ["got 10", "got 10"]
    finally:
        for each in gossips:
            each.process.kill()
            each.process.communicate()
