"""Who this host is to others of its kind: a node certificate of the Swarm, or one derived from a secret that all hosts share.

The Swarm's files are read again when they change (renewal, another role, another Swarm) and are only taken if a TLS handshake
of the identity with itself succeeds, so a half-written or expired set is never used. The key stays in memory: TLS wants
files, and gets anonymous ones.
"""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from dataplane.errors import NoIdentity

PROTOCOL: Final = "freeflow/1"
"""What TLS calls it (ALPN): a connection meant for another service with the same certificates never gets here, nor from here."""
SWARM_ROLES: Final = frozenset({"swarm-manager", "swarm-worker"})
PATIENCE: Final = 30.0
"""Seconds for which files that don't fit together leave the last identity standing: they are replaced one by one."""
_MOST: Final = 1 << 20
_NAMES: Final = ("swarm-root-ca.crt", "swarm-node.crt", "swarm-node.key")
_BLOCK: Final = re.compile(
    r"-----BEGIN ([A-Z0-9 ]+)-----\s*\n(.*?)-----END \1-----", re.DOTALL | re.ASCII
)
_HELP: Final = "or set SESSION_KEY to one secret on all hosts"


@dataclass(frozen=True, slots=True)
class Certified:
    """What a certificate that was checked says of its owner."""

    node: str
    cluster: str
    role: str
    expires: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """What it takes to open and to accept sessions."""

    own: Certified
    roles: frozenset[str]
    """Those that a peer may have."""
    server: ssl.SSLContext
    client: ssl.SSLContext

    def check(self, peer: Certified) -> None:
        """Whether a peer, whose certificate is signed by our root, is one that we speak with.

        Raises:
            NoIdentity: it isn't.
        """
        if peer.cluster != self.own.cluster:
            raise NoIdentity("the peer is of another Swarm")
        if peer.role not in self.roles:
            raise NoIdentity(
                f"the peer's certificate is for {peer.role!r}, not {' or '.join(sorted(self.roles))}"
            )
        if peer.node == self.own.node:
            raise NoIdentity("the peer has this host's own certificate")


class Identities(Protocol):
    """Where the identity comes from."""

    @property
    def reason(self) -> str:
        """Why there is none; "" if there is one."""

    def look(self) -> Identity | None:
        """The identity now: the same object as long as nothing has changed. Cheap."""


def choose(
    folder: Path | None, secret: str = "", wall: Callable[[], float] = time.time
) -> Identities:
    """A secret goes before the Swarm; `folder` is the engine's folder of the Swarm, if it can be had."""
    if secret:
        # Loaded by those who need it: it is large.
        from dataplane.router import shared_key

        return shared_key.KeyIdentity(secret)
    if folder is None:
        return NoIdentities(f"the Swarm's certificates aren't mounted: mount them, {_HELP}")
    return SwarmIdentity(folder, wall)


@dataclass(frozen=True, slots=True)
class NoIdentities:
    """There is none, and there won't be."""

    reason: str

    def look(self) -> None:
        """See `Identities`."""
        return


class SwarmIdentity:
    """The node's certificate, as the engine keeps it in `certificates` in the Swarm's folder."""

    def __init__(self, folder: Path, wall: Callable[[], float] = time.time) -> None:
        self._folder = folder / "certificates"
        self._wall = wall
        self._seen: object = None
        self._unfit: float | None = None
        self._identity: Identity | None = None
        self._made_of = ""
        self.reason = "not read yet"

    def look(self) -> Identity | None:
        """See `Identities`."""
        seen = [_stamp(self._folder / name) for name in _NAMES]
        if seen != self._seen or self._unfit is not None:
            self._read()
            self._seen = seen
        identity = self._identity
        if identity is not None and self._wall() >= identity.own.expires:
            self._drop(
                "the node's certificate has expired: see whether the engine reaches a manager"
            )
            # The clock may have been wrong.
            self._seen = None
        return self._identity

    def _read(self) -> None:
        try:
            self._identity = self._load()
            self.reason = ""
            self._unfit = None
        except _UnfitError as error:
            now = time.monotonic()
            if self._unfit is None:
                self._unfit = now
            if self._identity is None or now - self._unfit >= PATIENCE:
                self._drop(str(error))
        except NoIdentity as error:
            self._unfit = None
            self._drop(str(error))

    def _drop(self, reason: str) -> None:
        self._identity = None
        self.reason = reason

    def _load(self) -> Identity:
        try:
            root, certificate, key = (_content(self._folder / name) for name in _NAMES)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NoIdentity(
                f"this host has no certificate of a Swarm: join it to one, {_HELP}"
            ) from error
        except OSError as error:
            raise NoIdentity(
                f"{error.filename} can't be read: {error.strerror}; see the mount, {_HELP}"
            ) from error
        try:
            plain = plain_key(key)
            # Managers often write the key's headers anew, and an engine that starts again its files: that changes nothing.
            made_of = hashlib.sha256("\0".join([root, certificate, plain]).encode()).hexdigest()
            if self._identity is None or made_of != self._made_of:
                made = make(root, certificate, plain, SWARM_ROLES)
                self._made_of = made_of
                return made
            return self._identity
        except (OSError, ValueError) as error:
            raise _UnfitError(
                f"the certificates in {self._folder} can't be used: {error}"
            ) from error


