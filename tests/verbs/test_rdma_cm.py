"""Programs connect by rdma_cm, with the real router: see `rdma_cm.c`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from testbed.patience import patience
from testbed.process import wait_until
from tests.dataplane.places import LIBRARY
from tests.verbs.conftest import (
    BUILD,
    HEADER,
    SECONDS,
    compile_test,
    run_test,
    some_seed,
    sources,
)
from tests.verbs.router import TestRouter, container, router

CASES: Final = (
    *("file", "epoll", "blocking", "sizes", "ids", "states", "addresses", "connection", "notify"),
    *("rejection", "backlog", "migration", "datagrams", "groups", "random", "race"),
)
ADDRESSES: Final = ("10.0.4.1", "10.0.4.2")
SANITIZERS: Final = ("", "address,undefined")
RUNTIMES: Final = {"": (), "address,undefined": ("libasan.so", "libubsan.so")}
PAIRS: Final = {
    "rping": (
        ["rping", "-s", "-a", "{}", "-C", "5", "-V"],
        ["rping", "-c", "-a", "{}", "-C", "5", "-V"],
    ),
    "ucmatose": (["ucmatose", "-c", "20"], ["ucmatose", "-s", "{}", "-c", "20"]),
    "rdma_client": (["rdma_server"], ["rdma_client", "-s", "{}"]),
    "rstream": (["rstream", "-T", "b", "-I", "10"], ["rstream", "-T", "b", "-I", "10", "-s", "{}"]),
    "riostream": (["riostream", "-I", "10"], ["riostream", "-I", "10", "-s", "{}"]),
    "ib_send_bw": (["ib_send_bw", "-R", "-n", "100"], ["ib_send_bw", "-R", "-n", "100", "{}"]),
    "ib_read_lat": (["ib_read_lat", "-R", "-n", "100"], ["ib_read_lat", "-R", "-n", "100", "{}"]),
    "ib_atomic_bw": (
        ["ib_atomic_bw", "-R", "-e", "-n", "100"],
        ["ib_atomic_bw", "-R", "-e", "-n", "100", "{}"],
    ),
    "ib_send_lat": (
        ["ib_send_lat", "-R", "-c", "UD", "-n", "100"],
        ["ib_send_lat", "-R", "-c", "UD", "-n", "100", "{}"],
    ),
    "udaddy": (["udaddy", "-c", "5"], ["udaddy", "-c", "5", "-s", "{}"]),
    "cmtime": (["cmtime", "-c", "10"], ["cmtime", "-c", "10", "-s", "{}"]),
}
"""Servers and clients of packages; {} is the server's address."""
ENDLESS: Final = ("cmtime",)
"""Those whose server does not end."""


def runtime(name: str) -> str:
    """Where gcc has a sanitizer's runtime."""
    return subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()


@dataclass
class Containers:
    """Two network namespaces, each with an address, and their router."""

    router: TestRouter
    namespaces: Sequence[Path]
    preload: str

    def start(self, container: int, *command: str | Path) -> subprocess.Popen[str]:
        """A program in one of them."""
        inside = ["nsenter", f"--net={self.namespaces[container]}", "env"]
        preload = [f"LD_PRELOAD={self.preload}", "ASAN_OPTIONS=detect_leaks=0"]
        return subprocess.Popen(
            [*inside, *preload, *command],
            env={**os.environ, **self.router.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def finish(process: subprocess.Popen[str]) -> str:
    """What a program says that has to succeed."""
    try:
        said, _ = process.communicate(timeout=patience(30))
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        raise AssertionError(f"it doesn't end: {said}") from None
    assert process.returncode == 0, said
    return said


@contextlib.contextmanager
def containers(folder: Path, library: Path, sanitizer: str = "") -> Iterator[Containers]:
    """Both, and the router, which survives without a bug."""
    files = [LIBRARY, library, library.with_name("libibverbs.so")]
    preload = ":".join([*map(runtime, RUNTIMES[sanitizer]), *map(str, files)])
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(container(address)) for address in ADDRESSES]
        places = {path: (address,) for path, address in zip(paths, ADDRESSES, strict=True)}
        yield Containers(stack.enter_context(router(folder, places)), paths, preload)


@pytest.fixture(scope="module", params=SANITIZERS)
def bed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Containers, Path]]:
    """Both, with a library with a sanitizer, and `rdma_cm`."""
    if os.geteuid() or not LIBRARY.exists() or not HEADER.exists() or not shutil.which("unshare"):
        pytest.skip(f"missing: root, {LIBRARY} (make library), {HEADER}, unshare")
    folder = tmp_path_factory.mktemp("rdma_cm")
    library = folder / "libibverbs.so.1"
    subprocess.run([BUILD, library, request.param], check=True, timeout=patience(120))
    program = compile_test("rdma_cm", folder, "", "-ldl")
    with containers(folder, library, request.param) as made:
        yield made, program


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_messages(tmp_path: Path, sanitizer: str) -> None:
    """Whatever a peer says, nothing is written where it doesn't belong, and no event is told of an
    id that is gone; a request that nobody answers ends in time.
    """
    names = [path.name for path in BUILD.parent.glob("cm_*.c")]
    program = compile_test("cm_messages", tmp_path, sanitizer, *sources(*names))
    run_test(program, SECONDS, str(some_seed()))


