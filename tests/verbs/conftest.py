"""Our libibverbs, built once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from testbed.patience import patience

BUILD = Path(__file__).parents[2] / "dataplane" / "verbs" / "build.sh"
HEADER = Path("/usr/include/infiniband/verbs.h")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built library; its companion lies beside it."""
    missing = [tool for tool in ("gcc", "objdump") if shutil.which(tool) is None]
    missing += [] if HEADER.exists() else [str(HEADER)]
    if missing:
        pytest.skip(f"missing: {', '.join(missing)}")
    output = tmp_path_factory.mktemp("verbs") / "libibverbs.so.1"
    subprocess.run([BUILD, output], check=True, timeout=patience(120))
    return output
