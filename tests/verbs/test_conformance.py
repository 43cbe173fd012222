"""Our device passes rdma-core's own tests: see `conformance.py`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from testbed.patience import patience
from tests.dataplane.places import LIBRARY
from tests.verbs import conformance
from tests.verbs.hand_router import hand_router


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with their tests."""
    for needed in (conformance.SOURCES, conformance.PACKAGES / "pyverbs", conformance.PYTHON):
        if not needed.exists():
            pytest.skip(f"missing: {needed} (make setup)")
    folder = tmp_path_factory.mktemp("conformance")
    conformance.unpack(folder)
    return folder


def outcomes(module: str, library: Path, folder: Path, router: Path) -> Mapping[str, str | None]:
    """What the tests of a module come to."""
    preloaded = {"LD_PRELOAD": f"{LIBRARY}:{library}", "FREEFLOW_ROUTER": str(router)}
    done = subprocess.run(
        [conformance.PYTHON, conformance.__file__, module],
        env={**conformance.environment(folder), **preloaded},
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    said: dict[str, str | None] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("module", conformance.MODULES)
def test_module(module: str, library: Path, unpacked: Path, tmp_path: Path) -> None:
    """Each test of the module that isn't left out passes, and each that is exists."""
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    router = tmp_path / "router.sock"
    with hand_router(router):
        said = outcomes(module, library, unpacked, router)
    assert said
    left_out = {name for name in conformance.LEFT_OUT if name.partition(".")[0] == module}
    assert not {
        name for name in left_out if not any(f"{test}.".startswith(f"{name}.") for test in said)
    }
    failed = {
        name: why for name, why in said.items() if why not in {None, conformance.SAYS_LEFT_OUT}
    }
    assert not failed, "\n".join(f"{name}: {why}" for name, why in failed.items())
