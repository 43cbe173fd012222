"""Real programs whose threads share an event loop at both ends: every byte is right, and goes
through rings.

Each client sends a stream on several connections and compares the echo; see `programs/loops.*` and
`Loops.java`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Final

import pytest

from tests.dataplane.places import ROOT, SOURCES, Places
from tests.dataplane.test_programs import need, serving

BUILT: Final = ROOT / "build" / "programs"
"""Compilers take longer than the tests, so what they build is kept."""
REGISTRY: Final = Path("/usr/share/cargo/registry")
MANIFEST: Final = """[package]
name = "loops"
version = "0.0.0"
edition = "2021"

[dependencies]
tokio = { version = "1", features = ["rt-multi-thread", "net", "io-util"] }

[profile.dev]
opt-level = 1
debug = false
"""
SOURCE: Final = f"""[source.crates-io]
replace-with = "debian"

[source.debian]
directory = "{REGISTRY}"
"""
DEBIANS: Final = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
"""A tool chain of the user's own would not find the packages of Debian."""


def folder_for(source: Path, *more: str) -> Path:
    """A folder for what is built from a source; another source gets another folder."""
    digest = hashlib.sha256(source.read_bytes() + "".join(more).encode()).hexdigest()[:16]
    folder = BUILT / f"{source.name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def make(command: list[str], made: Path, cwd: Path | None = None) -> None:
    """Build it, unless it is there."""
    if not made.exists():
        done = subprocess.run(command, cwd=cwd, env=DEBIANS, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def asio() -> list[str]:
    need("g++")
    if not Path("/usr/include/asio.hpp").exists():
        pytest.skip("missing: libasio-dev")
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    source = SOURCES / "loops.cpp"
    folder = folder_for(source, *options)
    make(["g++", *options, str(source), "-o", str(folder / "new")], folder / "loops")
    with contextlib.suppress(FileNotFoundError):
        (folder / "new").rename(folder / "loops")
    return [str(folder / "loops")]


@pytest.fixture(scope="session")
def tokio() -> list[str]:
    if not Path("/usr/bin/cargo").exists() or not list(REGISTRY.glob("tokio-1.*")):
        pytest.skip("missing: cargo, librust-tokio-dev")
    source = SOURCES / "loops.rs"
    folder = folder_for(source, MANIFEST, SOURCE)
    for name, text in (("Cargo.toml", MANIFEST), (".cargo/config.toml", SOURCE)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "src").mkdir(exist_ok=True)
    shutil.copy(source, folder / "src" / "main.rs")
    made = folder / "target" / "debug" / "loops"
    make(["/usr/bin/cargo", "build", "--offline", "--quiet"], made, cwd=folder)
    return [str(made)]


@pytest.fixture(scope="session")
def java() -> list[str]:
    need("java", "javac")
    source = SOURCES / "Loops.java"
    folder = folder_for(source)
    make(["javac", "-d", str(folder), str(source)], folder / "Loops.class")
    return ["java", "-Xmx256m", "-cp", str(folder), "Loops"]


@pytest.mark.timeout(200, func_only=True)
@pytest.mark.parametrize(("program", "connections"), [("asio", 16), ("tokio", 16), ("java", 12)])
def test_loops(
    both: Places, program: str, connections: int, request: pytest.FixtureRequest
) -> None:
    """A loop of several threads moves every byte, while its connections move to rings under it."""
    command: list[str] = request.getfixturevalue(program)
    shared: list[int] = []
    for _ in both.attempts(lambda: shared[-1] > 0 and both.has_upgraded(connections)):
        shared.append(loop(both, command))


def loop(both: Places, command: list[str]) -> int:
    """Run both ends. Returns how many of their ends the router listed with a ring at once."""
    port = next(both.ports)
    shared = 0
    with serving(both, [*command, "server", both.address, str(port)], port):
        client = both.client.popen(
            [*command, "client", both.address, str(port)],
            env=both.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 120
        while client.poll() is None and time.monotonic() < deadline:
            if both.accelerated:
                listed = both.made.router.connections().connections
                shared = max(shared, sum(connection.path == "shm" for connection in listed))
            time.sleep(0.05)
        if client.poll() is None:
            client.kill()
        output = client.communicate()[0]
        assert client.returncode == 0, output
    return shared
