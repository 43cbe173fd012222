"""The relay on real verbs: rings across two guests, and every way in which a link can fail."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from testbed.patience import within
from testbed.vm import Guest, Process
from tests.dataplane.places import ROOT, compile_c

GID = 1
"""The index of the GID with an IPv4 address, with rdma_rxe."""
KEYS = 24 + 16
"""The position of the keys in a place."""


class Host:
    """`tests.relay.host` in a guest."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        command = ["python3", "-m", "tests.relay.host", "/root/freeflow-relay", "/root/end"]
        env = {"PYTHONPATH": "/src", "PYTHONDONTWRITEBYTECODE": "1"}
        self.process: Process = guest.start(command, env=env, stdin=True)
        self.answers = 0

    def ask(self, what: str, *arguments: Any, timeout: float = 120) -> Any:
        """Run a command there and return its result."""
        self.tell(what, *arguments)
        return self.answer(timeout)

    def tell(self, what: str, *arguments: Any) -> None:
        line = json.dumps({"do": what, "with": arguments})
        self.process.write(line.encode() + b"\n")

    def answer(self, timeout: float = 120) -> Any:
        self.answers += 1
        self.process.wait_for(rf"(?:[^\n]*\n){{{self.answers}}}", timeout)
        said = json.loads(self.process.output.splitlines()[self.answers - 1])
        assert "failed" not in said, said["failed"]
        return said["is"]

    def well(self, what: str, *arguments: Any) -> Any:
        """Run a command whose answer has an error, a text, and more."""
        error, text, *more = self.ask(what, *arguments)
        assert not error, text
        return more


def link(a: Host, b: Host) -> None:
    """Connect the link's two ends, the first time or again."""
    (mine,) = a.well("link")
    (theirs,) = b.well("link")
    b.well("connect", mine)
    a.well("connect", theirs)


def connection(a: Host, b: Host) -> int:
    """Make a connection between new arenas; return the index of its ends."""
    index, number, place = a.well("place")
    other, peer, peers = b.well("place")
    assert index == other
    b.well("pair", other, number, place)
    a.well("pair", index, peer, peers)
    return int(index)


@pytest.fixture(scope="module")
def equipped(pair: list[Guest], tmp_path_factory: pytest.TempPathFactory) -> list[Guest]:
    """Guests with the programs that they run, built by this machine's compiler."""
    folder = tmp_path_factory.mktemp("relay")
    build = ROOT / "dataplane" / "relay" / "build.sh"
    subprocess.run([build, folder / "freeflow-relay"], check=True)
    compile_c(ROOT / "tests" / "relay" / "end.c", folder / "end")
    for guest in pair:
        for name in ("freeflow-relay", "end"):
            guest.push(folder / name, f"/root/{name}")
    return pair


@pytest.fixture
def hosts(equipped: list[Guest]) -> Iterator[tuple[Host, Host]]:
    """Two relays with a link between them."""
    made = [Host(guest) for guest in equipped]
    for host in made:
        host.well("open", "rxe0", GID)
    link(made[0], made[1])
    yield made[0], made[1]
    for host in made:
        host.process.kill()
        host.process.wait()
        assert "Sanitizer" not in host.process.errors


def stream(a: Host, b: Host, end: int, size: int, **options: int) -> None:
    """Start both directions of a connection."""
    more = [f"{name}={value}" for name, value in {"patience": 60_000, **options}.items()]
    a.ask("start", end, f"send={size}", "seed=1", "peer_seed=2", *more)
    b.ask("start", end, f"send={size // 2}", "seed=2", "peer_seed=1", *more)


def whole(a: Host, b: Host, end: int, size: int) -> None:
    """Wait until both ends have everything that the other one has sent."""
    a.tell("result", end)
    b.tell("result", end)
    assert a.answer(300)["received"] == size // 2
    assert b.answer(300)["received"] == size


def test_rings_are_mirrored_byte_for_byte(hosts: tuple[Host, Host]) -> None:
    """Bytes pass in both directions at once by RDMA WRITE, and the relay's processor copies
    nothing.
    """
    a, b = hosts
    end = connection(a, b)
    stream(a, b, end, 3_000_000)
    whole(a, b, end, 3_000_000)
    counts = a.ask("counts")
    assert counts["copied"] == 0
    assert counts["bytes_out"] == 3_000_000
    for host in hosts:
        host.ask("tell_end", "CLOSE", end)
    for host in hosts:
        assert host.ask("expect", "FINISHED")[3] == 0
        assert host.ask("expect", "ENDED")[3] == 0
        host.ask("tell_end", "DROP", end)
    for host in hosts:
        host.ask("expect", "DROPPED")
        assert host.ask("counts")["registered"] == 0
        assert host.ask("counts")["connections"] == 0


