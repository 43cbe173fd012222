"""Streams of numbers between containers of two hosts over RDMA.

A number that is lost, duplicated or late is noticed.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from dataplane.control import RdmaFacts, RouterSettings
from testbed.process import wait_until
from testbed.vm import Process
from tests.vm.cluster import KEY, Host

STREAM: Final = "/src/tests/dataplane/programs/stream.py"
SETTINGS: Final = RouterSettings(session_key=KEY, remote_ring=65536)
PORT: Final = 7100


def rdma(host: Host) -> RdmaFacts:
    return host.router.statistics().rdma


def is_linked(host: Host) -> bool:
    facts = rdma(host)
    return not facts.why and {peer.link for peer in facts.hosts} == {"up"}


def linked(hosts: list[Host]) -> None:
    """Wait until connections can move."""
    for host in hosts:
        wait_until(f"{host.guest.name}: a link", partial(is_linked, host), 120)


class Streams:
    """Streams of numbers in both directions, in connections that have moved: see `stream.py`."""

    def __init__(self, hosts: list[Host], seconds: float, count: int = 2) -> None:
        self._hosts = hosts
        a, b = (host.containers[0] for host in hosts)
        before = rdma(hosts[0]).granted
        python, where = ["python3", "-ES", STREAM], [str(b.ipv4), str(PORT)]
        self.server = b.start([*python, "server", *where, str(count)])
        b.wait_listening(PORT)
        arguments = [str(seconds), str(count), "told"]
        self.client = a.start([*python, "client", *where, *arguments], stdin=True)
        wait_until("rdma", lambda: rdma(hosts[0]).granted - before >= count, 120)
        # Until its peer has the ring, too, an end goes on over TCP.
        wait_until("rings", lambda: self.rings() >= count, 120)
        # Their time begins now: on a busy machine they would end before they move.
        self.client.write(b"now\n")

    def rings(self) -> int:
        """The number of connections with bytes in both of their rings."""
        host = self._hosts[0]
        traffic = host.router.traffic(host.containers[0].inode).connections
        return sum(
            bool(ring.bytes_in and ring.bytes_out)
            for each in traffic
            if each.remote.endswith(f":{PORT}") and (ring := each.ring)
        )

    @staticmethod
    def words(process: Process, patience: float) -> list[str]:
        process.wait(patience)
        lines = [line.split() for line in process.output.splitlines() if line != "listening"]
        assert lines, process.errors
        return [word for word, _ in lines]

    def ends(self, patience: float = 240) -> list[str]:
        """The verdict of each end of each connection."""
        return [word for end in (self.client, self.server) for word in self.words(end, patience)]
