"""The identity of a host towards other hosts: a certificate, and the TLS contexts made from it.

The private key stays in memory. OpenSSL reads keys from files only, so it gets anonymous ones
(memfd).
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from dataplane.errors import NoIdentity

PROTOCOL: Final = "freeflow/1"
"""ALPN name. It keeps apart connections that another service makes with the same certificates."""


@dataclass(frozen=True, slots=True)
class Certified:
    """The owner of a certificate that was verified."""

    node: str
    cluster: str
    role: str
    expires: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """What is needed to open and to accept sessions."""

    own: Certified
    roles: frozenset[str]
    """Roles that a peer may have."""
    server: ssl.SSLContext
    client: ssl.SSLContext

    def check(self, peer: Certified) -> None:
        """Check that a peer, whose certificate our root has signed, may have a session.

        Raises:
            NoIdentity: it may not.
        """
        if peer.cluster != self.own.cluster:
            raise NoIdentity("the peer is of another Swarm")
        if peer.role not in self.roles:
            raise NoIdentity(
                f"the peer's certificate is for {peer.role!r}, not {' or '.join(sorted(self.roles))}"
            )
        if peer.node == self.own.node:
            raise NoIdentity("the peer has this host's own certificate")


def make(root: str, certificate: str, key: str, roles: frozenset[str]) -> Identity:
    """An identity of PEM texts, whose handshake with itself succeeds.

    Raises:
        ValueError, OSError: the handshake fails.
    """
    server = _context(ssl.PROTOCOL_TLS_SERVER, root, certificate, key)
    client = _context(ssl.PROTOCOL_TLS_CLIENT, root, certificate, key)
    return Identity(_shake_hands(server, client), roles, server, client)


def certified(peer: Mapping[str, object] | None) -> Certified:
    """The owner of a peer's certificate, from `SSLObject.getpeercert()`.

    Raises:
        ValueError: it isn't the certificate of a node.
    """
    names: dict[str, list[str]] = {}
    subject = (peer or {}).get("subject", ())
    assert isinstance(subject, tuple)
    for parts in subject:
        for name, value in parts:
            names.setdefault(name, []).append(value)
    once = [
        names.get(name, []) for name in ("commonName", "organizationName", "organizationalUnitName")
    ]
    if peer is None or any(len(values) != 1 for values in once):
        raise ValueError("the certificate doesn't name one node, one role and one Swarm")
    (node,), (cluster,), (role,) = once
    if not re.fullmatch(r"[0-9a-z]{1,64}", node):
        raise ValueError(f"the certificate's node {node[:64]!r} is no node ID")
    return Certified(node, cluster, role, ssl.cert_time_to_seconds(str(peer["notAfter"])))


def _context(protocol: int, root: str, certificate: str, key: str) -> ssl.SSLContext:
    made = ssl.SSLContext(protocol)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    # As the engine does: each certificate in the root's file is trusted, self-signed or not.
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # A resumed session would bypass the check of the certificate.
    made.options |= ssl.OP_NO_TICKET
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        made.num_tickets = 0
    made.set_alpn_protocols([PROTOCOL])
    made.load_verify_locations(cadata=root)
    files = [_anonymous(certificate), _anonymous(key)]
    try:
        paths = [f"/proc/self/fd/{file}" for file in files]
        # Without it OpenSSL would ask for the password of an encrypted key on a terminal.
        made.load_cert_chain(paths[0], paths[1], password=lambda: b"")
    finally:
        for file in files:
            os.close(file)
    return made


def _anonymous(text: str) -> int:
    file = os.memfd_create("freeflow", os.MFD_CLOEXEC)
    data = text.encode("ascii", "replace")
    while data:
        data = data[os.write(file, data) :]
    return file


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> Certified:
    """Shake hands with itself: key, certificate and roots fit together. The certificate's owner."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    for _ in range(8):
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
        if not waiting:
            return certified(ends[0].getpeercert())
    raise ValueError("a handshake with itself does not finish")
