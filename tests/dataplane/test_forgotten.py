"""Connection tracking remembers a connection while its bytes are in shared memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from dataplane.control import RouterSettings, Rule
from testbed.kernel_hosts import missing_tools
from testbed.namespace_bed import NamespaceBed, bed
from testbed.patience import patience
from tests.dataplane.places import LIBRARY, PATIENCE, Places

VIP: Final = "10.78.0.100"
FORGETS: Final = 4
"""The time in seconds after which connection tracking in the client's container forgets a
connection.
"""
TALKS: Final = 7
TIMEOUT: Final = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established")

SERVER: Final = """
import socket, threading
listener = socket.create_server(("0.0.0.0", 6600))
print("listens", flush=True)
def serve(one):
    try:
        while got := one.recv(100):
            one.sendall(got)
        print("end", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
    one.close()
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""

CLIENT: Final = """
import socket, sys, time
host, seconds = sys.argv[1], float(sys.argv[2])
some = [socket.create_connection((host, 6600)) for _ in range(4)]
def talk():
    for one in some:
        one.settimeout(float(sys.argv[3]))
        one.sendall(b"x")
        assert one.recv(1) == b"x"
until = time.monotonic() + seconds
while time.monotonic() < until:
    talk()
    time.sleep(0.05)
print("talked", flush=True)
sys.stdin.readline()
for one in some[:2]:
    one.shutdown(socket.SHUT_WR)
    assert one.recv(1) == b"", "the end is not answered"
print("ended", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def forgetful() -> Iterator[NamespaceBed]:
    """A client and a service, where tracking in the client's container soon forgets connections."""
    if missing := missing_tools():
        pytest.skip(f"missing: {missing}")
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    settings = RouterSettings(rule=Rule(operations=2, age=0))
    with bed(
        "client", "s1", "s2", vips={VIP: ("s1", "s2")}, library=LIBRARY, settings=settings
    ) as made:
        made.containers["client"].do(lambda: TIMEOUT.write_text(str(FORGETS)))
        yield made


def test_busy_connections_to_a_vip(forgetful: NamespaceBed) -> None:
    """Connections that used shared memory for longer than tracking remembers end normally, by FIN
    and by SIGKILL.
    """
    servers = [
        forgetful.containers[name].popen(
            [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True
        )
        for name in ("s1", "s2")
    ]
    for each in servers:
        assert each.stdout is not None
        assert each.stdout.readline() == "listens\n"
    client = forgetful.containers["client"].popen(
        [sys.executable, "-c", CLIENT, VIP, str(TALKS), str(patience(20))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    assert client.stdout.readline() == "talked\n"
    paths = [each.path for each in forgetful.router.connections().connections]
    assert paths.count("shm") == 8, paths
    client.stdin.write("\n")
    client.stdin.flush()
    assert client.stdout.readline() == "ended\n"
    client.kill()
    client.wait()
    until = time.monotonic() + PATIENCE
    while forgetful.router.connections().connections:
        assert time.monotonic() < until, "connections of nobody are listed"
        time.sleep(0.05)
    for each in servers:
        each.kill()
    said = "".join(each.communicate()[0] for each in servers).split()
    # The two that were killed without unread bytes end by FIN as well.
    assert said == ["end"] * 4


def test_options(both: Places) -> None:
    """A program sees the keepalive that it has set, and a process that gets the connection has the
    same.
    """
    both.play("keepalive", "options")
    both.play("keepalive", "set_later")
    both.upgraded(2)
    both.play("keepalive", "handed_on")
