"""Our libibverbs asks libfreeflow.so, and through it the router, for its device: see `client.c`."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import pytest

from dataplane.router import library_wire as wire
from dataplane.router import verbs_wire
from testbed.patience import patience
from tests.dataplane.places import LIBRARY, compile_c
from tests.verbs.conftest import HEADER
from tests.verbs.hand_router import welcome_message
from tests.verbs.router import OWN
from tests.verbs.router import router as real_router

SOURCE = Path(__file__).with_name("client.c")
PORT_ACTIVE, PORT_ERR, GID_CHANGE, NO_EVENT = "9", "10", "18", "-1"
"""IBV_EVENT_PORT_ACTIVE and so on."""
FIRST: Final = 0x5000
PLACES: Final = 128
"""GIDs that the table has room for."""
OTHER_VERSION = r"""
#include "../../dataplane/library/services.h"

static bool no(void)
{
        return false;
}

/* The services of a libfreeflow.so of another build. */
__attribute__((visibility("default"))) const struct freeflow_services freeflow_services = {
    .magic = SERVICES_MAGIC,
    .version = SERVICES_VERSION + (DIFFERENCE),
    .size = sizeof freeflow_services,
    .is_here = no,
};
"""


def device(index: int, count: int, last: int | None) -> verbs_wire.VerbsDevice:
    """What a router says of a GID."""
    return verbs_wire.VerbsDevice(
        index=index,
        count=count,
        qpn_first=FIRST,
        qpn_count=4096,
        queue_pairs=64,
        regions=64,
        direct=False,
        guid=0x1234,
        direct_bytes=0,
        gid=None if last is None else IPv4Address(f"10.0.0.{last}"),
    )


def devices(*lasts: int | None) -> list[verbs_wire.VerbsDevice]:
    """What a router says of all places of the table."""
    return [device(index, len(lasts), last) for index, last in enumerate(lasts)]


class DeviceRouter:
    """A router that describes devices and does nothing else; it is silent if `says` is None."""

    def __init__(
        self,
        path: Path,
        says: Sequence[verbs_wire.VerbsDevice] | None,
        verbs: int = verbs_wire.VERBS_VERSION,
    ) -> None:
        self.says = says
        self.opens: list[verbs_wire.VerbsOpen] = []
        """All that were received."""
        self._verbs = verbs
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(8)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End it and its sockets."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        """End the sockets."""
        while self._sockets:
            connection = self._sockets.pop()
            with contextlib.suppress(OSError):  # the process has ended
                connection.shutdown(socket.SHUT_RDWR)

    def say(self, *messages: verbs_wire.VerbsDevice) -> None:
        """Tell the process that came last."""
        for message in messages:
            self._sockets[-1].send(verbs_wire.pack(message))

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            self._sockets.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1024):
                if self.says is None:
                    continue
                if int.from_bytes(data[:2], "little") < verbs_wire.VerbsKind.OPEN:
                    connection.send(wire.pack(welcome_message(self._verbs)))
                    continue
                message = verbs_wire.unpack(data)
                assert isinstance(message, verbs_wire.VerbsOpen)
                self.opens.append(message)
                for said in self.says:
                    connection.send(verbs_wire.pack(said))


class Program:
    """A process of `client.c`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, command: str) -> str:
        """The answer to a command, without its spaces at the end."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "it has ended"
        return answer.rstrip()

    def await_answer(self, command: str, wanted: str) -> None:
        """Ask for the devices and then this, again and again, until this is the answer."""
        until = time.monotonic() + patience(5)
        while True:
            self.ask("list")
            if (answer := self.ask(command)) == wanted:
                return
            assert time.monotonic() < until, answer
            time.sleep(0.01)


@pytest.fixture(scope="session")
def binary(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    folder = tmp_path_factory.mktemp("client")
    return compile_c(SOURCE, folder / "client", "-Wl,--no-as-needed", str(library))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The router's socket."""
    return tmp_path / "router.sock"


@contextmanager
def routing(
    path: Path,
    says: Sequence[verbs_wire.VerbsDevice] | None,
    verbs: int = verbs_wire.VERBS_VERSION,
) -> Iterator[DeviceRouter]:
    router = DeviceRouter(path, says, verbs)
    try:
        yield router
    finally:
        router.close()
        path.unlink()


