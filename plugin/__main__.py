"""The plugin's entry: listen first, then load everything else.

Docker dials the socket half a second after the start, then every three seconds, and disables a plugin that isn't there by
9.5 s without a word. A listening socket queues what comes while the rest is imported.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Final

SOCKET: Final = Path("/run/docker/plugins/freeflow.sock")
HOST_RUN: Final = Path("/host/run")
HOST_BIN: Final = Path("/host/bin")
STATE: Final = Path("/state")
BACKLOG: Final = 128


def listen(path: Path, mode: int = 0o600) -> socket.socket:
    """A listening unix socket at `path`, in place of a stale one. OSError if the directory isn't there."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~mode)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(BACKLOG)
    return listener


def main() -> int:
    try:
        listener = listen(SOCKET)
    except OSError as error:
        print(f"FreeFlow can't listen on {SOCKET}: {error}; is this run by Docker as a plugin?")
        return 1
    from plugin.server import Paths, serve

    paths = Paths(host_run=HOST_RUN, host_bin=HOST_BIN, state=STATE)
    serve(listener, paths, dict(os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main())
