"""Where this host's identity comes from: the Swarm's certificates, or a secret that all hosts share.

The Swarm's files are read again when they change (renewal, another role, another Swarm) and are only taken if a TLS handshake
of the identity with itself succeeds, so a half-written or expired set is never used.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from dataplane.errors import NoIdentity
from dataplane.router.node_identity import Identity, make

SWARM_ROLES: Final = frozenset({"swarm-manager", "swarm-worker"})
PATIENCE: Final = 30.0
"""Seconds for which the last identity stays in use while the files do not fit together: the engine
replaces them one by one."""
_MOST: Final = 1 << 20
_NAMES: Final = ("swarm-root-ca.crt", "swarm-node.crt", "swarm-node.key")
_BLOCK: Final = re.compile(
    r"-----BEGIN ([A-Z0-9 ]+)-----\s*\n(.*?)-----END \1-----", re.DOTALL | re.ASCII
)
_HELP: Final = "or set SESSION_KEY to one secret on all hosts"


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
