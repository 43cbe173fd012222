"""The same library file works in musl's programs: all scenarios, built against musl, use rings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from testbed.kernel_hosts import missing_tools
from tests.dataplane.places import LIBRARY, SOURCES, Places, compile_c, places

PROGRAMS: Final = (
    *("bytes", "children", "connections", "ends", "lost", "processes", "semantics", "switches"),
    "waiting",
)
# The kernel's headers, behind musl's own.
HEADERS: Final = ("-idirafter", "/usr/include", "-idirafter", "/usr/include/x86_64-linux-gnu")
_ROW: Final = re.compile(r'\{"(\w+)", \w+, \w+, (?:true|false)\}')
SCENARIOS: Final = [
    (program, name)
    for program in PROGRAMS
    for name in _ROW.findall((SOURCES / f"{program}.c").read_text())
]
OTHERS: Final = {
    "deep_bind": "musl has no RTLD_DEEPBIND",
    "own_space": "musl has no dlmopen()",
    "last_words": "the library that it loads is built against glibc",
    "exec_static": "the program that it starts is the same",
    "range_at_exec": "musl has no close_range()",
    "vectors_64": "musl has preadv2() from 1.2.5 on, and no other name for it",
    "other_names": "musl has no other signal()",
    "high_descriptor": "needs more descriptors than some machines allow; tried with glibc",
}


@pytest.fixture(scope="module")
def musl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """A bed with programs built against musl."""
    if missing := missing_tools():
        pytest.skip(f"missing: {missing}")
    if not shutil.which("musl-gcc"):
        pytest.skip("missing: musl-gcc (musl-tools)")
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    folder = tmp_path_factory.mktemp("musl")

    def build(program: str) -> Path:
        return compile_c(
            SOURCES / f"{program}.c", folder / program, *HEADERS, "-Wno-error", compiler="musl-gcc"
        )

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, PROGRAMS))
    with places(True, folder, folder) as made:
        yield made


@pytest.mark.parametrize(("program", "scenario"), SCENARIOS)
def test_scenario(musl: Places, program: str, scenario: str) -> None:
    """Each scenario ends as with glibc."""
    if scenario in OTHERS:
        pytest.skip(OTHERS[scenario])
    musl.play(program, scenario)


def test_they_are_upgraded(musl: Places) -> None:
    """The scenarios before have used rings."""
    musl.upgraded(20)
