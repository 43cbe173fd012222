"""The folder that containers mount: /run/freeflow, read-only even for a container's root.

Programs in all containers with the mount load the library in it, so no container may change it. The
folder is a read-only mount of `freeflow-admin/public`, which only the host's root reaches, and a
bind mount of it is read-only too. Unix sockets in it still accept connections. We never replace the
mounted folder: running containers have it.

If a folder there is not our mount, Docker made it for a container that was started with `-v` before
the plugin. Such containers can write to it. We move that folder away and empty it.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from driver.errors import KernelError
from driver.kernel.namespace import check, libc

VISIBLE: Final = Path("freeflow")
"""Below the host's /run, as is the next."""
WRITABLE: Final = Path("freeflow-admin/public")

_MOVED: Final = "taken-away-"

_MS_RDONLY: Final = 1
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MS_REMOUNT: Final = 32
_MS_BIND: Final = 4096
_MNT_DETACH: Final = 2


def _mount(source: Path, target: Path, flags: int) -> None:
    result = libc.mount(
        str(source).encode(), str(target).encode(), None, ctypes.c_ulong(_MS_BIND | flags), None
    )
    check(result, f"mounting {target}")


def options_at(path: Path, mountinfo: Path = Path("/proc/thread-self/mountinfo")) -> set[str]:
    """The options of the mount at just this path; empty if there is none (mountinfo, proc(5))."""
    found: set[str] = set()
    for line in mountinfo.read_text(errors="replace").splitlines():
        fields = line.split()
        if fields[4].replace("\\040", " ") == str(path):
            # A later mount covers earlier ones.
            found = set(fields[5].split(","))
    return found


def make(host_run: Path) -> Path:
    """Make the folder unless it exists; returns the writable path of its content.

    Raises:
        KernelError: it can't be made.
    """
    host_run = host_run.resolve()
    visible, writable = host_run / VISIBLE, host_run / WRITABLE
    try:
        for folder in (writable, visible):
            folder.mkdir(parents=True, exist_ok=True)
        writable.parent.chmod(0o700)
        writable.chmod(0o755)
        if "ro" in options_at(visible) and visible.samefile(writable):
            return writable
        while options_at(visible):
            check(libc.umount2(str(visible).encode(), _MNT_DETACH), f"unmounting {visible}")
        _move_away(visible, writable.parent)
        visible.mkdir()
        visible.chmod(0o755)
        # Made read-only at another path first: a later remount would not propagate to the host.
        with tempfile.TemporaryDirectory(prefix="freeflow-") as text:
            private = Path(text)
            _mount(writable, private, 0)
            try:
                _mount(private, private, _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
                _mount(private, visible, 0)
            finally:
                libc.umount2(str(private).encode(), _MNT_DETACH)
    except OSError as error:
        raise KernelError(
            f"{visible} can't be made",
            cause=str(error.strerror),
            remedy="check that the plugin has CAP_SYS_ADMIN",
        ) from error
    return writable


def _move_away(folder: Path, admin: Path) -> None:
    """Remove a folder to which a container may write at the same time."""
    with contextlib.suppress(OSError):
        folder.rmdir()
        return
    # Renamed first, in one step: emptying it may take long, with a container writing meanwhile.
    away = Path(tempfile.mkdtemp(prefix=_MOVED, dir=admin))
    folder.rename(away / folder.name)
    # Not in Python: the folder may be nested too deeply for it.
    subprocess.Popen(
        ["rm", "-rf", "--one-file-system", *map(str, admin.glob(f"{_MOVED}*"))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def remove(host_run: Path) -> bool:
    """Remove the mount; containers that have it keep it. False: there was none."""
    visible = host_run.resolve() / VISIBLE
    while options_at(visible) and libc.umount2(str(visible).encode(), _MNT_DETACH) == 0:
        pass
    # Other mount namespaces have copies; removing the folder unmounts all (unlink(2)).
    with contextlib.suppress(OSError):
        visible.rmdir()
        return True
    return False
