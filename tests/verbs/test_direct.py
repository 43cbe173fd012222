"""Direct memory: alone, see `standstill.c`, `direct_pages.c`, `extents.c` and `direct.c`; and of
programs that know nothing of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.dataplane.places import LIBRARY
from tests.verbs.conftest import (
    SANITIZERS,
    SECONDS,
    compile_test,
    run_rules_and_race,
    run_test,
    sources,
)
from tests.verbs.router import router
from tests.verbs.test_pair import play


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("program", ["standstill", "direct_pages", "extents"])
def test_pages(tmp_path: Path, program: str) -> None:
    """Pages are replaced by a file's and back while other threads write to them, and nothing is
    lost; children have what their parent had, and what a program does with its memory has the
    effect that it has without.
    """
    run_rules_and_race(compile_test(program, tmp_path, ""))


@pytest.mark.parametrize("sanitizer", SANITIZERS[:2])
def test_direct(tmp_path: Path, sanitizer: str) -> None:
    """What can be executed without a record is, byte for byte and in order; what the other side
    would refuse is refused.
    """
    run_test(compile_test("direct", tmp_path, sanitizer, *sources()))


PERFTESTS = (
    "ib_write_lat -n 500",
    "ib_write_lat -n 200 -s 1000000",
    "ib_write_bw -n 500",
    "ib_write_bw -n 500 -q 4 -b",
    "ib_read_lat -n 500",
    "ib_read_bw -n 500 -s 8192",
    "ib_atomic_lat -n 500",
    "ib_atomic_bw -n 500 -A CMP_AND_SWAP",
    "ib_send_bw -n 500",
)


@pytest.mark.parametrize("command", PERFTESTS)
def test_perftest(library: Path, tmp_path: Path, command: str) -> None:
    """The programs of perftest come to their end with direct memory, too."""
    if shutil.which(command.split()[0]) is None or not LIBRARY.exists():
        pytest.skip(f"missing: perftest (make setup), {LIBRARY} (make library)")
    with router(tmp_path, direct=True) as made:
        said = play(library, made.socket, [*command.split(), "-x", "0", "-F"])
    assert "#bytes" in said[1], said
