"""The container through which `freeflow test` speaks to the probes: lines in, lines out.

It reaches them by the network under test, because nothing else leads to containers of other hosts.
It ends when its standard input does, so it does not outlive the command.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from typing import Any

from plugin.network_test.probe.probe_wire import CONTROL, ProbeConnection, ProofError

_writing = threading.Lock()


def _say(value: dict[str, Any]) -> None:
    with _writing:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()


def _ask(key: bytes, to: str, question: dict[str, Any], seconds: float) -> dict[str, Any]:
    connecting = min(seconds, 5.0)
    with socket.create_connection((to, CONTROL), timeout=connecting) as connection:
        # The probe answers when it is done.
        connection.settimeout(seconds)
        asked = ProbeConnection(connection, key, asks=True)
        asked.send(question)
        answer = asked.receive()
    if not isinstance(answer, dict):
        raise ProofError("an answer of another kind")
    return answer


def _serve(key: bytes, line: str) -> None:
    request = json.loads(line)
    question = {"call": request["call"], "arguments": request["arguments"]}
    try:
        answer = _ask(key, request["to"], question, request["seconds"])
        _say({"id": request["id"], **answer})
    except (OSError, ProofError, ValueError) as error:
        _say({"id": request["id"], "unreachable": str(error)[:500] or type(error).__name__})


def main() -> None:
    """Process 1 of the gateway's container."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    key = bytes.fromhex(os.environ["FREEFLOW_TEST_KEY"])
    _say({"ready": True})
    for line in sys.stdin:
        threading.Thread(target=_serve, args=(key, line), daemon=True).start()
    os._exit(0)
