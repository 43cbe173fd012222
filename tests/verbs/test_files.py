"""Programs open the device's files themselves: see `files.c`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from testbed.patience import patience
from tests.dataplane.places import LIBRARY, compile_c
from tests.verbs.hand_router import hand_router

SOURCE = Path(__file__).with_name("files.c")


@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc"])
def test_files(library: Path, tmp_path: Path, compiler: str) -> None:
    """Once a program has asked for devices, it finds the device's files by each call; other files
    are as they are.
    """
    if shutil.which(compiler) is None or not LIBRARY.exists():
        pytest.skip(f"missing: {compiler}, {LIBRARY} (make library)")
    program = compile_c(SOURCE, tmp_path / "files", "-ldl", compiler=compiler)
    companion = library.with_name("libibverbs.so")
    environment = {
        "LD_PRELOAD": f"{LIBRARY}:{library}:{companion}",
        "FREEFLOW_ROUTER": str(tmp_path / "router.sock"),
    }
    with hand_router(tmp_path / "router.sock"):
        done = subprocess.run(
            [program, tmp_path],
            env=environment,
            capture_output=True,
            text=True,
            timeout=patience(30),
            check=False,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
