"""The eBPF programs, built once per test run if their sources have changed."""

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
    """The object file. FREEFLOW_PROGRAMS names another one, for guests without a compiler."""
    given = os.environ.get("FREEFLOW_PROGRAMS")
    if given:
        return Path(given)
    target = TOP / "build/overlay.bpf.o"
    sources = [*SOURCES.glob("*.[ch]"), SOURCES / "build.sh"]
    if not target.exists() or target.stat().st_mtime < max(
        source.stat().st_mtime for source in sources
    ):
        subprocess.run([SOURCES / "build.sh", target], check=True, timeout=patience(60))
    return target
