"""The plugin's entry: make the containers' folder, listen, then load everything else.

Docker connects to the socket half a second after the start, then every three seconds, and silently
disables a plugin that doesn't listen by 9.5 s. A listening socket queues requests while the rest is
imported.

The folder is made first: as soon as the plugin listens, dockerd starts containers, and one that
mounts the folder with `-v` before it exists would get it writable.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Final

from driver.errors import FreeFlowError
from driver.kernel import shared_dir
from plugin import library_file
from plugin.listening import listen

SOCKET: Final = Path("/run/docker/plugins/freeflow.sock")
HOST_RUN: Final = Path("/host/run")
HOST_BIN: Final = Path("/host/bin")
STATE: Final = Path("/state")
SWARM: Final = Path("/host/swarm")


def main() -> int:
    if HOST_RUN.is_dir():
        # `composition.compose` tries again, and reports the error.
        with contextlib.suppress(FreeFlowError, OSError):
            library_file.place(shared_dir.make(HOST_RUN), quietly=True)
    try:
        listener = listen(SOCKET)
    except OSError as error:
        print(f"FreeFlow can't listen on {SOCKET}: {error}; was it started by Docker as a plugin?")
        return 1
    from plugin.host_paths import HostPaths
    from plugin.server import serve

    paths = HostPaths(host_run=HOST_RUN, host_bin=HOST_BIN, state=STATE, swarm=SWARM)
    serve(listener, paths, dict(os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main())
