"""The programs that the kernel runs, built once per test run if their sources have changed."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path
from typing import Final

from testbed.patience import patience

TOP: Final = Path(__file__).parents[1]
SOURCES: Final = TOP / "dataplane/ebpf"


@functools.cache
def built() -> Path:
    """The object file; in a virtual machine, which has no compiler, the one that FREEFLOW_PROGRAMS names."""
    given = os.environ.get("FREEFLOW_PROGRAMS")
    if given:
        return Path(given)
    target = TOP / "build/overlay.bpf.o"
    sources = [*SOURCES.glob("*.[ch]"), SOURCES / "build.sh"]
    if not target.exists() or target.stat().st_mtime < max(one.stat().st_mtime for one in sources):
        subprocess.run([SOURCES / "build.sh", target], check=True, timeout=patience(60))
    return target
