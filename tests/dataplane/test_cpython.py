"""CPython's own tests with both ends of their connections accelerated: none fails that passes
without the library.

The tests connect over loopback, in one process. So the library also requests such connections, at
the first operation. `FREEFLOW_SLOW=1` adds the modules that take minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from dataplane.control import RouterSettings, Rule
from testbed.kernel_hosts import missing_tools
from testbed.namespace_bed import bed
from tests.dataplane.places import LIBRARY, Counts, counts_of

QUICK: Final = (
    "test_select",
    "test_selectors",
    "test_epoll",
    "test_poll",
    "test_socketserver",
    "test_httplib",
    "test_smtplib",
    "test_ftplib",
    "test_socket",
    "test_ssl",
)
SLOW: Final = (
    "test_asyncio",
    "test_multiprocessing_fork",
    "test_multiprocessing_forkserver",
    "test_multiprocessing_spawn",
)
UPGRADED: Final = {
    "test_httplib",
    "test_smtplib",
    "test_ftplib",
    "test_socket",
    "test_ssl",
    "test_asyncio",
}
"""Modules whose connections live long enough."""
_VERDICT: Final = re.compile(r"^(?:FAIL|ERROR): (.+)$", re.MULTILINE)
_TIME: Final = 420


@cache
def interpreter() -> str | None:
    """A Python with its own tests, which Debian packages separately (libpython3-testsuite)."""
    base = getattr(sys, "_base_executable", sys.executable)
    for name in (base, "/usr/bin/python3", shutil.which("python3")):
        if name and Path(name).exists():
            question = [name, "-c", "import test.libregrtest, test.test_socket"]
            if subprocess.run(question, check=False, capture_output=True).returncode == 0:
                return str(name)
    return None


def run_tests(module: str, folder: Path, *, accelerated: bool) -> tuple[set[str], Counts]:
    """The names of the tests that fail, and the counters of the library."""
    python = interpreter()
    assert python is not None
    statistics = folder / f"{module}-{accelerated}.json"
    with bed(
        "alone",
        library=LIBRARY if accelerated else None,
        loopback=True,
        settings=RouterSettings(rule=Rule(operations=1, age=0)),
        router=accelerated,
    ) as made:
        done = made.containers["alone"].run(
            # VSOCK needs a hypervisor.
            [
                python,
                "-m",
                "test",
                "-u",
                "network",
                "--timeout",
                "120",
                "-i",
                "*[vV][sS][oO][cC][kK]*",
                module,
            ],
            env={"FREEFLOW_LOOPBACK": "1", "FREEFLOW_STATS": str(statistics)},
            timeout=_TIME,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    said = done.stdout + done.stderr
    failed = set(_VERDICT.findall(said))
    if done.returncode != 0 and not failed:
        failed.add(f"{module}: status {done.returncode}: {said[-1500:]}")
    return failed, counts_of(statistics)


@pytest.fixture(autouse=True)
def _possible() -> None:
    if missing := missing_tools():
        pytest.skip(f"missing: {missing}")
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    if interpreter() is None:
        pytest.skip("missing: a Python with its own tests (libpython3-testsuite)")


@pytest.mark.timeout(2 * _TIME + 30)
@pytest.mark.parametrize("module", [*QUICK, *(SLOW if os.environ.get("FREEFLOW_SLOW") else ())])
def test_cpython(module: str, tmp_path: Path) -> None:
    """No test of CPython fails with the library that passes without it, and connections were
    upgraded.
    """
    failed, counted = run_tests(module, tmp_path, accelerated=True)
    if failed:
        # A failed test is repeated once, because a busy machine is not the library's fault.
        again, _ = run_tests(module, tmp_path, accelerated=True)
        failed &= again
    if failed:
        failed -= run_tests(module, tmp_path, accelerated=False)[0]
    assert not failed
    assert counted["corrupt"] == 0
    if module in UPGRADED:
        assert counted["receivers"] > 0, counted
        assert counted["senders"] > 0, counted
