"""Starts and supervises the router, a child process of the plugin's worker.

A router that ends is started again, and one that doesn't answer is killed first. It holds the read
end of a pipe whose write end only the worker has, so it ends with the worker, however that ends.
Supervision delays neither the plugin's start nor an answer to Docker.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import structlog

from dataplane.control import Limits, RelayRule, RouterSettings, Rule
from plugin.host_paths import ADMIN_DIRECTORY
from plugin.settings import Settings

log = structlog.get_logger()

PUBLIC: Final = "router.sock"
"""In the folder that containers mount: see `driver/kernel/shared_dir.py`."""
CONTROL: Final = f"{ADMIN_DIRECTORY}/router.sock"
DEVICES: Final = "dev/infiniband"
"""In the plugin, beside the host's /run."""
LEAST_PAUSE: Final = 0.1
MOST_PAUSE: Final = 10.0
"""Seconds between two starts; doubled after each router that ran for less than `LASTS`."""
LASTS: Final = 30.0
CHECKS: Final = 30
"""After so many failed checks in a row the router counts as stuck. Checks, not seconds: a host that
was suspended made none. A stuck router costs new connections their acceleration; a needless kill
costs all connections theirs."""
FIRST_CHECKS: Final = 180
"""The same before its first answer: Python and its modules load slowly on a busy host."""
PAUSE: Final = 1.0
"""Seconds between two checks."""
_END: Final = 3.0
_MESSAGES_PER_ASK: Final = 5


def router_settings(settings: Settings) -> RouterSettings:
    """The router's settings, from the plugin's."""
    return RouterSettings(
        acceleration=settings.acceleration == "on",
        rule=Rule(
            operations=settings.upgrade_operations,
            age=settings.upgrade_age,
            bytes=settings.upgrade_bytes,
            bulk=settings.upgrade_bulk,
            spin=settings.spin,
            ring_limit=settings.ring_limit,
        ),
        limits=Limits(
            processes=settings.processes_limit,
            waiting=settings.connections_limit,
            connections=settings.connections_limit,
            asks=settings.asks_limit,
            messages=settings.asks_limit * _MESSAGES_PER_ASK,
            bells=settings.bells_limit,
            memory=settings.shm_limit,
            queue_pairs=settings.verbs_qps,
            direct_memory=settings.verbs_memory,
        ),
        rdma=settings.rdma == "on" and settings.scope == "global",
        session_port=settings.session_port or settings.vxlan_port,
        session_key=settings.session_key,
        remote_ring=settings.remote_ring,
        remote_memory=settings.remote_memory,
        relay_spin=settings.relay_spin,
        relay_rule=RelayRule(
            busy=settings.relay_busy,
            connections=settings.relay_connections,
            messages=settings.relay_messages,
            bulk=settings.relay_bulk,
            bulk_rate=settings.relay_bulk_rate,
            batch=settings.relay_batch,
            pause=settings.relay_pause,
            pause_most=settings.relay_pause_most,
            cpu=settings.relay_cpu,
        ),
        relay=settings.relay == "on" and settings.scope == "global",
        relay_ring=settings.relay_ring,
        relay_encryption=settings.relay_encryption,
        verbs=settings.verbs == "on",
        zero_copy=settings.verbs_zero_copy == "on",
    )


def router_command(
    host_run: Path, folder: Path, log_level: str, swarm: Path | None = None
) -> list[str]:
    """The router's command line.

    `folder` is where /run/freeflow is written, `swarm` the engine's directory of certificates.
    """
    return [
        sys.executable,
        "-P",
        "-m",
        "dataplane.router",
        f"--socket={folder / PUBLIC}",
        f"--control={host_run / CONTROL}",
        f"--log-level={log_level}",
        *([] if swarm is None else [f"--swarm={swarm}"]),
        f"--devices={host_run.parent / DEVICES}",
        "--watch-stdin",
    ]


class RouterProcess:
    """Keeps a router running.

    `started` is called after each start, in a thread of its own; `answers` checks it.
    """

    def __init__(
        self,
        command: Sequence[str],
        started: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        answers: Callable[[], bool] = lambda: True,
        pause: float = PAUSE,
    ) -> None:
        self._answers = answers
        self._pause = pause
        self._command = list(command)
        self._started = started
        self._clock = clock
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._starts = 0

    @property
    def starts(self) -> int:
        """Number of starts."""
        return self._starts

    @property
    def pid(self) -> int | None:
        """The running router's, None without one."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="router", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the router, and wait until it has ended."""
        self._stopped.set()
        process = self._process
        if process is not None:
            _end(process)
        if self._thread is not None:
            self._thread.join(timeout=_END)

    def _run(self) -> None:
        pause = LEAST_PAUSE
        while not self._stopped.is_set():
            begin = self._clock()
            code = self._once()
            if self._stopped.is_set():
                return
            pause = LEAST_PAUSE if self._clock() - begin > LASTS else min(pause * 2, MOST_PAUSE)
            log.error("the router ended; it will be started again", code=code, seconds=pause)
            self._stopped.wait(pause)

    def _once(self) -> int | None:
        """Start the router and wait for its end; returns its exit code, None without one."""
        try:
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE)
        except OSError as error:
            log.error("the router can't be started", reason=str(error))
            return None
        self._process = process
        self._starts += 1
        if self._stopped.is_set():
            _end(process)
        self._started()
        self._supervise(process)
        try:
            return process.wait(_END)
        except subprocess.TimeoutExpired:
            # It is stuck in the kernel, but holds nothing that the next one needs.
            log.error("the router can't be killed", pid=process.pid)
            return None

    def _supervise(self, process: subprocess.Popen[bytes]) -> None:
        """Return once it has ended, or was killed because it didn't answer."""
        unanswered, limit = 0, FIRST_CHECKS
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return
        try:
            ends = select.poll()
            ends.register(descriptor, select.POLLIN)
            while not ends.poll(self._pause * 1000):
                if self._answers():
                    unanswered, limit = 0, CHECKS
                    continue
                unanswered += 1
                if unanswered >= limit and not self._stopped.is_set():
                    log.error(
                        "the router does not answer; it is killed",
                        pid=process.pid,
                        checks=unanswered,
                    )
                    process.kill()
                    return
        finally:
            os.close(descriptor)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
