"""The machine of a measurement, without which its figures mean nothing later."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict


class Machine(TypedDict):
    when: str
    cpu: str
    cores: int
    memory_gib: float
    kernel: str
    system: str
    load: float
    engines: list[str]
    congestion_control: str
    rounds: int
    seconds: float | None
    """None: each suite's default."""
    absent: dict[str, str]
    """Subject to the reason why it was not measured."""


def cpu_model(cpuinfo: str) -> str:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def describe(
    engines: Iterable[str], congestion_control: str, rounds: int, seconds: float | None
) -> Machine:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=cpu_model(Path("/proc/cpuinfo").read_text()),
        cores=os.cpu_count() or 1,
        memory_gib=round(memory / 2**30, 1),
        kernel=platform.release(),
        system=platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        load=os.getloadavg()[0],
        engines=sorted(set(engines)),
        congestion_control=congestion_control,
        rounds=rounds,
        seconds=seconds,
        absent={},
    )
