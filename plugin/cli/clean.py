"""`freeflow cleanup`: removes everything of FreeFlow from this host, unless it is in use."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from driver.kernel import shared_dir
from driver.kernel.linux import LinuxKernel
from driver.store import FILE
from plugin import host_command
from plugin.cli.client import Client, InUse, NotRunning, host_run
from plugin.host_paths import ADMIN_DIRECTORY

STATE: Final = Path("/state")
HOST_BINS: Final = (Path("/host/bin"), Path("/usr/local/bin"))


def in_use(client: Client) -> list[str]:
    """Names of this host's containers on FreeFlow networks, from the plugin or else the engine."""
    try:
        status = client.status()
    except NotRunning:
        used = []
        for item in client.engine.get("/containers/json"):
            attached = (item.get("NetworkSettings") or {}).get("Networks") or {}
            for network in attached.values():
                found = client.engine.get(f"/networks/{network['NetworkID']}")
                if str(found.get("Driver", "")).startswith("freeflow"):
                    used.append(str((item.get("Names") or ["?"])[0]).lstrip("/"))
        return sorted(set(used))
    return sorted(
        endpoint.container or endpoint.id[:12]
        for network in status.networks
        for endpoint in network.endpoints
    )


def clean(client: Client, *, everything: bool, force: bool) -> list[str]:
    """Remove what FreeFlow has made; returns the names of what was removed.

    Raises:
        InUse: containers use it; nothing was removed.
    """
    if not force:
        used = in_use(client)
        if used:
            raise InUse(
                "containers of this host use FreeFlow networks",
                cause=", ".join(used[:10]),
                remedy="stop them, or freeflow cleanup --force",
            )
    run = host_run()
    removed = LinuxKernel(run).cleanup()
    if everything:
        if shared_dir.remove(run):
            removed.append("/run/freeflow")
        directory = run / ADMIN_DIRECTORY
        if directory.exists():
            shutil.rmtree(directory, ignore_errors=True)
            removed.append(f"/run/{directory.name}")
        for state in STATE.glob(FILE + "*") if STATE.is_dir() else ():
            state.unlink(missing_ok=True)
            removed.append(f"state {state.name}")
        for directory in HOST_BINS:
            if host_command.remove(directory):
                removed.append("/usr/local/bin/freeflow")
    return removed
