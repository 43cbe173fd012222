"""Where the plugin finds the host, and where it keeps its own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

ADMIN_DIRECTORY: Final = "freeflow-admin"
ADMIN_SOCKET: Final = f"{ADMIN_DIRECTORY}/admin.sock"


@dataclass(frozen=True, slots=True)
class HostPaths:
    """Paths as the plugin sees them.

    `host_run` is the host's /run, `host_bin` a directory in the host's PATH (None: no command is
    installed), `state` the plugin's own storage, `swarm` the engine's Swarm directory.
    """

    host_run: Path
    host_bin: Path | None
    state: Path
    swarm: Path | None = None

    @property
    def admin_socket(self) -> Path:
        return self.host_run / ADMIN_SOCKET

    @property
    def sandboxes(self) -> Path:
        return self.host_run / "docker/netns"

    @property
    def engine_socket(self) -> Path:
        return self.host_run / "docker.sock"
