"""Rules that a container with NET_ADMIN puts into its own nf_tables do nothing to the plugin.

The plugin's part runs in its own process here, as it does on a host: if reading the rules could end
it, only that process would end.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from driver.kernel.namespace import in_netns
from driver.vip import NftBalancer
from testbed.kernel_hosts import new_namespace
from testbed.patience import patience
from tests.kernel.vip_hosts import VIP, world

PLUGIN = """
import sys
from ipaddress import IPv4Address
from pathlib import Path
from driver.kernel.forwarding_check import may_forward
from driver.vip import NftBalancer
path = Path(f"/proc/self/fd/{sys.argv[1]}")
balancer, vip = NftBalancer(iter(range(100))), IPv4Address("10.0.0.2")
print(may_forward(int(sys.argv[1])))
for tasks in ((3,), (3, 4), (4,), ()):
    assert balancer.apply(path, {vip: tuple(IPv4Address(f"10.0.0.{n}") for n in tasks)})
assert balancer.apply(path, {})
# Not getrusage(): that starts with the memory of the process that has forked this one.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(may_forward(int(sys.argv[1])), status["VmHWM"].split()[0])
"""

CREATE, APPEND = 0x400, 0x800
TABLE, CHAIN, RULE, SET, ELEMENTS = 0, 3, 6, 9, 12


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def nest(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | 0x8000, b"".join(parts))


def number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("!I", value & 0xFFFFFFFF))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def expression(name: str, *parts: bytes) -> bytes:
    return nest(1, text(1, name), nest(2, *parts))


def element(key: bytes) -> bytes:
    return nest(1, nest(1, attribute(1, key)))


class Attacker:
    """Writes into the nf_tables of a namespace what no tool writes.

    The kernel has accepted `taken` of the messages.
    """

    def __init__(self, namespace: int, family: int = 10) -> None:
        def make() -> socket.socket:
            return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)

        self.socket = in_netns(namespace, make)
        self.socket.setsockopt(socket.SOL_SOCKET, 32, 1 << 24)  # SO_SNDBUFFORCE
        self.socket.setblocking(False)
        self.family = family
        self.taken = 0

    def _message(self, kind: int, flags: int, body: bytes) -> bytes:
        control = kind in (16, 17)
        head = struct.pack("!BBH", 0 if control else self.family, 0, 10 if control else 0)
        length = 16 + len(head) + len(body)
        kind = kind if control else kind | 10 << 8
        return struct.pack("=IHHII", length, kind, flags | 1, 1, 0) + head + body

    def batch(self, *messages: tuple[int, bytes]) -> bool:
        """Whether the kernel accepted all messages."""
        middle = [
            self._message(kind, CREATE | (APPEND if kind == RULE else 0), body)
            for kind, body in messages
        ]
        self.socket.send(b"".join([self._message(16, 0, b""), *middle, self._message(17, 0, b"")]))
        good = True
        try:
            while True:
                answer = self.socket.recv(1 << 16)
                good &= struct.unpack_from("=i", answer, 16)[0] == 0
        except BlockingIOError:
            self.taken += good
            return good

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def namespace() -> Iterator[int]:
    made = new_namespace()
    os.set_inheritable(made, True)
    yield made
    os.close(made)


@pytest.fixture
def attacker(namespace: int) -> Iterator[Attacker]:
    made = Attacker(namespace)
    made.batch((TABLE, text(1, "t")))
    made.batch((CHAIN, text(1, "t") + text(3, "c")))
    yield made
    made.close()


def plugin(namespace: int) -> list[str]:
    """Let the plugin read the container; its result and its memory in KiB. It must survive."""
    ended = subprocess.run(
        [sys.executable, "-c", PLUGIN, str(namespace)],
        pass_fds=[namespace],
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


def test_a_set_that_ends_libnftables(namespace: int, attacker: Attacker) -> None:
    """A set with keys of two types in four bytes, one of them unknown, ends libnftables and not the
    plugin.
    """
    table = text(1, "t")
    name = text(2, "__set%d")
    load = expression("payload", number(1, 1), number(2, 2), number(3, 0), number(4, 4))
    find = expression("lookup", text(1, "__set%d"), number(2, 1), number(4, 7))
    assert attacker.batch(
        (SET, table + name + number(3, 3) + number(4, 280) + number(5, 4) + number(10, 7)),
        (ELEMENTS, table + name + number(4, 7) + nest(3, element(b"abcd"), element(b"wxyz"))),
        (RULE, table + text(2, "c") + nest(4, load, find)),
    )
    assert plugin(namespace)[:2] == ["False", "False"]


def _random_set(dice: random.Random, name: str) -> list[tuple[int, bytes]]:
    size = dice.choice((1, 2, 4, 4, 6, 8, 12, 16))
    flags = dice.choice((0, 1, 4, 8, 2, 0x80))
    kind = dice.choice((0, 1, 7, 8, 13, 45, dice.getrandbits(10), dice.getrandbits(20)))
    body = text(1, "t") + text(2, name) + number(3, flags) + number(4, kind) + number(5, size)
    body += number(10, dice.getrandbits(16))
    if flags & 8:
        body += number(6, dice.choice((0xFFFFFF00, 0, 7))) + number(7, dice.choice((4, size)))
    if dice.random() < 0.5:
        body += attribute(13, dice.randbytes(dice.choice((2, 6, 30, 200))))
    elements = nest(3, *(element(dice.randbytes(size)) for _ in range(3)))
    return [(SET, body), (ELEMENTS, text(1, "t") + text(2, name) + elements)]


def _random_expression(dice: random.Random) -> bytes:
    register = number(1, dice.choice((1, 2, 8, 9, 12)))
    size = dice.choice((1, 2, 3, 4, 6, 8, 16))
    value = nest(3, attribute(1, dice.randbytes(size)))
    kinds: list[Callable[[], bytes]] = [
        lambda: expression(
            "payload",
            register,
            number(2, dice.randrange(4)),
            number(3, dice.randrange(64)),
            number(4, size),
        ),
        lambda: expression("cmp", register, number(2, dice.randrange(6)), value),
        lambda: expression("meta", register, number(2, dice.randrange(40))),
        lambda: expression("immediate", register, nest(2, attribute(1, dice.randbytes(size)))),
        lambda: expression("lookup", text(1, f"s{dice.randrange(4)}"), number(2, 1)),
        lambda: expression(
            "exthdr",
            register,
            attribute(2, dice.randbytes(1)),
            number(3, dice.randrange(64)),
            number(4, size),
            number(6, dice.randrange(4)),
        ),
    ]
    return dice.choice(kinds)()


@pytest.mark.parametrize("seed", range(3))
def test_random_rules(namespace: int, attacker: Attacker, seed: int) -> None:
    """Random sets and rules, many of which the kernel accepts, do nothing to the plugin, and VIPs
    work beside them.
    """
    dice = random.Random(seed)
    attacker.batch(
        (
            CHAIN,
            text(1, "t") + text(3, "n") + nest(4, number(1, 0), number(2, 0)) + text(7, "nat"),
        )
    )
    for count in range(4):
        for part in _random_set(dice, f"s{count}"):
            attacker.batch(part)
    for _ in range(300):
        chain = dice.choice(("c", "n"))
        rule = nest(4, *(_random_expression(dice) for _ in range(dice.randrange(1, 5))))
        attacker.batch((RULE, text(1, "t") + text(2, chain) + rule))
    assert attacker.taken > 20
    assert plugin(namespace)[:2] == ["True", "True"]


def test_huge_set(namespace: int, attacker: Attacker) -> None:
    """The plugin does not read a set of three hundred thousand elements, so the set costs it no
    memory.
    """
    table, name = text(1, "t"), text(2, "big")
    assert attacker.batch((SET, table + name + number(4, 7) + number(5, 4) + number(10, 9)))
    for start in range(0, 300_000, 2000):
        keys = (struct.pack("!I", start + n) for n in range(2000))
        assert attacker.batch((ELEMENTS, table + name + nest(3, *map(element, keys))))
    before, after, memory = plugin(namespace)
    assert (before, after) == ("False", "False")
    assert int(memory) < 150_000


def test_many_flows() -> None:
    """For a container with tens of thousands of flows to a VIP, a change of the VIP's tasks costs
    the plugin little.
    """
    with world(2) as made:
        balancer = NftBalancer()
        assert balancer.apply(made.client.path, {VIP: made.addresses[:1]})

        def flood() -> None:
            for _ in range(20_000):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    sender.sendto(b"?", (str(VIP), 9))

        in_netns(made.client.path, flood)
        begin = time.process_time()
        assert balancer.apply(made.client.path, {VIP: made.addresses[1:]})
        assert time.process_time() - begin < 4
