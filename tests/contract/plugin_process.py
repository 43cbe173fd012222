"""The plugin as Docker starts it, with other directories: `python -m … DIRECTORY PARENT`.

Its network and mount namespaces are new, so its objects disappear with them. They contain a shared
/run, an underlay with an MTU of 1500 bytes, and nothing else: no engine, no Swarm. Settings are the
environment, as with Docker.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute

from driver.kernel.namespace import CLONE_NEWNET, check, libc
from plugin.listening import listen

CLONE_NEWNS: Final = 0x00020000
PR_SET_PDEATHSIG: Final = 1
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MS_SHARED: Final = 1 << 20
UNDERLAY: Final = "under0"
UNDERLAY_MTU: Final = 1500
ADDRESS: Final = "192.0.2.10"


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    result = libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None
    )
    check(result, f"mounting {target}")


def machine(run: Path) -> None:
    """Move this process into new namespaces, with `run` as /run."""
    check(libc.unshare(CLONE_NEWNET | CLONE_NEWNS), "making namespaces")
    _mount("none", "/", "none", MS_REC | MS_PRIVATE)
    _mount("tmpfs", str(run), "tmpfs", 0)
    _mount("none", str(run), "none", MS_SHARED)
    with IPRoute() as route:
        route.link("set", index=1, state="up")
        route.link("add", ifname=UNDERLAY, kind="veth", peer="switch", mtu=UNDERLAY_MTU)
        for name in (UNDERLAY, "switch"):
            route.link("set", index=route.link_lookup(ifname=name)[0], state="up")
        index = route.link_lookup(ifname=UNDERLAY)[0]
        route.addr("add", index=index, address=ADDRESS, prefixlen=24)
        route.route("add", dst="default", gateway="192.0.2.1")


def main(directory: Path, parent: int) -> None:
    # However the tests end, nothing stays, because the worker ends with its parent.
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "ending with the tests")
    if os.getppid() != parent:
        return
    run = directory / "run"
    run.mkdir()
    machine(run)
    listener = listen(directory / "freeflow.sock")
    from plugin.host_paths import HostPaths
    from plugin.server import serve

    environment = {name: value for name, value in os.environ.items() if name != "PATH"}
    serve(listener, HostPaths(host_run=run, host_bin=None, state=directory / "state"), environment)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
