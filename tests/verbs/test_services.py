"""What the library does for libibverbs, and says to it: see `services.c`."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import pytest

from dataplane.router import verbs_wire
from dataplane.router.reasons import Reason
from testbed.patience import patience
from tests.dataplane.places import LIBRARY, compile_c
from tests.verbs.hand_router import HandRouter, device, hand_router

SOURCE: Final = Path(__file__).with_name("services.c")
MESSAGES: Final = int(os.environ.get("SERVICES_MESSAGES", "3000"))
SEED: Final = str(int.from_bytes(os.urandom(4), "big"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program."""
    if shutil.which("gcc") is None:
        pytest.skip("missing: gcc")
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    return compile_c(SOURCE, tmp_path_factory.mktemp("services") / "services", "-ldl")


@pytest.fixture
def router(tmp_path: Path) -> Iterator[HandRouter]:
    with hand_router(tmp_path / "router.sock") as made:
        yield made


class Running:
    """The program, in step with the test."""

    def __init__(self, program: Path, folder: Path, *arguments: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [program, *map(str, arguments)],
            env={
                "LD_PRELOAD": str(LIBRARY),
                "FREEFLOW_ROUTER": str(folder / "router.sock"),
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def hear(self, what: str) -> None:
        """Wait until it says this."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line != what + "\n":
            self.process.kill()
            raise AssertionError((line, SEED, self.process.communicate()))

    def say(self) -> None:
        """Have it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def finish(self) -> None:
        """Wait until it has ended well."""
        try:
            _, said = self.process.communicate(timeout=patience(60))
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert not said, SEED
        assert not self.process.returncode, SEED


def test_two_processes(program: Path, router: HandRouter, tmp_path: Path) -> None:
    """Queue pairs of two processes get the same slots, all that is sent arrives, each wake-up comes
    and only for the slots that it is for, and no slot or memory is left.
    """
    queues = 3
    both = []
    for peer in (2, 1):
        both.append(Running(program, tmp_path, "talk", peer, MESSAGES, queues, SEED))
        both[-1].hear("open")
    for each in both:
        each.say()
    for each in both:
        each.finish()
    router.await_releases(2 * queues)
    assert len(router.arenas) == 1
    assert sorted(router.releases) == [
        (router.arenas[0].number, side, slot) for side in range(2) for slot in range(queues)
    ]
    assert router.used() < 64 << 10


def test_one_process(program: Path, router: HandRouter, tmp_path: Path) -> None:
    """Queue pairs of one process are paired like those of two."""
    alone = Running(program, tmp_path, "alone", MESSAGES, 4, SEED)
    alone.hear("open")
    alone.say()
    alone.finish()
    router.await_releases(4)


def test_more_than_an_arena(program: Path, router: HandRouter, tmp_path: Path) -> None:
    """Slots are used again, and arenas go and come, without a queue pair in the way of others."""
    for _ in range(3):
        alone = Running(program, tmp_path, "alone", 10, 16, SEED)
        alone.hear("open")
        alone.say()
        alone.finish()
    router.await_releases(48)


def test_a_wrong_grant(program: Path, router: HandRouter, tmp_path: Path) -> None:
    """A slot that is another one than the router says is not used. The client is told why, and
    gives it back by what the router has said.
    """
    router.spoil = True
    Running(program, tmp_path, "declined").finish()
    router.await_releases(2)


def test_lost_router(program: Path, router: HandRouter, tmp_path: Path) -> None:
    """Without the router what is paired goes on; messages for the lost one are not sent, and the
    next one is found.
    """
    running = Running(program, tmp_path, "restarted")
    running.hear("paired")
    router.hang_up()
    running.say()
    running.finish()


def test_many_messages(program: Path, router: HandRouter, tmp_path: Path) -> None:
    """A client that is late loses no message, and of its device it gets only the last word."""
    running, many = Running(program, tmp_path, "queue", 150), 150
    running.hear("open")
    client = router.clients[0]
    for guid in range(1, 6):
        router.say(client, device(IPv4Address(guid)))
    for number in range(many):
        router.say(client, verbs_wire.VerbsRefuse(34, 1, number, Reason.LIMIT))
    running.say()
    running.finish()


def test_descriptors(program: Path, tmp_path: Path) -> None:
    """Writing, closing and duplicating a claimed descriptor are the client's matter, until it is
    closed; the library's own descriptors are spared by close().
    """
    Running(program, tmp_path, "descriptors").finish()


def test_children(program: Path, router: HandRouter, tmp_path: Path) -> None:
    """A child of fork, or of a bare clone(), starts anew and can't take from its parent; a child of
    vfork is nobody.
    """
    running = Running(program, tmp_path, "children")
    running.hear("none released")
    assert not router.releases
    running.say()
    running.finish()
    router.await_releases(2)


def test_a_killed_child(program: Path, router: HandRouter, tmp_path: Path) -> None:
    """What a killed process had for its queue pairs can be used by its family."""
    Running(program, tmp_path, "killed").finish()
    router.await_releases(2)


def test_bypassed(program: Path, router: HandRouter, tmp_path: Path) -> None:
    """In a process whose connections may bypass the library verbs go on, and no connection is
    accelerated any more, even if the router says so.
    """
    rule = {f"FREEFLOW_UPGRADE_{name}": "1" for name in ("OPERATIONS", "AGE", "BYTES")}
    running = Running(program, tmp_path, "bypassed", FREEFLOW_LOOPBACK="1", **rule)
    running.hear("bypassed")
    router.welcome(router.clients[0])
    running.say()
    running.finish()


def test_confined(program: Path, router: HandRouter, tmp_path: Path) -> None:
    """Before a process confines itself the client is told, and afterwards nothing works."""
    Running(program, tmp_path, "confined").finish()


def test_no_device(program: Path, tmp_path: Path) -> None:
    """Each reason for which there is no device has its error, and none takes longer than asked."""
    Running(program, tmp_path, "absent", errno.ENOTCONN).finish()
    with hand_router(tmp_path / "router.sock", verbs=False):
        Running(program, tmp_path, "absent", errno.EPROTONOSUPPORT).finish()
        Running(program, tmp_path, "absent", errno.ENODEV, FREEFLOW="off").finish()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(tmp_path / "router.sock"))
        silent.listen()
        Running(program, tmp_path, "absent", errno.EAGAIN).finish()
