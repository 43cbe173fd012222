"""Containers try to block the router, or to exhaust it: it continues to serve others."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.control import Limits, RouterSettings
from dataplane.router import library_wire as wire
from dataplane.router.clients import PATIENCE, UNKNOWN
from testbed.kernel_hosts import new_namespace
from testbed.namespace_bed import NamespaceBed, bed
from testbed.patience import patience
from tests.dataplane.library import Library, cookie_of, dial, listen
from tests.security.lingering import Lingering, lingering, refuses, send

NOTE = wire.pack(wire.Note(5, 1))


@pytest.fixture(params=[True, False], ids=["guarded", "unguarded"])
def attacked(request: pytest.FixtureRequest) -> Iterator[NamespaceBed]:
    """A bed whose router refuses descriptors by the kernel, and one as before Linux 6.16."""
    with bed("hostile", "honest", guard=request.param) as made:
        yield made


def hear_welcome(made: NamespaceBed, name: str = "honest") -> Library:
    library = Library.connect(made.shared / "router.sock", made.containers[name].namespace)
    library.connection.settimeout(patience(5))
    library.hear(wire.Welcome)
    return library


def raw(made: NamespaceBed) -> socket.socket:
    """A connection of the hostile container."""
    library = Library.connect(
        made.shared / "router.sock", made.containers["hostile"].namespace, hello=False
    )
    library.connection.setblocking(False)
    return library.connection


WAYS = ("alone", "behind messages", "behind an empty packet", "in a socket's queue", "many", "BELL")


def put(way: str, connection: socket.socket, poison: Lingering) -> bool:
    """Put the descriptor into the router's queue, so that the router would close it last.

    Return false if that is refused.
    """
    number = poison.closes.fileno()
    match way:
        case "alone":
            return send(connection, NOTE, number)
        case "behind messages":
            for _ in range(40):
                connection.send(wire.pack(wire.Release(0, 1, 1, 1)))
            return send(connection, NOTE, number)
        case "behind an empty packet":
            connection.send(b"")
            return send(connection, b"", number)
        case "in a socket's queue":
            one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with one, other:
                send(one, b"x", number)
                if send(connection, NOTE, other.fileno()):
                    return True
                # Remove it again.
                _, descriptors, _, _ = socket.recv_fds(other, 1, 1)
                os.close(descriptors[0])
                return False
        case "many":
            return send(connection, NOTE, *[number] * 200)
        case _:
            return send(connection, wire.pack(wire.Bell(0, 1, 1, 0)), number)


def test_descriptors_whose_close_waits(attacked: NamespaceBed) -> None:
    """A descriptor that lingers for minutes, however it is sent, does not block the router: it
    welcomes others at once.
    """
    hear_welcome(attacked).close()
    poisons: list[Lingering] = []
    try:
        for way, hello in itertools.product(WAYS, (False, True)):
            poison = lingering(attacked.containers["hostile"].namespace)
            poisons.append(poison)
            with raw(attacked) as connection:
                sent = False
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    if hello:
                        connection.send(wire.pack(wire.Hello(wire.PROTOCOL_VERSION, 2, "")))
                    sent = put(way, connection, poison)
                poison.let_go(sent=sent)
            hear_welcome(attacked).close()
        begin = time.monotonic()
        # The router checks everything within a second or two.
        while time.monotonic() - begin < 2.2:
            hear_welcome(attacked).close()
            time.sleep(0.1)
        assert attacked.router.statistics().learned
    finally:
        for poison in poisons:
            poison.close()


def test_no_descriptor_stays(attacked: NamespaceBed) -> None:
    """Whatever descriptors are sent, the router has as many of its own as before, and leaves no
    process behind.
    """
    process = attacked.process
    assert process is not None
    hear_welcome(attacked).close()
    folder = Path(f"/proc/{process.pid}/fd")
    before = len(list(folder.iterdir()))
    for _ in range(30):
        connection = raw(attacked)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send(connection, NOTE, *[0] * 3)
            connection.send(b"")
        connection.close()
    until = time.monotonic() + patience(5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(list(folder.iterdir())) > before or children.read_text():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert "a bug in the router" not in attacked.log()


def test_the_kernel_refuses_descriptors() -> None:
    """Where the kernel can refuse descriptors for the router, it does so from the first moment of a
    connection.
    """
    if not refuses():
        pytest.skip("missing: SO_PASSRIGHTS (Linux 6.16)")
    with bed("hostile") as made:
        for _ in range(20):
            assert not send(raw(made), NOTE, 0)


def test_an_old_library(attacked: NamespaceBed) -> None:
    """The router tells a process with an older library to stay on TCP, and refuses its requests.
    Others continue.
    """
    listener = listen(attacked.containers["honest"].namespace, "0.0.0.0")
    tcp = dial(attacked.containers["hostile"].namespace, str(attacked.containers["honest"].ipv4))
    server, _ = listener.accept()
    old = Library.connect(
        attacked.shared / "router.sock", attacked.containers["hostile"].namespace, hello=False
    )
    old.connection.settimeout(patience(3))
    old.say(wire.Hello(1, 2, "0123abcd"))
    welcome, _ = old.hear(wire.Welcome)
    assert (welcome.version, welcome.enabled) == (wire.PROTOCOL_VERSION, False)
    old.ask(tcp)
    old.hear(wire.Refuse)
    hear_welcome(attacked)
    server.close()


# --- what one can use up


def test_unauthenticated_peers_are_few() -> None:
    """Processes in namespaces of no container have few connections together, however many
    namespaces exist.
    """
    with bed("honest") as made:
        path = made.shared / "router.sock"
        namespaces = [new_namespace() for _ in range(4)]
        assert made.process is not None
        folder = Path(f"/proc/{made.process.pid}/fd")
        before = len(list(folder.iterdir()))
        kept = []
        try:
            for _ in range(UNKNOWN):
                for namespace in namespaces:
                    with contextlib.suppress(OSError):
                        kept.append(Library.connect(path, namespace))
            hear_welcome(made)
            assert made.router.statistics().processes <= UNKNOWN + 1
            assert len(list(folder.iterdir())) < before + UNKNOWN + 20
            # A container that connects now gets a place, once the time of the others has passed.
            time.sleep(PATIENCE + 0.2)
            late = Library.connect(path, namespaces[0])
            late.connection.settimeout(patience(5))
            assert not late.hear(wire.Welcome)[0].enabled
        finally:
            for opened in kept:
                opened.close()
            for namespace in namespaces:
                os.close(namespace)


def test_an_unauthenticated_peer_becomes_known() -> None:
    """A process that connected before its container was known counts for the container from then
    on.
    """
    with bed("one", "two") as made:
        known = made.facts()
        made.learn(endpoints=known.endpoints[:1])
        process = Library.connect(made.shared / "router.sock", made.containers["two"].namespace)
        made.learn()
        process.connection.settimeout(patience(3))
        assert process.hear(wire.Welcome)[0].enabled
        for _ in range(100):
            process.say(wire.Fetch(0, 1, 1, 0))
            process.hear(wire.Ring)


def kernel_memory(process: subprocess.Popen[bytes]) -> int:
    """The bytes of answers in the sockets of a process, as the kernel reports them."""
    said = subprocess.run(
        ["ss", "-xpm", "state", "connected"], capture_output=True, text=True, check=True
    ).stdout
    queued = 0
    for line in said.splitlines():
        if f"pid={process.pid}," in line:
            queued += int(line.partition(",t")[2].partition(",")[0])
    return queued


def test_answers_that_nobody_reads() -> None:
    """Processes that send requests and read no answers cost the router's host little memory, and
    lose their connection after a while.
    """
    with bed("hostile", "honest") as made:
        assert made.process is not None
        path, namespace = made.shared / "router.sock", made.containers["hostile"].namespace
        fetch = wire.pack(wire.Fetch(0, 1, 1, 0))
        many = [Library.connect(path, namespace) for _ in range(60)]
        for process in many:
            process.connection.setblocking(False)
        begin = time.monotonic()
        while time.monotonic() - begin < 3:
            for process in many:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(20):
                        process.connection.send(fetch)
        assert kernel_memory(made.process) < len(many) * (160 << 10)
        hear_welcome(made).close()
        until = time.monotonic() + patience(25)
        while made.router.statistics().processes:
            assert time.monotonic() < until
            time.sleep(0.2)
        assert made.router.statistics().dropped >= len(many)


def test_who_reads_again_is_heard_again() -> None:
    """A process that was busy gets all its answers when it reads."""
    with bed("a") as made:
        process = Library.connect(made.shared / "router.sock", made.containers["a"].namespace)
        process.connection.settimeout(patience(5))
        process.hear(wire.Welcome)
        process.connection.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 400:
                process.say(wire.Fetch(sent % 256, 1, 1, 0))
                sent += 1
        time.sleep(1)
        process.connection.settimeout(patience(5))
        for number in range(sent):
            assert process.hear(wire.Ring)[0].index == number % 256


def test_asks_that_repeat_themselves() -> None:
    """Endless requests for the same connection do not make the router's memory grow."""
    limits = RouterSettings(limits=Limits(asks=1 << 19, messages=1 << 20))
    with bed("hostile", "other", settings=limits) as made:
        assert made.process is not None
        listener = listen(made.containers["other"].namespace, "0.0.0.0")
        tcp = dial(made.containers["hostile"].namespace, str(made.containers["other"].ipv4))
        server, _ = listener.accept()
        process = Library.connect(made.shared / "router.sock", made.containers["hostile"].namespace)
        process.hear(wire.Welcome)
        process.ask(tcp, cookie=cookie_of(tcp))
        before = resident(made.process)
        for _ in range(30_000):
            process.ask(tcp)
        assert made.router.statistics().waiting == 1
        assert resident(made.process) < before + (4 << 20)
        server.close()


def resident(process: subprocess.Popen[bytes]) -> int:
    """The memory of a process in bytes."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def test_a_host_without_descriptors() -> None:
    """When descriptors are few, the container with the most processes gets no more, and others are
    still served.
    """
    with bed("hostile", "honest") as made:
        assert made.process is not None
        most = f"--nofile={len(list(Path(f'/proc/{made.process.pid}/fd').iterdir())) + 100}"
        # It may not raise its own limit, as in the plugin.
        limited = ["prlimit", most, "setpriv", "--bounding-set=-sys_resource"]
        made.kill_router()
        command = made.router_command()
        made.router_command = lambda: [*limited, *command]  # type: ignore[method-assign]
        made.start_router()
        path = made.shared / "router.sock"
        namespace = made.containers["hostile"].namespace
        kept = []
        for _ in range(300):
            with contextlib.suppress(OSError):
                kept.append(Library.connect(path, namespace))
        assert made.router.statistics().processes < 110
        hear_welcome(made)
        hear_welcome(made)
        for opened in kept:
            opened.close()
