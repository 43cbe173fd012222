"""What aborts a process that uses libnftables: two threads in it, and large descriptors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from testbed.patience import patience

TOP: Final = Path(__file__).parents[2]
_THREADS: Final = """
import threading
from ipaddress import ip_address
from driver.kernel import nft
from driver.kernel.guard_rules import TABLE, Wanted
from driver.kernel.namespace import in_netns
from testbed.kernel_hosts import new_namespace

peers = frozenset(ip_address(f"10.0.0.{number}") for number in range(1, 60))
wanted = Wanted({4799: peers}, frozenset({"eth0"}), 4799)

def work():
    session = in_netns(new_namespace(), nft.Session)
    for _ in range(150):
        session.run(wanted.commands())
        assert session.query(f"list table {TABLE}", elements=True)
    ended.append(True)

ended = []
threads = [threading.Thread(target=work) for _ in range(6)]
for each in threads:
    each.start()
for each in threads:
    each.join()
assert len(ended) == len(threads)
"""


def ends_well(program: str) -> None:
    """Run a program in a process of its own, which it may abort."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_many_threads_with_rules_of_their_own() -> None:
    """Threads that write and list rules at the same time, each in its own namespace, don't abort
    the process."""
    for _ in range(3):
        ends_well(_THREADS)


_DESCRIPTORS: Final = """
import os, resource
from driver.errors import KernelError
from driver.kernel import nft
from driver.kernel.namespace import in_netns
from testbed.kernel_hosts import new_namespace

namespace = new_namespace()
kept = in_netns(namespace, nft.Session)
resource.setrlimit(resource.RLIMIT_NOFILE, (3000, 3000))
for _ in range(1500):
    os.open("/", os.O_RDONLY)
kept.run("add table ip one")
try:
    nft.run("add table ip two", namespace)
except KernelError as error:
    assert "descriptors" in str(error)
else:
    raise AssertionError("no error")
"""


def test_many_descriptors() -> None:
    """In a process with very many descriptors a new session is refused with the cause; existing
    ones work."""
    ends_well(_DESCRIPTORS)