@contextmanager
def running(
    binary: Path, library: Path, path: Path, *before: Path, **more: str
) -> Iterator[Program]:
    """The program, with what is preloaded; `before`: instead of libfreeflow.so."""
    environment = {
        "LD_PRELOAD": ":".join(map(str, [*(before or [LIBRARY]), library])),
        "FREEFLOW_ROUTER": str(path),
        **more,
    }
    process = subprocess.Popen(
        [binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield Program(process)
        process.communicate(timeout=patience(10))
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_device(binary: Path, library: Path, path: Path) -> None:
    """The device has the GIDs that the router has said, each in its place, and the program hears
    of those that change.
    """
    with routing(path, devices(1, None, 3)) as router, running(binary, library, path) as program:
        assert program.ask("list") == "freeflow0"
        assert program.ask("open") == "0"
        assert program.ask("gids") == "0=1 2=3"
        assert program.ask("event") == NO_EVENT
        router.say(*devices(1, 2, None, 4))
        program.await_answer("gids", "0=1 1=2 3=4")
        assert program.ask("event") == GID_CHANGE
        assert program.ask("event") == NO_EVENT
        router.say(*devices(1, 2, None, 4))
        assert program.ask("list") == "freeflow0"
        assert program.ask("event") == NO_EVENT
        router.say(device(0, 0, None))
        program.await_answer("list", "")
        assert program.ask("gids") == ""
        events = [program.ask("event") for _ in range(3)]
        assert events == [GID_CHANGE, PORT_ERR, NO_EVENT]
        router.say(*devices(1))
        program.await_answer("list", "freeflow0")
        router.say(device(0, 0, None))
        program.await_answer("list", "")
        router.say(*devices(1))
        program.await_answer("list", "freeflow0")
        events = [program.ask("event") for _ in range(3)]
        assert events == [GID_CHANGE, PORT_ACTIVE, NO_EVENT]
        assert [(said.version, said.qpn_first) for said in router.opens] == [(1, 0)]


def test_waits_for_all_gids(binary: Path, library: Path, path: Path) -> None:
    """A program sees no device before the router has described all of it."""
    with routing(path, devices(1, 2, 3)[:2]) as router, running(binary, library, path) as program:
        threading.Timer(0.3, lambda: router.say(devices(1, 2, 3)[2])).start()
        assert program.ask("open") == "0"
        assert program.ask("gids") == "0=1 1=2 2=3"


def test_more_gids_than_places(binary: Path, library: Path, path: Path) -> None:
    """GIDs for which the table has no place are left out."""
    lasts = [index % 250 + 1 for index in range(PLACES + 5)]
    with routing(path, devices(*lasts)), running(binary, library, path) as program:
        assert program.ask("open") == "0"
        expected = [f"{index}={last}" for index, last in enumerate(lasts[:PLACES])]
        assert program.ask("gids").split() == expected


def test_no_router(binary: Path, library: Path, path: Path) -> None:
    """There is no device without a router, nor without libfreeflow.so, and nobody waits for it.
    Once there is a router, there is a device.
    """
    before = time.monotonic()
    with running(binary, library, path, library.with_name("libibverbs.so")) as program:
        assert program.ask("list") == ""
    with running(binary, library, path) as program:
        assert program.ask("list") == ""
        assert program.ask("open") == "19"
        assert time.monotonic() - before < patience(1.5)
        with routing(path, devices(1)):
            program.await_answer("list", "freeflow0")


def test_router_without_verbs(binary: Path, library: Path, path: Path) -> None:
    """There is no device if the router knows nothing of verbs, or of others."""
    for verbs in (0, verbs_wire.VERBS_VERSION + 1):
        with (
            routing(path, devices(1), verbs) as router,
            running(binary, library, path) as program,
        ):
            assert program.ask("list") == ""
            assert not router.opens


@pytest.mark.parametrize("says", [None, ()])
def test_silent_router(
    binary: Path, library: Path, path: Path, says: Sequence[verbs_wire.VerbsDevice] | None
) -> None:
    """A program waits two seconds for a router that doesn't answer, and not for ever."""
    with routing(path, says), running(binary, library, path) as program:
        before = time.monotonic()
        assert program.ask("list") == ""
        assert 1.9 < time.monotonic() - before < 2 + patience(2)


def test_router_comes_back(binary: Path, library: Path, path: Path) -> None:
    """A later router is asked for the numbers that an earlier one gave. What it doesn't have any
    more is gone.
    """
    with routing(path, devices(1, 2)) as router, running(binary, library, path) as program:
        assert program.ask("open") == "0"
        router.says = devices(1)
        router.hang_up()
        program.await_answer("gids", "0=1")
        assert program.ask("event") == GID_CHANGE
        assert [said.qpn_first for said in router.opens] == [0, FIRST]


def test_router_knows_later(binary: Path, library: Path, path: Path) -> None:
    """A router that has just started and doesn't know of the container yet takes no device away."""
    with routing(path, devices(1, 2)) as router, running(binary, library, path) as program:
        assert program.ask("open") == "0"
        router.says = [device(0, 0, None)]
        router.hang_up()
        until = time.monotonic() + patience(5)
        while len(router.opens) < 2:
            assert time.monotonic() < until
            assert program.ask("list") == "freeflow0"
        assert program.ask("list") == "freeflow0"
        assert program.ask("gids") == "0=1 1=2"
        router.say(*devices(1))
        program.await_answer("gids", "0=1")
        router.say(device(0, 0, None))
        program.await_answer("list", "")


def test_router_is_away(binary: Path, library: Path, path: Path) -> None:
    """A program that has a device keeps it while there is no router."""
    with running(binary, library, path) as program:
        with routing(path, devices(1)):
            assert program.ask("open") == "0"
        assert program.ask("list") == "freeflow0"
        assert program.ask("gids") == "0=1"


def test_fork(binary: Path, library: Path, path: Path) -> None:
    """A child of fork can't use what its parent has opened, and opens the device itself."""
    with routing(path, devices(1)) as router, running(binary, library, path) as program:
        assert program.ask("open") == "0"
        assert program.ask("fork") == "0"
        assert program.ask("gids") == "Input/output error"
        assert program.ask("event") == NO_EVENT
        assert program.ask("open") == "0"
        assert program.ask("gids") == "0=1"
        assert [said.qpn_first for said in router.opens] == [0, 0]


def test_fork_before(binary: Path, library: Path, path: Path) -> None:
    """A child whose parent has not asked for devices has its own."""
    with routing(path, devices(1)), running(binary, library, path) as program:
        assert program.ask("fork") == "0"
        assert program.ask("open") == "0"
        assert program.ask("gids") == "0=1"


def test_confined(binary: Path, library: Path, path: Path) -> None:
    """A process that confines itself to certain system calls has no device any more."""
    with routing(path, devices(1)), running(binary, library, path) as program:
        assert program.ask("open") == "0"
        assert program.ask("confine") == "0"
        assert program.ask("list") == ""
        assert program.ask("gids") == "Input/output error"


def test_library_is_off(binary: Path, library: Path, path: Path) -> None:
    """There is no device in a process that is not to use the library."""
    with (
        routing(path, devices(1)),
        running(binary, library, path, FREEFLOW="off") as program,
    ):
        assert program.ask("list") == ""


@pytest.mark.parametrize("difference", [-1, 1])
def test_library_of_another_build(
    binary: Path, library: Path, path: Path, tmp_path: Path, difference: int
) -> None:
    """There is no device with a libfreeflow.so whose services are others, older or newer ones."""
    source = tmp_path / "other.c"
    source.write_text(OTHER_VERSION.replace("../..", str(SOURCE.parents[2])))
    options = ("-shared", "-fPIC", f"-DDIFFERENCE={difference}")
    other = compile_c(source, tmp_path / "other.so", *options)
    with routing(path, devices(1)), running(binary, library, path, other) as program:
        assert program.ask("list") == ""


def test_real_router(binary: Path, library: Path, tmp_path: Path) -> None:
    """The device follows the container's addresses, also over a restart of the router."""
    with (
        real_router(tmp_path) as router,
        running(binary, library, router.socket) as program,
    ):
        assert program.ask("open") == "0"
        assert program.ask("gids") == "0=1 1=1"
        router.learn({OWN: ("10.0.4.7", "fd00::1")})
        program.await_answer("gids", "0=7 1=1")
        assert program.ask("event") == GID_CHANGE
        router.restart()
        program.await_answer("list", "freeflow0")
        router.learn({OWN: ("fd00::1", "10.0.4.9")})
        program.await_answer("gids", "0=9 1=1")
        assert program.ask("event") == GID_CHANGE
        router.learn({})
        program.await_answer("list", "")


def test_ibv_devinfo(library: Path, path: Path) -> None:
    """Debian's own program describes the device."""
    found = shutil.which("ibv_devinfo")
    if found is None or not HEADER.exists() or not LIBRARY.exists():
        pytest.skip("missing: ibv_devinfo (make setup), libfreeflow.so (make library)")
    environment = {"LD_PRELOAD": f"{LIBRARY}:{library}", "FREEFLOW_ROUTER": str(path)}
    with routing(path, devices(7)):
        done = subprocess.run(
            [found, "-v"], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    lines = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert {
        "hca_id: freeflow0",
        "node_guid: 0000:0000:0000:1234",
        "state: PORT_ACTIVE (4)",
        "link_layer: Ethernet",
        "active_mtu: 4096 (5)",
        "phys_state: LINK_UP (5)",
        "GID[ 0]: ::ffff:10.0.0.7, RoCE v2",
    } <= lines, done.stdout
