"""The BPF file system below the host's /run, in which maps and links of the fast path are pinned.

Like the overlay namespace's pin (`pin.py`) it outlives the plugin's process. Removing a pin frees
its map or link once no program uses it. A file system that is only unmounted keeps its pins as long
as any mount namespace has a copy.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from driver.errors import reporting
from driver.kernel.mounts import NODEV, NOEXEC, NOSUID, detach, mount
from driver.kernel.namespace import filesystem

PINS: Final = Path("freeflow-admin/bpf")
"""Below the host's /run."""
_MAGIC: Final = 0xCAFE4A11


def make(host_run: Path) -> Path:
    """Mount it unless it is mounted; returns its path.

    Raises:
        KernelError: it can't be mounted.
    """
    path = host_run / PINS
    if filesystem(path) == _MAGIC:
        return path
    with reporting(f"{path} can't be made"):
        path.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
    mount("bpf", path, NOSUID | NODEV | NOEXEC, kind="bpf", options="mode=0700")
    return path


def remove(host_run: Path) -> bool:
    """Remove all pins, then the file system. False: there was none."""
    path = host_run / PINS
    existed = filesystem(path) == _MAGIC
    if existed:
        for pin in sorted(path.rglob("*"), reverse=True):
            with contextlib.suppress(OSError):
                pin.rmdir() if pin.is_dir() else pin.unlink()
        detach(path)
    # Other mount namespaces have copies; removing the directory unmounts all (unlink(2)).
    with contextlib.suppress(OSError):
        path.rmdir()
    return existed
