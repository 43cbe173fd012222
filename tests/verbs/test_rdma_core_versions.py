"""Programs of rdma-core in other Debian releases, between two containers.

Each runs in a root file system of its release, with its libc, its librdmacm, and the libibverbs
that ours takes the place of.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from typing import Final

import pytest

from testbed.debian_suite import SuiteAbsentError
from testbed.images import NotPreparedError
from testbed.namespace_bed import BedContainer, NamespaceBed
from testbed.patience import patience
from testbed.process import wait_until
from testbed.verbs_packages import RDMA_CORE, rdma_core
from tests.verbs.test_applications import PRELOADED, end, finish, listens, made, start

pytestmark = pytest.mark.kernel
__all__ = ["made"]

PORT: Final = 18515
OLDEST, NEWEST = "bullseye", "forky"
INSIDE: Final = (
    'for each in dev proc run/freeflow; do mount --rbind "/$each" "$0/$each"; done; '
    'export LD_PRELOAD="$1"; shift; exec chroot --userspec=65534:65534 "$0" "$@"'
)
PAIRS: Final = {
    "rc": ("ibv_rc_pingpong -g 0 -n 300 -c", "ibv_rc_pingpong -g 0 -n 300 -c {}"),
    "rc_sleeping": ("ibv_rc_pingpong -g 0 -n 300 -e", "ibv_rc_pingpong -g 0 -n 300 -e {}"),
    "uc": ("ibv_uc_pingpong -g 0 -n 300", "ibv_uc_pingpong -g 0 -n 300 {}"),
    "ud": ("ibv_ud_pingpong -g 0 -n 300", "ibv_ud_pingpong -g 0 -n 300 {}"),
    "srq": ("ibv_srq_pingpong -g 0 -n 300", "ibv_srq_pingpong -g 0 -n 300 {}"),
    "rping": ("rping -s -a {} -C 100 -V", "rping -c -a {} -C 100 -V"),
    "ucmatose": ("ucmatose -b {} -c 3 -C 20", "ucmatose -s {} -c 3 -C 20"),
    "rstream": ("rstream -S 65536 -C 50", "rstream -S 65536 -C 50 -s {}"),
}
"""What the server and the client run; {} is the server's address."""
CASES: Final = [
    *((suite, suite, name) for suite in RDMA_CORE for name in PAIRS),
    *((OLDEST, NEWEST, name) for name in ("rc", "rping")),
    *((NEWEST, OLDEST, name) for name in ("rc", "rping")),
]


def inside(suite: str, command: str) -> list[str]:
    """A command as an unprivileged user of a suite's root file system."""
    try:
        root = rdma_core(suite)
    except (NotPreparedError, SuiteAbsentError) as error:
        pytest.skip(str(error))
    return ["sh", "-c", INSIDE, str(root), PRELOADED, *shlex.split(command)]


def meet(a: BedContainer, server: subprocess.Popen[str], b: BedContainer, client: list[str]) -> str:
    """What the client says, which has to succeed once the server is there."""
    if "pingpong" in " ".join(client):
        wait_until("the server to listen", lambda: listens(a, PORT))
        return finish(start(b, client))
    until = time.monotonic() + patience(20)
    while (asked := start(b, client)).wait(patience(60)):
        # The server may not listen yet.
        said = end(asked)
        assert server.poll() is None, said
        assert time.monotonic() < until, said
    return end(asked)


@pytest.mark.parametrize(("server", "client", "name"), CASES)
def test_programs(made: NamespaceBed, server: str, client: str, name: str) -> None:
    """A program of one release exchanges data with one of the same or another release."""
    a, b = made.containers.values()
    commands = [words.format(a.ipv4) for words in PAIRS[name]]
    wait_until("nobody to listen", lambda: not listens(a, PORT))
    served = start(a, inside(server, commands[0]))
    try:
        said = meet(a, served, b, inside(client, commands[1]))
    except AssertionError:
        print("server:", end(served))
        raise
    said += finish(served)
    assert not re.search(r"version|symbol|ERROR: ld.so", said), said


@pytest.mark.parametrize("suite", RDMA_CORE)
def test_device(made: NamespaceBed, suite: str) -> None:
    """The program that shows devices shows ours, and nothing else."""
    a, _ = made.containers.values()
    said = finish(start(a, inside(suite, "ibv_devinfo -v")))
    assert re.findall(r"hca_id:\s*(\S+)", said) == ["freeflow0"]
    assert "PORT_ACTIVE" in said
    assert f"::ffff:{a.ipv4}" in said
