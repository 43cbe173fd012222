"""Our device passes rdma-core's own tests: see `conformance.py`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from testbed.patience import patience
from tests.dataplane.places import LIBRARY
from tests.verbs import conformance
from tests.verbs.hand_router import hand_router
from tests.verbs.router import container, router


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with their tests."""
    for needed in (conformance.SOURCES, conformance.PACKAGES / "pyverbs", conformance.PYTHON):
        if not needed.exists():
            pytest.skip(f"missing: {needed} (make setup)")
    folder = tmp_path_factory.mktemp("conformance")
    conformance.unpack(folder)
    return folder


@contextlib.contextmanager
def place(module: str, folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Where the tests of a module find a router: what their command begins with, and their
    environment.
    """
    if module in conformance.BY_ADDRESS:
        if os.geteuid():
            pytest.skip("missing: root")
        with (
            container(conformance.ADDRESS) as path,
            router(folder, {path: (conformance.ADDRESS,)}) as made,
        ):
            yield ["nsenter", f"--net={path}"], made.environment
    else:
        with hand_router(folder / "router.sock"):
            yield [], {"FREEFLOW_ROUTER": str(folder / "router.sock")}


def outcomes(
    module: str, library: Path, folder: Path, inside: list[str], router: dict[str, str]
) -> Mapping[str, str | None]:
    """What the tests of a module come to."""
    preload = f"{LIBRARY}:{library}:{library.with_name('libibverbs.so')}"
    done = subprocess.run(
        [*inside, conformance.PYTHON, conformance.__file__, module],
        env={"PATH": os.environ["PATH"], "LD_PRELOAD": preload}
        | conformance.environment(folder)
        | router,
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    said: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.parametrize("module", conformance.MODULES)
def test_module(module: str, library: Path, unpacked: Path, tmp_path: Path) -> None:
    """Each test of the module that isn't left out passes, and each that is exists."""
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    with place(module, tmp_path) as (inside, environment):
        said = outcomes(module, library, unpacked, inside, environment)
    assert said
    left_out = {name for name in conformance.LEFT_OUT if name.partition(".")[0] == module}
    assert not {
        name for name in left_out if not any(f"{test}.".startswith(f"{name}.") for test in said)
    }
    failed = {
        name: why for name, why in said.items() if why not in {None, conformance.SAYS_LEFT_OUT}
    }
    assert not failed, "\n".join(f"{name}: {why}" for name, why in failed.items())
