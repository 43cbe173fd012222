"""Listening unix sockets at well-known paths.

A socket is bound at a temporary path and then renamed, so that it replaces the one of an earlier
router at once. When it closes, its path is removed only if no other router has replaced it.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from dataplane.router.arena_memory import refuse_rights


class BoundSocket:
    """A listening unix socket at a path.

    With `guard` it refuses descriptors, if the kernel can do that; `guarded` says whether it does.
    """

    def __init__(
        self, path: Path, kind: int, mode: int, backlog: int, *, guard: bool = True
    ) -> None:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        self._path = path
        self.socket = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
        # Before anybody can connect: accepted sockets inherit the option.
        self.guarded = guard and refuse_rights(self.socket)
        self.socket.bind(str(beside))
        beside.chmod(mode)
        self.socket.listen(backlog)
        self._inode = beside.stat().st_ino
        beside.rename(path)

    def close(self) -> None:
        """Stop listening, and remove the path unless it was replaced."""
        self.remove()
        self.socket.close()

    def remove(self) -> None:
        """Remove the path unless it was replaced."""
        try:
            if self._path.lstat().st_ino == self._inode:
                self._path.unlink()
        except FileNotFoundError:
            return