def test_links_of_a_device_are_many_but_not_without_end(hosts: tuple[Host, Host]) -> None:
    """The completion queue grows with the links, while traffic continues; at its limit the answer
    is a reason.
    """
    a, b = hosts
    end = connection(a, b)
    stream(a, b, end, 2_000_000, pace=20_000)
    number = 1
    while not (refused := a.ask("link", number + 1))[0]:
        number += 1
        assert number < 200
    assert number > 64
    assert "completion queue" in refused[1]
    whole(a, b, end, 2_000_000)


def test_a_cut_wire_is_noticed_and_nothing_is_lost(hosts: tuple[Host, Host]) -> None:
    """A broken link is down within a few seconds, and when it is made again the connection
    continues where it was.
    """
    a, b = hosts
    end = connection(a, b)
    stream(a, b, end, 4_000_000, pace=60_000)
    while not b.ask("word", end, 1, 0):
        pass
    a.guest.cut_underlay()
    begun = time.monotonic()
    number, error, text, _ = a.ask("expect", "DOWN")
    assert (number, bool(error), bool(text)) == (1, True, True)
    assert time.monotonic() - begun < within(30)
    a.guest.heal_underlay()
    link(a, b)
    assert b.ask("word", end, 1, 0) < 4_000_000
    whole(a, b, end, 4_000_000)
    assert a.ask("counts")["resumed"] >= 1


def test_a_card_without_carrier_is_noticed(hosts: tuple[Host, Host]) -> None:
    """A port without a carrier takes the link down before anything is sent."""
    a, b = hosts
    end = connection(a, b)
    a.guest.set_carrier(False)
    assert a.ask("expect", "DOWN")[2]
    a.guest.set_carrier(True)
    a.guest.sh("until rdma link show rxe0/1 | grep -q ACTIVE; do sleep 0.1; done", timeout=60)
    link(a, b)
    stream(a, b, end, 500_000)
    whole(a, b, end, 500_000)


def test_a_killed_relay_breaks_what_it_carried(hosts: tuple[Host, Host]) -> None:
    """When a relay is killed, the peer's link goes down at its next send, and its router can end
    the connection.
    """
    a, b = hosts
    end = connection(a, b)
    stream(a, b, end, 100_000_000, pace=10_000)
    time.sleep(1)
    b.ask("kill")
    assert a.ask("expect", "DOWN")[2]
    a.ask("tell_end", "DROP", end, 1)
    a.ask("expect", "DROPPED")
    assert a.ask("result", end)["broken"] == 1


def test_a_place_that_the_peer_may_not_write_costs_the_link(hosts: tuple[Host, Host]) -> None:
    """A write to a place that the peer may not write makes the queue pair fail; without that
    connection, a new queue pair carries the others on.
    """
    a, b = hosts
    good = connection(a, b)
    index, number, place = a.well("place")
    other, peer, peers = b.well("place")
    wrong = bytearray(base64.b64decode(peers))
    wrong[KEYS] ^= 0x55
    b.well("pair", other, number, place)
    a.well("pair", index, peer, base64.b64encode(wrong).decode())
    stream(a, b, good, 2_000_000, pace=60_000)
    stream(a, b, index, 100_000)
    assert a.ask("expect", "DOWN")[2]
    for host in hosts:
        host.ask("tell_end", "DROP", index, 1)
        host.ask("expect", "DROPPED")
    link(a, b)
    whole(a, b, good, 2_000_000)


def test_a_removed_device_is_noticed_and_let_go(hosts: tuple[Host, Host]) -> None:
    """`rdma link del` during a stream returns, because the relay releases the device; a new device
    works.
    """
    a, b = hosts
    end = connection(a, b)
    stream(a, b, end, 100_000_000, pace=20_000)
    removal = a.guest.start(["rdma", "link", "del", "rxe0"])
    try:
        assert a.ask("expect", "DOWN")[2]
        assert removal.wait(60) == 0
    finally:
        if removal.poll() is None:
            a.process.kill()
        removal.wait(60)
        a.guest.rxe_up()
    assert "a device that is gone" in a.ask("link")[1]
    a.ask("tell_end", "DROP", end, 1)
    a.ask("expect", "DROPPED")
    a.ask("tell", "UNLINK", 1)
    a.well("open", "rxe0", GID)
    link(a, b)
    b.ask("tell_end", "DROP", end, 1)
    b.ask("expect", "DROPPED")
    end = connection(a, b)
    stream(a, b, end, 100_000)
    whole(a, b, end, 100_000)
