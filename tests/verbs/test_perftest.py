"""The programs of perftest with all of their options, between two containers.

Some of the combinations by default, all of them with PERFTEST_ALL=1 (`make torture`).
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import time
from typing import Final

import pytest

from testbed.namespace_bed import BedContainer, NamespaceBed
from testbed.patience import patience
from testbed.process import wait_until
from tests.verbs.test_applications import Application, end, finish, inside, listens, made, start

pytestmark = pytest.mark.kernel
__all__ = ["made"]

PORT: Final = 18515
PROGRAMS: Final = {
    "ib_send_lat": ("RC", "UC", "UD"),
    "ib_send_bw": ("RC", "UC", "UD"),
    "ib_write_lat": ("RC", "UC"),
    "ib_write_bw": ("RC", "UC"),
    "ib_read_lat": ("RC",),
    "ib_read_bw": ("RC",),
    "ib_atomic_lat": ("RC",),
    "ib_atomic_bw": ("RC",),
}
"""Each program, and the types of queue pairs that it knows."""
OPTIONS: Final = ("", "-e", "-R", "-q 3", "-b", "-I 64", "-a", "--use-srq", "-r 64", "-s 100000")
ALL: Final = bool(os.environ.get("PERFTEST_ALL"))
SHORT: Final = (
    "ib_send_bw -c RC -b -R",
    "ib_send_lat -c UD -e",
    "ib_send_bw -c RC --use-srq -q 3",
    "ib_write_lat -c UC -I 64",
    "ib_write_bw -c RC -q 3",
    "ib_read_bw -c RC -e -R",
    "ib_atomic_bw -c RC -q 3",
    "ib_atomic_lat -c RC -R",
)


def makes_sense(program: str, kind: str, option: str) -> bool:
    """Whether perftest has such a test."""
    first = option.split()[0] if option else ""
    bandwidth, sends = program.endswith("_bw"), "send" in program
    return not (
        (first in {"-q", "-b"} and not bandwidth)
        or (first in {"--use-srq", "-r"} and not sends)
        or (first == "--use-srq" and kind == "UC")
        # What is read, or fetched, can't be inline.
        or (first == "-I" and program.split("_")[1] in {"read", "atomic"})
        # Atomic operations have eight bytes, datagrams one packet.
        or (first in {"-a", "-s"} and ("atomic" in program or kind == "UD"))
        # What perftest refuses by itself.
        or (first == "-e" and "write" in program)
        or (first == "-R" and kind == "UC")
    )


def all_tests() -> list[str]:
    """Each program and type with each two of the options."""
    pairs = [("", ""), *itertools.combinations(OPTIONS, 2)]
    return [
        " ".join(f"{program} -c {kind} {one} {other}".split())
        for program, kinds in PROGRAMS.items()
        for kind in kinds
        for one, other in pairs
        if all(makes_sense(program, kind, option) for option in (one, other))
        # It posts its first receive to the queue pair, which has a shared receive queue.
        and not (program == "ib_send_lat" and kind == "UD" and {"-R", "--use-srq"} <= {one, other})
        # Two sizes.
        and not {"-a", "-s 100000"} <= {one, other}
        and not ("-I 64" in {one, other} and {"-a", "-s 100000"} & {one, other})
    ]


def connect(server: subprocess.Popen[str], box: BedContainer, client: list[str]) -> str:
    """What a client of rdma_cm says. Its server may not listen yet."""
    until = time.monotonic() + patience(20)
    while (asked := start(box, client)).wait(patience(60)):
        said = end(asked)
        assert server.poll() is None, said
        assert time.monotonic() < until, said
    return end(asked)


@pytest.mark.parametrize("test", all_tests() if ALL else SHORT)
def test_perftest(made: NamespaceBed, test: str) -> None:
    """The program does its test at both ends, and fails at none."""
    a, b = made.containers.values()
    measure(a, b, test)


def measure(a: BedContainer, b: BedContainer, test: str) -> None:
    """Run a test whose server is in the first container."""
    program = test.split()[0]
    if shutil.which(program) is None:
        pytest.skip(f"missing: {program} (make setup)")
    count = f"-n {5 if '-a' in test.split() else 200}"
    application = Application(program, PORT, "", ())
    wait_until("nobody to listen", lambda: not listens(a, PORT))
    server = start(a, inside(application, f"{test} {count} -F"))
    command = inside(application, f"{test} {count} -F {a.ipv4}")
    try:
        if "-R" in test.split():
            said = connect(server, b, command)
        else:
            wait_until("the server to listen", lambda: listens(a, PORT))
            said = finish(start(b, command))
    except AssertionError:
        print("server:", end(server))
        raise
    said += finish(server)
    assert "#bytes" in said
