"""Many clients of one server, by queue pairs of types UC and UD: see `herd.c`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from testbed.patience import patience
from tests.dataplane.places import LIBRARY, compile_c
from tests.verbs.conftest import HEADER
from tests.verbs.router import router
from tests.verbs.test_pair import environment, line_of

CLIENTS = int(os.environ.get("HERD_CLIENTS", "10"))
ROUNDS = 200


def tell(process: subprocess.Popen[str], line: str) -> None:
    """Give a process a line."""
    assert process.stdin
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def test_herd(library: Path, tmp_path: Path) -> None:
    """Each client gets each answer."""
    if shutil.which("gcc") is None or not HEADER.exists() or not LIBRARY.exists():
        pytest.skip(f"missing: gcc, {HEADER} (make setup), {LIBRARY} (make library)")
    source = Path(__file__).with_name("herd.c")
    program = compile_c(source, tmp_path / "herd", "-Wl,--no-as-needed", str(library))
    processes: list[subprocess.Popen[str]] = []
    with router(tmp_path) as made:
        try:
            for mode in [["server", str(CLIENTS)], *[["client", str(ROUNDS)]] * CLIENTS]:
                processes.append(
                    subprocess.Popen(
                        [program, *mode],
                        env=environment(library, made.socket),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                )
            server, *clients = processes
            for client in clients:
                tell(client, line_of(server))
                tell(server, line_of(client))
            assert line_of(server) == "ready"
            for client in clients:
                tell(client, "go")
            said = [client.communicate(timeout=patience(60))[0] for client in clients]
            assert said == ["done\n"] * CLIENTS
            server.communicate(timeout=patience(10))
            assert server.returncode == 0
        finally:
            for process in processes:
                process.kill()
                process.communicate()
