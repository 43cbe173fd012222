"""What the measurements stand on: hosts of a Swarm with the plugin installed and the bench's image loaded.

The rest of `bench` sees only `Host`; how hosts are made is the test bed's.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from bench.engine import Engine

PLUGIN: Final = "freeflow:latest"
LABEL: Final = "freeflow.bench"


@dataclass(frozen=True, slots=True)
class Host:
    """A Docker host: `pid` is a process in its namespaces, `address` its own on the underlay."""

    name: str
    pid: int
    address: IPv4Address
    engine: Engine

    @property
    def root(self) -> Path:
        """Its file system, seen from here."""
        return Path("/proc", str(self.pid), "root")