@pytest.fixture(scope="module")
def pair(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """Both, for programs of packages."""
    if os.geteuid() or not LIBRARY.exists() or not shutil.which("unshare"):
        pytest.skip(f"missing: root, {LIBRARY} (make library), unshare")
    with containers(tmp_path_factory.mktemp("pair"), library) as made:
        yield made


@pytest.mark.kernel
@pytest.mark.parametrize("case", CASES)
def test_commands(bed: tuple[Containers, Path], case: str) -> None:
    """Each command does and refuses what the kernel's does, and its events come as the kernel's do,
    whatever is written and by however many threads.
    """
    made, program = bed
    finish(made.start(0, program, case, str(some_seed())))


@pytest.mark.kernel
@pytest.mark.parametrize("restarted", [False, True])
def test_peer_dies(bed: tuple[Containers, Path], restarted: bool) -> None:
    """Who is connected to a process that dies is told that it is disconnected, also by a router
    that has started after they were connected.
    """
    made, program = bed
    server = made.start(0, program, "peer", "0")
    assert server.stdout is not None
    client = made.start(1, program, "peer", server.stdout.readline().strip())
    assert client.stdout is not None
    assert client.stdout.readline() == "connected\n"
    assert server.stdout.readline() == "established\n"
    if restarted:
        made.router.restart()
        wait_until("both processes", lambda: len(made.router.client.verbs().devices) == 2)
        time.sleep(1)  # they have been heard, and say more
    client.kill()
    client.communicate()
    finish(server)


@pytest.mark.kernel
def test_router_starts_again(bed: tuple[Containers, Path]) -> None:
    """Who listens is found by way of a router that has started later."""
    made, program = bed
    server = made.start(0, program, "peer", "0")
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    made.router.restart()
    wait_until("the process", lambda: made.router.client.verbs().devices)
    client = made.start(1, program, "peer", port)
    assert client.stdout is not None
    assert client.stdout.readline() == "connected\n"
    client.kill()
    client.communicate()
    finish(server)


@pytest.mark.kernel
@pytest.mark.parametrize("name", PAIRS)
def test_programs(pair: Containers, name: str) -> None:
    """Programs of packages find each other by an address, and what they send arrives."""
    if shutil.which(name) is None:
        pytest.skip(f"missing: {name} (make setup)")
    server, client = ([word.format(ADDRESSES[0]) for word in words] for words in PAIRS[name])
    served = pair.start(0, *server)
    until = time.monotonic() + patience(20)
    while (asked := pair.start(1, *client)).wait(patience(30)):
        # It has come too early.
        said = asked.communicate()[0]
        assert served.poll() is None, said
        assert time.monotonic() < until, said
        if "riomap" in said:
            # riostream listens before it has set its options. Who connects in between ends, and
            # the server reads memory that nobody writes.
            served.kill()
            served.communicate()
            served = pair.start(0, *server)
    asked.communicate()
    if name in ENDLESS:
        served.kill()
        served.communicate()
    else:
        finish(served)


@pytest.mark.kernel
@pytest.mark.parametrize("bound", [True, False])
def test_groups(pair: Containers, bound: bool) -> None:
    """Who has joined a group by its address gets what others send to it; without an address of its
    own, too, though no route leads to the group.
    """
    if shutil.which("mckey") is None:
        pytest.skip("missing: mckey (make setup)")
    own = [["-b", address] if bound else [] for address in ADDRESSES]
    member = pair.start(0, "mckey", "-m", "239.0.0.7", *own[0])
    until = time.monotonic() + patience(20)
    while member.poll() is None and time.monotonic() < until:
        # It may not have joined yet.
        finish(pair.start(1, "mckey", "-m", "239.0.0.7", "-s", *own[1]))
    assert "data transfers complete" in finish(member)


@pytest.mark.kernel
def test_loopback(pair: Containers) -> None:
    """Who listens at an address of loopback is reached from its own container alone."""
    if shutil.which("rping") is None:
        pytest.skip("missing: rping (make setup)")
    served = pair.start(0, "rping", "-s", "-a", "127.0.0.1", "-C", "3")
    asks = ["rping", "-c", "-C", "3", "-a"]
    until = time.monotonic() + patience(20)
    assert pair.start(1, *asks, ADDRESSES[0]).wait(patience(30))
    while pair.start(0, *asks, "127.0.0.1").wait(patience(30)):
        assert time.monotonic() < until, "it has not listened"
    finish(served)
