"""Listening unix sockets, made before the rest of the plugin is imported.

So this module imports only the standard library.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

BACKLOG: Final = 128


def listen(path: Path, mode: int = 0o600) -> socket.socket:
    """A listening unix socket at `path`; a stale one is replaced.

    Raises:
        OSError: the directory doesn't exist.
    """
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~mode)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(BACKLOG)
    return listener
