"""Sessions between two hosts with a real underlay in between, which can be cut."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from testbed import wait_until
from testbed.kernel_hosts import KernelHost, Lab, lab
from tests.session_probe import Probe
from tests.unit.swarm_ca import Authority, write

PORT = 4799


@contextlib.contextmanager
def probe(host: KernelHost, peer: KernelHost, folder: Path, name: str) -> Iterator[Probe]:
    """A probe of a host's own node; killed at the end."""

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return host.do(lambda: subprocess.Popen([sys.executable, *command[1:]], **options))

    made = Probe(
        name, folder, start, folder / f"swarm{host.number}", PORT, host.address, peer.address
    )
    try:
        yield made
    finally:
        made.end()


@contextlib.contextmanager
def hosts(folder: Path, *, ipv6: bool) -> Iterator[tuple[Lab, KernelHost, KernelHost]]:
    """Two hosts that are nodes of one Swarm."""
    authority = Authority()
    for number in (1, 2):
        write(folder / f"swarm{number}", authority.root, authority.node(f"node{number}"))
    with lab(2, ipv6_underlay=ipv6) as made:
        one, other = made.hosts
        yield made, one, other


def test_a_cut_cable(tmp_path: Path) -> None:
    """Hosts that don't hear each other lose their session without a word from the network, and have
    one again soon after.

    Then one of them loses its power while the cable is out: the other has a session with the new
    router at once.
    """
    with hosts(tmp_path, ipv6=False) as (made, a, b), probe(a, b, tmp_path, "a") as one:

        def joined() -> bool:
            return one.hears(b.address) and other.hears(a.address)

        with probe(b, a, tmp_path, "b") as other:
            wait_until("a session", joined, 20)
            made.link(a, "down")
            for each in (one, other):
                wait_until(
                    "its end",
                    lambda e=each: "nothing was heard" in str(e.says()["peers"].values()),  # type: ignore[misc]
                    15,
                )
            made.link(a, "up")
            wait_until("a session again", joined, 20)
            made.link(a, "down")
        with probe(b, a, tmp_path, "again") as other:
            made.link(a, "up")
            wait_until("a session with the new router", joined, 20)


def test_ipv6(tmp_path: Path) -> None:
    """An underlay of IPv6 does too."""
    with (
        hosts(tmp_path, ipv6=True) as (_, a, b),
        probe(a, b, tmp_path, "a") as one,
        probe(b, a, tmp_path, "b") as other,
    ):
        wait_until("a session", lambda: one.hears(b.address) and other.hears(a.address), 20)
