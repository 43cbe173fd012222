"""The BPF file system below the host's /run, in which maps and links of the fast path are pinned.

Like the overlay namespace's pin (`pin.py`) it outlives the plugin's process. Removing a pin frees
its map or link once no program uses it. A file system that is only unmounted keeps its pins as long
as any mount namespace has a copy.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import Final

from driver.errors import DOCTOR, KernelError
from driver.kernel.namespace import check, filesystem, libc

PINS: Final = Path("freeflow-admin/bpf")
"""Below the host's /run."""
_MAGIC: Final = 0xCAFE4A11
_MNT_DETACH: Final = 2
_FLAGS: Final = 2 | 4 | 8
"""MS_NOSUID, MS_NODEV, MS_NOEXEC."""


def make(host_run: Path) -> Path:
    """Mount it unless it is mounted; returns its path.

    Raises:
        KernelError: it can't be mounted.
    """
    path = host_run / PINS
    if filesystem(path) == _MAGIC:
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o700)
    except OSError as error:
        raise KernelError(
            f"{path} can't be made", cause=str(error.strerror), remedy=DOCTOR
        ) from error
    result = libc.mount(b"bpf", str(path).encode(), b"bpf", ctypes.c_ulong(_FLAGS), b"mode=0700")
    check(result, f"mounting {path}")
    return path


def is_there(host_run: Path) -> bool:
    return filesystem(host_run / PINS) == _MAGIC


def remove(host_run: Path) -> bool:
    """Remove all pins, then the file system. False: there was none."""
    path = host_run / PINS
    existed = is_there(host_run)
    if existed:
        for pin in sorted(path.rglob("*"), reverse=True):
            with contextlib.suppress(OSError):
                pin.rmdir() if pin.is_dir() else pin.unlink()
        libc.umount2(str(path).encode(), _MNT_DETACH)
    # Other mount namespaces have copies; removing the directory unmounts all (unlink(2)).
    with contextlib.suppress(OSError):
        path.rmdir()
    return existed
