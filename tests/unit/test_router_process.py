"""The router's process runs as long as the plugin does, whatever happens to it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from os import kill
from pathlib import Path

from plugin.router_process import CHECKS, RouterProcess, router_command, router_settings
from plugin.settings import Settings
from testbed.patience import patience

SLEEPER = [sys.executable, "-c", "import sys; sys.stdin.read()"]


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patience(10)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_is_started_again() -> None:
    """A router that dies is restarted, and the driver is told of each start."""
    heard = threading.Semaphore(0)
    process = RouterProcess(SLEEPER, lambda: heard.release())
    process.start()
    try:
        assert heard.acquire(timeout=patience(10))
        first = process.pid
        assert first is not None
        kill(first, signal.SIGKILL)
        assert heard.acquire(timeout=patience(10))
        _until(lambda: process.pid not in (None, first))
        assert process.starts == 2
    finally:
        process.stop()
    assert process.pid is None


def test_one_that_does_not_answer() -> None:
    """A router that is stopped, or hangs, is killed and restarted; one that answers is not."""
    stuck = threading.Event()
    process = RouterProcess(SLEEPER, lambda: None, answers=lambda: not stuck.is_set(), pause=0.01)
    process.start()
    try:
        _until(lambda: process.pid is not None)
        time.sleep(0.3)
        first = process.pid
        assert process.starts == 1
        assert first is not None
        kill(first, signal.SIGSTOP)
        stuck.set()
        _until(lambda: process.starts == 2)
        stuck.clear()
        _until(lambda: process.pid not in (None, first))
    finally:
        process.stop()


def test_a_slow_start_is_waited_for() -> None:
    """A router that has not answered yet gets more time than one that has stopped answering."""
    asked = 0

    def answers() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2 * CHECKS

    process = RouterProcess(SLEEPER, lambda: None, answers=answers, pause=0.01)
    process.start()
    try:
        _until(lambda: asked > 3 * CHECKS)
        assert process.starts == 1
    finally:
        process.stop()


def test_one_that_never_lasts_is_not_started_all_the_time() -> None:
    """The pause between starts grows as long as they fail at once."""
    process = RouterProcess([sys.executable, "-c", "raise SystemExit(1)"], lambda: None)
    process.start()
    time.sleep(1.5)
    process.stop()
    assert 1 <= process.starts <= 4


def test_one_that_cannot_be_started() -> None:
    """A missing program is logged, and the plugin goes on."""
    process = RouterProcess(["/nonexistent"], lambda: None)
    process.start()
    time.sleep(0.2)
    process.stop()
    assert process.starts == 0


def test_it_ends_when_its_starter_is_gone() -> None:
    """The router ends when the other end of its standard input is closed."""
    process = RouterProcess(SLEEPER, lambda: None)
    process.start()
    _until(lambda: process.pid is not None)
    started = process._process
    assert started is not None
    assert started.stdin is not None
    started.stdin.close()
    _until(lambda: started.poll() is not None)
    process.stop()


def test_settings_reach_the_router() -> None:
    """Each router setting of the plugin changes exactly its field in the router's settings."""
    changed = {
        "acceleration": "off",
        "upgrade_operations": 9,
        "upgrade_age": 9,
        "upgrade_bytes": 9,
        "upgrade_bulk": 9,
        "spin": 9,
        "ring_limit": 9000,
        "shm_limit": 9,
        "connections_limit": 9,
        "processes_limit": 9,
        "asks_limit": 9,
        "bells_limit": 9,
        "rdma": "off",
        "vxlan_port": 9,
        "session_key": "k",
        "remote_ring": 65536,
        "remote_memory": 9,
        "relay": "off",
        "relay_ring": 65536,
        "relay_encryption": "all",
        "verbs": "off",
        "verbs_qps": 9,
        "verbs_memory": 1 << 20,
    }
    usual = router_settings(Settings())
    seen = {
        router_settings(Settings(**{name: value}))  # type: ignore[arg-type]
        for name, value in changed.items()
    }
    assert len(seen) == len(changed)
    assert usual not in seen
    assert router_settings(Settings(session_port=9, vxlan_port=8)).session_port == 9
    # Networks of one host alone have no peers.
    assert not router_settings(Settings(scope="local")).rdma
    assert not router_settings(Settings(scope="local")).relay


def test_command() -> None:
    """The router is started with two sockets: the containers' and the plugin's."""
    command = router_command(Path("/host/run"), Path("/public"), "info")
    assert "--socket=/public/router.sock" in command
    assert "--control=/host/run/freeflow-admin/router.sock" in command
    assert "--watch-stdin" in command
