"""libnftables from several threads: it isn't made for that, and ends a process in which two are in it at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.patience import patience

TOP: Final = Path(__file__).parents[2]
_THREADS: Final = """
import threading
from ipaddress import ip_address
from driver.kernel import nft
from driver.kernel.guard import TABLE, Wanted
from driver.kernel.namespace import in_netns
from tests.kernel.hosts import new_namespace

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


def test_many_threads_with_rules_of_their_own() -> None:
    """Threads that write and list rules at the same time, each in its own namespace, don't end the process."""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", _THREADS],
            cwd=TOP,
            capture_output=True,
            text=True,
            timeout=patience(60),
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
