"""Places for programs, with and without the library; their programs are compiled once."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from testbed.kernel_hosts import missing_tools
from tests.dataplane.places import LIBRARY, SOURCES, Places, compile_c, places

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.kernel)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled programs: `NAME`, and `NAME-fortified` with the checked calls of the C
    library.
    """
    if not shutil.which("gcc"):
        pytest.skip("gcc is missing")
    folder = tmp_path_factory.mktemp("programs")
    fortified = ("-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [
            pool.submit(compile_c, source, folder / f"{source.stem}{suffix}", *options)
            for source in SOURCES.glob("*.c")
            for suffix, options in (("", ()), ("-fortified", fortified))
        ]
        helper = SOURCES / "helpers" / "cat.c"
        made.append(pool.submit(compile_c, helper, folder / "static-cat", "-static"))
        for name in ("deep", "wrapper"):
            helper = SOURCES / "helpers" / f"{name}.c"
            made.append(pool.submit(compile_c, helper, folder / f"{name}.so", "-shared", "-fPIC"))
        for each in made:
            each.result()
    return folder


@pytest.fixture(scope="session", params=["plain", "accelerated"])
def everywhere(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, programs: Path
) -> Iterator[Places]:
    """One bed for all tests that need the same."""
    if missing := missing_tools():
        pytest.skip(f"missing: {missing}")
    accelerated = request.param == "accelerated"
    if accelerated and not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    with places(accelerated, tmp_path_factory.mktemp(request.param), programs) as made:
        yield made


@pytest.fixture(scope="session")
def ports() -> Iterator[int]:
    return itertools.count(7100)


@pytest.fixture
def both(everywhere: Places, ports: Iterator[int]) -> Places:
    """The bed, with its counters reset."""
    everywhere.forget()
    everywhere.ports = ports
    return everywhere
