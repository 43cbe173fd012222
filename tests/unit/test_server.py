"""Start-up: the socket listens before anything heavy is loaded. The process itself is in
`tests/contract`.
"""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from plugin.host_paths import ADMIN_SOCKET, HostPaths
from plugin.listening import BACKLOG, listen
from plugin.server import THREADS
from testbed.patience import patience

TOP = Path(__file__).parents[2]


def _loaded(module: str) -> set[str]:
    """The modules that importing this one loads, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sys.modules, sep='\\n')"],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_nothing_heavy_before_listening() -> None:
    """The entry loads nothing but the standard library before it listens: Docker gives up on a
    plugin that is late.
    """
    loaded = {name.partition(".")[0] for name in _loaded("plugin.__main__")}
    ours = {name for name in _loaded("plugin.__main__") if name.startswith(("plugin", "driver"))}
    few = {
        "driver",
        "driver.errors",
        "driver.kernel",
        "driver.kernel.mounts",
        "driver.kernel.namespace",
        "driver.kernel.shared_dir",
    }
    assert ours == few | {"plugin", "plugin.__main__", "plugin.library_file", "plugin.listening"}
    assert not loaded & {"flask", "gunicorn", "pyroute2", "docker", "msgspec", "structlog"}


@pytest.mark.parametrize(
    "module",
    ["plugin.server", "plugin.composition", "plugin.cli.commands", "driver.engine", "driver.sync"],
)
def test_nothing_happens_at_import(module: str) -> None:
    """Importing any part starts no thread and opens no socket."""
    script = (
        "import os, sys, threading\n"
        f"import {module}\n"
        "links = [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')\n"
        "         if os.path.lexists(f'/proc/self/fd/{n}')]\n"
        "print(threading.active_count(), sum(link.startswith('socket:') for link in links))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout.split() == ["1", "0"]


def test_connections_queue_up(tmp_path: Path) -> None:
    """As soon as it listens, connections are accepted, though nothing answers yet."""
    path = tmp_path / "plugin.sock"
    listener = listen(path)
    callers = [socket.socket(socket.AF_UNIX) for _ in range(min(BACKLOG, 50))]
    try:
        for caller in callers:
            caller.settimeout(patience(1))
            caller.connect(str(path))
            caller.sendall(b"POST / HTTP/1.1\r\n\r\n")
        first, _ = listener.accept()
        assert first.recv(4) == b"POST"
        first.close()
    finally:
        for each in (*callers, listener):
            each.close()


def test_only_root_may_connect(tmp_path: Path) -> None:
    """Only the owner can open the socket, from its first moment on."""
    path = tmp_path / "plugin.sock"
    with listen(path):
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600


def test_stale_socket(tmp_path: Path) -> None:
    """A socket or file that an earlier process left at the path is replaced."""
    path = tmp_path / "plugin.sock"
    listen(path).close()
    with listen(path):
        assert path.is_socket()
    path.unlink()
    path.write_text("not a socket")
    with listen(path):
        assert path.is_socket()


def test_no_directory(tmp_path: Path) -> None:
    """Without Docker's directory listening fails."""
    with pytest.raises(OSError, match="No such file"):
        listen(tmp_path / "none/plugin.sock")


def test_paths_are_below_the_hosts_run() -> None:
    """The host is seen below one mount point."""
    paths = HostPaths(Path("/host/run"), None, Path("/state"))
    assert paths.admin_socket == Path("/host/run") / ADMIN_SOCKET
    assert paths.sandboxes == Path("/host/run/docker/netns")
    assert paths.engine_socket == Path("/host/run/docker.sock")


def test_enough_threads() -> None:
    """Sixteen requests are served at once: joins of different containers are parallel."""
    assert THREADS >= 16
