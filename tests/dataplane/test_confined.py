"""HAProxy as Debian configures it, with a changed root, is accelerated."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

from testbed.namespace_bed import BedContainer
from tests.dataplane.places import Places
from tests.dataplane.test_programs import check, need, serving

LONG = 60.0
"""The time in seconds in which a server must listen on a busy machine."""


def wait_for(container: BedContainer, address: str, port: int) -> None:
    until = time.monotonic() + LONG
    while True:
        try:
            container.do(lambda: socket.create_connection((address, port), 5)).close()
            return
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)


def haproxy_configuration(folder: Path, port: int, behind: str) -> Path:
    path = folder / "haproxy.cfg"
    path.write_text(
        f"""global
    chroot /var/lib/haproxy
    user haproxy
    group haproxy
    maxconn 200
defaults
    mode tcp
    timeout connect 10s
    timeout client 60s
    timeout server 60s
listen redis
    bind 0.0.0.0:{port}
    server one {behind}
"""
    )
    return path


def test_haproxy(both: Places) -> None:
    """HAProxy with the chroot of Debian's configuration forwards all bytes, and both of its
    connections move.
    """
    need("haproxy", "redis-server")
    port, behind = next(both.ports), next(both.ports)
    address = str(both.client.ipv4)
    redis = both.client.popen(
        [
            "redis-server",
            "--port",
            str(behind),
            "--bind",
            "0.0.0.0",
            "--save",
            "",
            "--protected-mode",
            "no",
            "--dir",
            str(both.folder),
        ],
        env=both.environment(),
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for(both.client, address, behind)
        configuration = haproxy_configuration(both.folder, port, f"{address}:{behind}")
        with serving(both, ["haproxy", "-db", "-f", str(configuration)], port):
            check(both, "check_redis.py", both.address, str(port))
    finally:
        redis.terminate()
        redis.wait(LONG)
    # The counters of the client and of redis; HAProxy cannot write its own from its root.
    both.upgraded(2)
