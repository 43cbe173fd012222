"""Large transfers, datagrams of every size, sizes around the MTU."""

from __future__ import annotations

from testbed import Bed, Host, wait_until
from tests.swarm.conftest import address, make_network, run_container

SEND = """
import hashlib, os, socket, sys
s = socket.create_connection((sys.argv[1], 7000), timeout=30)
h = hashlib.sha256()
for i in range(int(sys.argv[2])):
    d = os.urandom(65536); h.update(d); s.sendall(d)
s.shutdown(socket.SHUT_WR)
answer = s.makefile().read()
print("same" if answer == h.hexdigest() else "different " + answer)
"""
RECEIVE = """
import hashlib, socket
l = socket.create_server(("", 7000))
while True:
    s, _ = l.accept(); h = hashlib.sha256()
    while True:
        d = s.recv(1 << 20)
        if not d: break
        h.update(d)
    s.sendall(h.hexdigest().encode()); s.close()
"""
ECHO = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("", 7001))
while True:
    d, a = s.recvfrom(65535); s.sendto(d, a)
"""
DATAGRAMS = """
import os, socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2); s.connect((sys.argv[1], 7001))
bad = []
for size in (0, 1, 64, 1000, 1422, 1423, 1472, 1500, 2800, 9000, 30000, 60000):
    d = os.urandom(size)
    for attempt in range(3):
        try:
            s.send(d)
            if s.recv(65535) == d: break
        except TimeoutError: pass
    else: bad.append(size)
print("bad", bad)
"""


def _pair(bed: Bed, network: str, server: str, *options: str) -> tuple[Host, str, Host, str, str]:
    near, far = bed.hosts[0], bed.hosts[1]
    listening = run_container(far, network, *options, command=f"exec python3 -c '{server}'")
    client = run_container(near, network, *options)
    target = address(far, listening, network)
    wait_until(
        "the other host",
        lambda: " 0% packet loss" in near.exec(client, "ping", "-c1", "-W1", target, check=False),
        15,
    )
    return near, client, far, listening, target


def test_a_large_transfer_arrives_byte_for_byte(bed: Bed, manager: Host) -> None:
    """256 MiB between hosts arrive with the hash that was sent."""
    network = make_network(manager)
    near, client, _, _, target = _pair(bed, network, RECEIVE)
    assert near.exec(client, "python3", "-c", SEND, target, "4096", timeout=120).strip() == "same"


def test_a_large_transfer_on_one_host(bed: Bed, manager: Host) -> None:
    """256 MiB between two containers of one host arrive with the hash that was sent."""
    network = make_network(manager)
    server = run_container(manager, network, command=f"exec python3 -c '{RECEIVE}'")
    client = run_container(manager, network)
    target = address(manager, server, network)
    wait_until(
        "the server", lambda: manager.exec(client, "nc", "-z", target, "7000", check=False) == ""
    )
    assert (
        manager.exec(client, "python3", "-c", SEND, target, "4096", timeout=120).strip() == "same"
    )


def test_datagrams_of_every_size(bed: Bed, manager: Host) -> None:
    """UDP datagrams of 0 to 60,000 bytes, fragments included, return unchanged."""
    network = make_network(manager)
    near, client, _, _, target = _pair(bed, network, ECHO)
    assert near.exec(client, "python3", "-c", DATAGRAMS, target).strip() == "bad []"


def test_mtu_edges(bed: Bed, manager: Host) -> None:
    """A packet of exactly the MTU passes unfragmented between hosts; the sender's own link refuses
    one byte more.
    """
    network = make_network(manager)
    near, client, _, _, target = _pair(bed, network, ECHO)
    mtu = int(near.exec(client, "cat", "/sys/class/net/eth0/mtu"))
    assert mtu == 1450
    exact = near.exec(
        client, "ping", "-c2", "-W1", "-M", "do", "-s", str(mtu - 28), target, check=False
    )
    assert " 0% packet loss" in exact
    more = near.exec(
        client, "ping", "-c1", "-W1", "-M", "do", "-s", str(mtu - 27), target, check=False
    )
    assert "100% packet loss" in more or "Message too long" in more or "too long" in more
