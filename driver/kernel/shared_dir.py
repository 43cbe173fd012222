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
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from driver.errors import reporting
from driver.kernel.mounts import BIND, NODEV, NOSUID, RDONLY, REMOUNT, detach, mount, options_at

VISIBLE: Final = Path("freeflow")
"""Below the host's /run, as is the next."""
WRITABLE: Final = Path("freeflow-admin/public")

_MOVED: Final = "taken-away-"


def make(host_run: Path) -> Path:
    """Make the folder unless it exists; returns the writable path of its content.

    Raises:
        KernelError: it can't be made.
    """
    host_run = host_run.resolve()
    visible, writable = host_run / VISIBLE, host_run / WRITABLE
    with reporting(f"{visible} can't be made", remedy="check that the plugin has CAP_SYS_ADMIN"):
        for folder in (writable, visible):
            folder.mkdir(parents=True, exist_ok=True)
        writable.parent.chmod(0o700)
        writable.chmod(0o755)
        if "ro" in options_at(visible) and visible.samefile(writable):
            return writable
        _uncover(visible)
        _move_away(visible, writable.parent)
        visible.mkdir()
        visible.chmod(0o755)
        # Made read-only at another path first: a later remount would not propagate to the host.
        with tempfile.TemporaryDirectory(prefix="freeflow-") as text:
            private = Path(text)
            mount(writable, private, BIND)
            try:
                mount(private, private, BIND | REMOUNT | RDONLY | NOSUID | NODEV)
                mount(private, visible, BIND)
            finally:
                detach(private)
    return writable


def _uncover(folder: Path) -> None:
    """Unmount all that is mounted at a folder."""
    while options_at(folder) and detach(folder):
        pass


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
    _uncover(visible)
    # Other mount namespaces have copies; removing the folder unmounts all (unlink(2)).
    with contextlib.suppress(OSError):
        visible.rmdir()
        return True
    return False
