"""The plugin's entry: make the containers' folder, listen, then load everything else.

Docker dials the socket half a second after the start, then every three seconds, and disables a plugin that isn't there by
9.5 s without a word. A listening socket queues what comes while the rest is imported.

The folder comes before it: once the plugin can be dialled dockerd goes on, and starts containers. One that mounts the
folder with `-v` before it is there would get it writable.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Final

from driver.errors import FreeFlowError
from driver.kernel import shared_dir
from plugin import library
from plugin.listening import listen

SOCKET: Final = Path("/run/docker/plugins/freeflow.sock")
HOST_RUN: Final = Path("/host/run")
HOST_BIN: Final = Path("/host/bin")
STATE: Final = Path("/state")
SWARM: Final = Path("/host/swarm")


def main() -> int:
    if HOST_RUN.is_dir():
        # What fails here is tried again by `composition.compose`, which says why.
        with contextlib.suppress(FreeFlowError, OSError):
            library.place(shared_dir.make(HOST_RUN), quietly=True)
    try:
        listener = listen(SOCKET)
    except OSError as error:
        print(f"FreeFlow can't listen on {SOCKET}: {error}; is this run by Docker as a plugin?")
        return 1
    from plugin.host_paths import HostPaths
    from plugin.server import serve

    paths = HostPaths(host_run=HOST_RUN, host_bin=HOST_BIN, state=STATE, swarm=SWARM)
    serve(listener, paths, dict(os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main())
