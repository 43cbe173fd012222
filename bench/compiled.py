"""Compiles the load programs in `bench/tools`, for loads that Debian has no program for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from bench.namespaces import run

SOURCES: Final = Path(__file__).with_name("tools")
NAMES: Final = ("pingpong", "throughput", "ring", "memload", "processes", "clients", "copies")
CFLAGS: Final = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Werror")


def compile_into(directory: Path) -> None:
    """Compile all of `NAMES` into a directory."""

    def one(name: str) -> None:
        run(["gcc", *CFLAGS, "-o", str(directory / name), str(SOURCES / f"{name}.c")], 120)

    with ThreadPoolExecutor(len(NAMES)) as pool:
        list(pool.map(one, NAMES))


def contents() -> dict[str, bytes]:
    """Name to content of each compiled program."""
    with TemporaryDirectory() as directory:
        compile_into(Path(directory))
        return {name: Path(directory, name).read_bytes() for name in NAMES}