class _UnfitError(NoIdentity):
    """The files are there and don't fit together: perhaps they are just being replaced."""


def make(root: str, certificate: str, key: str, roles: frozenset[str]) -> Identity:
    """An identity of PEM texts that accepts itself.

    Raises:
        ValueError, OSError: it doesn't.
    """
    server = _context(ssl.PROTOCOL_TLS_SERVER, root, certificate, key)
    client = _context(ssl.PROTOCOL_TLS_CLIENT, root, certificate, key)
    return Identity(_shake_hands(server, client), roles, server, client)


def certified(peer: Mapping[str, object] | None) -> Certified:
    """What TLS says of the other side's certificate (`getpeercert()`).

    Raises:
        ValueError: it isn't one of a node.
    """
    found: dict[str, list[str]] = {}
    subject = (peer or {}).get("subject", ())
    assert isinstance(subject, tuple)
    for parts in subject:
        for name, value in parts:
            found.setdefault(name, []).append(value)
    once = [
        found.get(name, []) for name in ("commonName", "organizationName", "organizationalUnitName")
    ]
    if peer is None or any(len(values) != 1 for values in once):
        raise ValueError("the certificate doesn't name one node, one role and one Swarm")
    (node,), (cluster,), (role,) = once
    if not re.fullmatch(r"[0-9a-z]{1,64}", node):
        raise ValueError(f"the certificate's node {node[:64]!r} is no node ID")
    return Certified(node, cluster, role, ssl.cert_time_to_seconds(str(peer["notAfter"])))


def plain_key(text: str) -> str:
    """A key without the header lines that the Swarm adds and OpenSSL doesn't take.

    Raises:
        NoIdentity: it is encrypted.
        ValueError: it is none.
    """
    for label, inside in _BLOCK.findall(text):
        if not label.endswith("PRIVATE KEY"):
            continue
        lines = inside.splitlines()
        headers = [line for line in lines if ":" in line]
        if label.startswith("ENCRYPTED") or any("ENCRYPTED" in line for line in headers):
            raise NoIdentity(
                "the node's key is encrypted, as the Swarm is autolocked and this host is a manager: "
                f"docker swarm update --autolock=false, {_HELP}"
            )
        body = [line.strip() for line in lines if ":" not in line and line.strip()]
        return "\n".join([f"-----BEGIN {label}-----", *body, f"-----END {label}-----", ""])
    raise ValueError("there is no key in the key's file")


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _content(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MOST)
    # What isn't ASCII is in no part that counts.
    return data.decode("ascii", "replace")


def _context(protocol: int, root: str, certificate: str, key: str) -> ssl.SSLContext:
    made = ssl.SSLContext(protocol)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    # As the engine does it: each certificate of the root's file is trusted by itself, self-signed or not.
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # Resuming would go past the check of the certificate.
    made.options |= ssl.OP_NO_TICKET
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        made.num_tickets = 0
    made.set_alpn_protocols([PROTOCOL])
    made.load_verify_locations(cadata=root)
    files = [_anonymous(certificate), _anonymous(key)]
    try:
        paths = [f"/proc/self/fd/{file}" for file in files]
        # A password that is asked for would be asked of a terminal.
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
    """Both ends of one handshake: whether key, certificate and roots fit, and what the certificate says."""
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
    raise ValueError("a handshake with itself doesn't end")
