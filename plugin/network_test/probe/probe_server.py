"""A probe: servers for data, and a control connection by which the gateway asks it to do things."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from plugin.network_test.probe import measurements, path_worker, spoof
from plugin.network_test.probe.data_server import DataServer, accept_all, listen
from plugin.network_test.probe.own_interfaces import interfaces
from plugin.network_test.probe.probe_wire import (
    CONTROL,
    DATA,
    IDENTITY,
    ProbeConnection,
)

SILENCE = 300.0
"""Seconds without a request after which a probe ends: nobody will ask any more."""


class ProbeServer:
    """Answers the gateway's requests; the calls are its methods with the name `call_…`."""

    def __init__(self, key: bytes, name: str) -> None:
        self._key = key
        self._name = name
        self._data = DataServer(DATA, key)
        self._worker: subprocess.Popen[bytes] | None = None
        self._verbs: subprocess.Popen[bytes] | None = None
        self._heard = time.monotonic()

    def run(self) -> None:
        """Serve until nobody has asked for long."""
        self._data.start()
        if Path(path_worker.LIBRARY).exists():
            self._worker = path_worker.start("server", None)
        for port, serve in ((CONTROL, self._control), (IDENTITY, self._identify)):
            server = listen(port, socket.AF_INET)
            threading.Thread(target=accept_all, args=(server, serve), daemon=True).start()
        while time.monotonic() < self._heard + SILENCE:
            time.sleep(1)

    def _identify(self, connection: socket.socket) -> None:
        connection.sendall(f"{self._name}\n".encode())

    def _control(self, connection: socket.socket) -> None:
        asked = ProbeConnection(connection, self._key, asks=False)
        question = asked.receive()
        self._heard = time.monotonic()
        try:
            answer = {"value": self._answer(question["call"], question["arguments"])}
        except Exception as error:
            # The gateway reports it.
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        self._heard = time.monotonic()
        asked.send(answer)

    def _answer(self, call: str, arguments: dict[str, Any]) -> Any:
        return getattr(self, f"call_{call}")(**arguments)

    def call_hello(self) -> dict[str, Any]:
        worker = self._worker
        return {
            "name": self._name,
            "interfaces": interfaces(),
            "library": worker is not None and worker.poll() is None,
            "verbs": all(Path(each).exists() for each in path_worker.VERBS),
            "python": sys.version.partition(" ")[0],
        }

    def call_resolve(self, names: list[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in names:
            try:
                found[name] = measurements.resolve(name)
            except OSError as error:
                found[name] = str(error)
        return found

    def call_identities(self, to: str, count: int, seconds: float, enough: int) -> Any:
        return measurements.identities(to, count, seconds, enough)

    def call_transfer(self, to: str, count: int, seconds: float) -> Any:
        return measurements.transfer(self._key, to, DATA, count, seconds)

    def call_throughput(self, to: str, seconds: float) -> Any:
        return measurements.throughput(self._key, to, DATA, seconds)

    def call_round_trips(self, to: str, count: int, seconds: float) -> Any:
        return measurements.round_trips(self._key, to, DATA, count, seconds)

    def call_datagrams(self, to: str, sizes: list[int]) -> Any:
        return measurements.datagrams(self._key, to, DATA, sizes)

    def call_mtu_edges(self, to: str) -> Any:
        return measurements.mtu_edges(self._key, to, DATA)

    def call_send_as(
        self, own: str, source: str, source_mac: str, to: str, to_mac: str, mark: str
    ) -> None:
        spoof.send_as(self._key, own, source, source_mac, to, to_mac, mark)

    def call_noted(self, mark: str) -> list[str]:
        return self._data.noted(mark)

    def call_verbs(self, own: str, call: str, **arguments: Any) -> Any:
        """`open` makes a queue pair in a process of its own; other calls are for that one."""
        if call == "open":
            self._end_verbs()
            self._verbs = path_worker.start("verbs", own, verbs=True)
        worker = self._verbs
        if worker is None or worker.stdin is None or worker.stdout is None:
            raise OSError("there is no queue pair")
        worker.stdin.write(json.dumps({"call": call, **arguments}).encode() + b"\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            said = worker.communicate()[1].decode(errors="replace").strip()[-300:]
            raise OSError(f"the process with verbs has ended: {said}")
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(answer["error"])
        return answer["value"]

    def _end_verbs(self) -> None:
        if self._verbs is not None:
            self._verbs.kill()
            self._verbs.communicate()

    def call_move(self, to: str, connections: int, seconds: float, count: int) -> Any:
        question = {"to": to, "connections": connections, "seconds": seconds, "count": count}
        return path_worker.run("client", question, seconds + 60)


def main() -> None:
    """Process 1 of a container of the services."""
    # Process 1 gets no signal that it does not handle.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    key = bytes.fromhex(os.environ["FREEFLOW_TEST_KEY"])
    ProbeServer(key, os.environ["FREEFLOW_TEST_NAME"]).run()
