"""A hostile container affects neither the plugin nor other containers of its host."""

from __future__ import annotations

import time
from collections import Counter

from testbed import Bed, Host, wait_until
from testbed.images import WORKLOAD_IMAGE
from testbed.patience import patience
from tests.swarm.conftest import NGINX, make_network, make_service, run_container

NETLINK = r"""
import socket, struct
def nla(kind, data): return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)
def nest(kind, *parts): return nla(kind | 0x8000, b"".join(parts))
def number(kind, value): return nla(kind, struct.pack("!I", value))
def text(kind, value): return nla(kind, value.encode() + b"\0")
def expression(name, *parts): return nest(1, text(1, name), nest(2, *parts))
def message(kind, flags, body, family):
    control = kind in (16, 17)
    head = struct.pack("!BBH", 0 if control else family, 0, 10 if control else 0)
    kind = kind if control else kind | 10 << 8
    return struct.pack("=IHHII", 20 + len(body), kind, flags | 1, 1, 0) + head + body
def batch(*messages):
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    channel.setblocking(False)
    channel.send(message(16, 0, b"", 0) + b"".join(messages) + message(17, 0, b"", 0))
    try:
        while True:
            error = struct.unpack_from("=i", channel.recv(65536), 16)[0]
            assert not error, error
    except BlockingIOError:
        pass
"""

DEADLY = (
    NETLINK
    + r"""
element = lambda key: nest(1, nest(1, nla(1, key)))
table, name = text(1, "t"), text(2, "__set%d")
load = expression("payload", number(1, 1), number(2, 2), number(3, 0), number(4, 4))
find = expression("lookup", text(1, "__set%d"), number(2, 1), number(4, 7))
batch(
    message(0, 0x400, table, 10),
    message(3, 0x400, table + text(3, "c"), 10),
    message(9, 0x400, table + name + number(3, 3) + number(4, 280) + number(5, 4) + number(10, 7), 10),
    message(12, 0x400, table + name + number(4, 7) + nest(3, element(b"abcd"), element(b"wxyz")), 10),
    message(6, 0xC00, table + text(2, "c") + nest(4, load, find), 10),
)
"""
)

LIAR = (
    NETLINK
    + r"""
import sys
# Without Docker's rules questions go where they are addressed to.
batch(message(2, 0, text(1, "nat"), 2))
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.11", 53))
print("ready", flush=True)
vip = bytes(map(int, sys.argv[1].split(".")))
while True:
    query, peer = server.recvfrom(4096)
    end = 12
    while query[end]:
        end += 1 + query[end]
    end += 5
    tasks = query[12:18] == b"\5tasks"
    head = query[:2] + struct.pack("!5H", 0x8183 if tasks else 0x8180, 1, 0 if tasks else 1, 0, 0)
    answer = b"" if tasks else struct.pack("!HHHIH", 0xC00C, 1, 1, 5, 4) + vip
    server.sendto(head + query[12:end] + answer, peer)
"""
)


def _deaths(host: Host) -> dict[str, int]:
    return {part["part"]: part["deaths"] for part in host.status()["parts"]}


def test_rules_that_end_libnftables(bed: Bed, manager: Host) -> None:
    """A container with NET_ADMIN whose nf_tables end libnftables ends no part of the plugin, and
    other containers start.
    """
    network = make_network(manager)
    hostile = run_container(manager, network, "--cap-add", "NET_ADMIN")
    before = _deaths(manager)
    manager.exec(hostile, "python3", "-c", DEADLY)
    # The plugin checks each container every ten seconds.
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        manager.docker("run", "--rm", "--network", network, WORKLOAD_IMAGE, "true")
        time.sleep(3)
    assert _deaths(manager) == before


def _failures(host: Host, client: str, service: str) -> int:
    """The results of six requests."""
    script = (
        f"for n in 1 2 3 4 5 6; do curl -s -m 2 -o /dev/null http://{service}/ || echo failed; done"
    )
    return Counter(host.exec(client, "sh", "-c", script).split())["failed"]


def test_forged_answers_of_dns(bed: Bed, manager: Host) -> None:
    """A container that forges DNS answers in its own namespace, by which a service has no tasks,
    removes the service for nobody else.
    """
    network = make_network(manager)
    service = make_service(manager, network, NGINX, replicas=2)
    liar = run_container(manager, network, "--cap-add", "NET_ADMIN")
    client = run_container(manager, network)
    wait_until("the service", lambda: _failures(manager, client, service) == 0, 90, 1)
    vip = manager.exec(client, "getent", "hosts", service).split()[0]
    lies = manager.spawn(*("docker", "exec", liar, "timeout", "60", "python3", "-c", LIAR, vip))
    try:
        wait_until(
            "the liar",
            lambda: "127.0.0.11:53" in manager.exec(liar, "ss", "-Hlun", check=False),
            20,
        )
        for _ in range(12):
            assert _failures(manager, client, service) == 0
            time.sleep(0.5)
    finally:
        lies.kill()
        lies.wait(patience(10))
