"""Applications of packages between containers of two hosts, whose relays carry their queue pairs.

Each runs once and shortly, over TCP between the relays; `make long` runs them over shared memory in
place of an RDMA device as well. What they have in common with those on one host is there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from testbed.namespace_bed import BedContainer
from testbed.process import wait_until
from tests.dataplane.places import LIBRARY
from tests.dataplane.two_hosts import HostBed, two_hosts
from tests.verbs.test_applications import (
    APPLICATIONS,
    Application,
    end,
    exchange,
    exchange_mpi,
    finish,
    inside,
    start,
)
from tests.verbs.test_gloo import add_up
from tests.verbs.test_perftest import ALL, SHORT, all_tests, connect, measure
from tests.verbs.test_two_verbs_hosts import RELAY, until_empty
from tests.verbs.test_valkey import served, store_and_read

pytestmark = pytest.mark.kernel

Hosts = tuple[HostBed, HostBed]
TESTS: Final = {
    "ucp": ("tag_bw -n 50 -s 1048576", "ucp_put_bw -s 65536", "ucp_get -s 65536", "ucp_fadd"),
    "ucp_ud": ("tag_lat",),
    "uct_rc": ("put_lat", "cswap"),
    "libfabric_msg": ("-S 1048576 -I 20",),
    "libfabric_rdm": ("-I 50",),
    "libfabric_dgram": ("-I 50",),
    "qperf": ("rc_rdma_write_poll_lat", "ver_rc_compare_swap"),
}
"""Of `APPLICATIONS`."""
BY_CM: Final = {
    "rping": ("rping -s -a {} -C 20 -V", "rping -c -a {} -C 20 -V"),
    "rstream": ("rstream -T v -I 5 -C 5 -S 65536", "rstream -T v -I 5 -C 5 -S 65536 -s {}"),
}
"""Servers and clients that find each other by rdma_cm, and check what comes; {} is the server's
address.
"""


@pytest.fixture(scope="module", params=["relay", pytest.param("rdma", marks=pytest.mark.long)])
def hosts(request: pytest.FixtureRequest, library: Path) -> Iterator[Hosts]:
    """Two hosts with a container each, in which the libraries are where the plugin puts them."""
    if os.geteuid() or not LIBRARY.exists() or not RELAY.exists():
        pytest.skip(f"missing: root, {LIBRARY} or {RELAY} (make library relay)")
    with two_hosts(library=LIBRARY, relay=RELAY, path=request.param) as made:
        for host in made:
            host.shared.joinpath("router.sock").chmod(0o666)
            for name in (library.name, "libibverbs.so"):
                shutil.copy(library.with_name(name), host.shared)
        yield made


@pytest.fixture
def boxes(hosts: Hosts) -> Iterator[tuple[BedContainer, BedContainer]]:
    """A container of each host. What runs in them uses the relays, and leaves nothing behind."""
    before = [host.counts() for host in hosts]
    yield hosts[0].containers["a"], hosts[1].containers["b"]
    wait_until("queue pairs", lambda: hosts[0].counts().granted > before[0].granted)
    until_empty(hosts)
    assert [host.counts().broken for host in hosts] == [each.broken for each in before]


Boxes = tuple[BedContainer, BedContainer]


@pytest.mark.parametrize(
    ("name", "test"), [(name, test) for name, tests in TESTS.items() for test in tests]
)
def test_applications(boxes: Boxes, name: str, test: str) -> None:
    """Each test of an application succeeds, and says nothing of errors."""
    exchange(*boxes, APPLICATIONS[name], test)


@pytest.mark.parametrize("name", BY_CM)
def test_rdma_cm(boxes: Boxes, name: str) -> None:
    """Programs that connect by rdma_cm find each other, and have the same bytes."""
    a, b = boxes
    if shutil.which(name) is None:
        pytest.skip(f"missing: {name} (make setup)")
    server, client = (
        inside(Application(name, 0, "", ()), words.format(a.ipv4)) for words in BY_CM[name]
    )
    running = start(a, server)
    try:
        connect(running, b, client)
        finish(running)
    except AssertionError:
        print("server:", end(running))
        raise


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_mpi(boxes: Boxes, tmp_path: Path, ranks: int) -> None:
    """Ranks of Open MPI on two hosts exchange messages of all sizes, each byte as it was sent."""
    exchange_mpi(*boxes, tmp_path, ranks)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_gloo(boxes: Boxes, ranks: int) -> None:
    """Processes of gloo on two hosts have the right sums."""
    add_up(boxes, ranks)


def test_valkey(boxes: Boxes) -> None:
    """Valkey's values are read on one host as they were written from there to the other one."""
    with served(*boxes) as server:
        store_and_read(server, 0, 1, 300_001)


@pytest.mark.parametrize("test", all_tests() if ALL else SHORT)
def test_perftest(boxes: Boxes, test: str) -> None:
    """The program does its test at both ends, and fails at none."""
    measure(*boxes, test)
