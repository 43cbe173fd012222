"""The messages between gateway and probe: one line of JSON each, with a proof of the run's key.

Other containers may be on the network. They can neither ask a probe to send anything, nor answer
in its place, nor repeat what it has said: each connection has a number of each side in its proofs.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
from typing import Any

CONTROL = 7610
"""The TCP port of the probe's control connections;"""
DATA = 7611
"""that of its data, TCP and UDP;"""
LIBRARY_DATA = 7612
"""that of its process with the library;"""
IDENTITY = 7613
"""and the one where it says to anybody who it is, and nothing else."""

LONGEST = 1 << 20
"""Bytes of a line."""
_NONCE = 16
_PROOF = 64


class ProofError(Exception):
    """The other side does not know the run's key, or does not speak this protocol."""


def tag(key: bytes, what: str) -> bytes:
    """16 bytes that only those know who have the key."""
    return hmac.new(key, what.encode(), hashlib.sha256).digest()[:16]


class ProbeConnection:
    """One side of a control connection; `asks`: the one that has connected."""

    def __init__(self, connection: socket.socket, key: bytes, *, asks: bool) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")
        self._key = key
        own = os.urandom(_NONCE)
        connection.sendall(own)
        other = self._file.read(_NONCE)
        if len(other) != _NONCE or other == own:
            raise ProofError("the other side has said nothing")
        self._session = own + other if asks else other + own
        self._directions = (b">", b"<") if asks else (b"<", b">")
        self._sent = self._received = 0

    def _proof(self, direction: bytes, number: int, text: bytes) -> bytes:
        said = self._session + direction + str(number).encode() + b" " + text
        return hmac.new(self._key, said, hashlib.sha256).hexdigest().encode()

    def send(self, value: Any) -> None:
        """Raises OSError, ValueError (the value is too long)."""
        text = json.dumps(value).encode()
        if len(text) > LONGEST:
            raise ValueError("the message is too long")
        proof = self._proof(self._directions[0], self._sent, text)
        self._sent += 1
        self._connection.sendall(proof + b" " + text + b"\n")

    def receive(self) -> Any:
        """Raises OSError, ProofError."""
        line = self._file.readline(LONGEST + _PROOF + 2)
        proof, _, text = line.rstrip(b"\n").partition(b" ")
        wanted = self._proof(self._directions[1], self._received, text)
        if not line.endswith(b"\n") or not hmac.compare_digest(proof, wanted):
            raise ProofError("a message without proof" if line else "the connection has ended")
        self._received += 1
        return json.loads(text)
