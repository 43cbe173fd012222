"""TLS in memory: takes bytes of the network, gives bytes of the peer, and the reverse.

TLS works on memory and not on the socket: a Python socket with TLS falls back to one without TLS
when the connection is lost at the wrong moment. It would then return bytes of the network as if an
authenticated peer had sent them.
"""

from __future__ import annotations

import ssl
import struct
from typing import Final

from dataplane.errors import NoIdentity, WrongMessage
from dataplane.router.node_identity import PROTOCOL, Certified, certified

_RECORD: Final = struct.Struct("!3xH")
"""The head of TLSPlaintext: type and version, length (RFC 8446, 5.1)."""
_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_MOST_RECORD: Final = 1 << 14
# OpenSSL's names of alerts that the peer sends, in words that say whose fault it is.
_ALERTS: Final = {
    "CERTIFICATE_REQUIRED": "the peer wants a certificate",
    "UNKNOWN_CA": "the peer doesn't trust this host's certificate: is it in the same Swarm?",
    "CERTIFICATE_EXPIRED": "the peer takes this host's certificate for expired: compare the clocks",
    "BAD_CERTIFICATE": "the peer doesn't take this host's certificate",
}


class TlsStream:
    """One TLS connection. All methods may raise `ssl.SSLError`."""

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)

    def feed(self, data: bytes) -> None:
        """Bytes have come from the network."""
        self._incoming.write(data)

    def take(self) -> bytes:
        """The bytes that are to be sent to the network."""
        return self._outgoing.read()

    def shake_hands(self) -> bool:
        """Go on with the handshake; false if it needs more bytes of the peer."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def peer(self) -> Certified:
        """The owner of the peer's certificate, after the handshake.

        Raises:
            WrongMessage: the peer is another service.
            NoIdentity: the certificate isn't one of a node.
        """
        if self._tls.selected_alpn_protocol() != PROTOCOL:
            raise WrongMessage(f"it speaks another protocol than {PROTOCOL}")
        try:
            return certified(self._tls.getpeercert())
        except ValueError as error:
            raise NoIdentity(str(error)) from error

    def write(self, data: bytes) -> None:
        """Encrypt bytes for the peer."""
        self._tls.write(data)

    def read(self, most: int) -> bytes | None:
        """Bytes of the peer. None: no more have come; empty: the peer has closed the connection."""
        try:
            return self._tls.read(most)
        except ssl.SSLWantReadError:
            return None


def has_client_hello(data: bytearray) -> bool:
    """Whether the record with the start of a handshake is complete (RFC 8446, 5.1).

    Raises:
        WrongMessage: the bytes are something else.
    """
    if data[0] != _HANDSHAKE or (len(data) > _RECORD.size and data[_RECORD.size] != _CLIENT_HELLO):
        raise WrongMessage("it doesn't begin with a ClientHello of TLS")
    if len(data) < _RECORD.size:
        return False
    (length,) = _RECORD.unpack_from(data)
    if length > _MOST_RECORD:
        raise WrongMessage("its first record is longer than TLS allows")
    return len(data) >= _RECORD.size + int(length)


def describe(error: Exception) -> str:
    """An error of OpenSSL without the line numbers of its source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is invalid: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        name = error.reason or ""
        for alert, text in _ALERTS.items():
            if name.endswith(f"ALERT_{alert}"):
                return text
        return f"TLS failed: {name.lower().replace('_', ' ') or 'OpenSSL gives no reason'}"
    return str(error)
