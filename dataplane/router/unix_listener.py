"""Unix sockets at well-known paths: bound beside and moved into place, so that there is never none, nor two.

What a dead router left is replaced; on leaving only what is still ours is removed.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from dataplane.router.arena_memory import refuse_rights


class BoundSocket:
    """A listening unix socket at a path. With `guard` it refuses descriptors, if the kernel can: `guarded`."""

    def __init__(
        self, path: Path, kind: int, mode: int, backlog: int, *, guard: bool = True
    ) -> None:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        self._path = path
        self.socket = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
        # Before anybody can connect: accepted sockets inherit it.
        self.guarded = guard and refuse_rights(self.socket)
        self.socket.bind(str(beside))
        beside.chmod(mode)
        self.socket.listen(backlog)
        self._inode = beside.stat().st_ino
        beside.rename(path)

    def close(self) -> None:
        """Stop listening; the path goes if nobody has replaced it."""
        self.remove()
        self.socket.close()

    def remove(self) -> None:
        """The path goes if nobody has replaced it."""
        try:
            if self._path.lstat().st_ino == self._inode:
                self._path.unlink()
        except FileNotFoundError:
            return
