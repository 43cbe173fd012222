"""Where this host's identity comes from: the Swarm's certificates, or a secret of all hosts.

The Swarm's files are read again when they change (renewal, another role, another Swarm). They are
used only if a TLS handshake of the identity with itself succeeds, so that a half-written or expired
set is never used.
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
    """A source of this host's identity."""

    @property
    def reason(self) -> str:
        """Why there is no identity; "" if there is one."""

    def current(self) -> Identity | None:
        """The current identity: the same object as long as nothing has changed. Cheap."""


def choose(
    folder: Path | None, secret: str = "", wall: Callable[[], float] = time.time
) -> Identities:
    """A secret has priority over the Swarm.

    `folder` is the engine's folder of the Swarm, if it is mounted.
    """
    if secret:
        # Loaded only if needed: the cryptography library is large.
        from dataplane.router import shared_key

        return shared_key.KeyIdentity(secret)
    if folder is None:
        reason = NoIdentity(
            "the Swarm's certificates aren't mounted", remedy=f"mount them, {_HELP}"
        )
        return NoIdentities(str(reason))
    return SwarmIdentity(folder, wall)


@dataclass(frozen=True, slots=True)
class NoIdentities:
    """There is no identity, and there will be none."""

    reason: str

    def current(self) -> None:
        return


class SwarmIdentity:
    """The node's certificate, which the engine keeps in `certificates` in the Swarm's folder."""

    def __init__(self, folder: Path, wall: Callable[[], float] = time.time) -> None:
        self._folder = folder / "certificates"
        self._wall = wall
        self._seen: object = None
        self._unfit: float | None = None
        self._identity: Identity | None = None
        self._made_of = ""
        self.reason = "not read yet"

    def current(self) -> Identity | None:
        seen = [_stamp(self._folder / name) for name in _NAMES]
        if seen != self._seen or self._unfit is not None:
            self._read()
            self._seen = seen
        identity = self._identity
        if identity is not None and self._wall() >= identity.own.expires:
            reason = NoIdentity(
                "the node's certificate has expired",
                remedy="check whether the engine reaches a manager",
            )
            self._drop(str(reason))
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
                "this host has no certificate of a Swarm", remedy=f"join it to one, {_HELP}"
            ) from error
        except OSError as error:
            raise NoIdentity(
                f"{error.filename} can't be read",
                cause=error.strerror or str(error),
                remedy=f"check the mount, {_HELP}",
            ) from error
        try:
            plain = plain_key(key)
            # Managers often rewrite the key's headers, and an engine rewrites its files when it
            # starts: the identity is the same.
            made_of = hashlib.sha256("\0".join([root, certificate, plain]).encode()).hexdigest()
            if self._identity is None or made_of != self._made_of:
                made = make(root, certificate, plain, SWARM_ROLES)
                self._made_of = made_of
                return made
            return self._identity
        except (OSError, ValueError) as error:
            raise _UnfitError(
                f"the certificates in {self._folder} can't be used", cause=str(error)
            ) from error


class _UnfitError(NoIdentity):
    """The files don't fit together: the engine may be replacing them just now."""


def plain_key(text: str) -> str:
    """A PEM key without the header lines that the Swarm adds and OpenSSL refuses.

    Raises:
        NoIdentity: it is encrypted.
        ValueError: the text has no key.
    """
    for label, inside in _BLOCK.findall(text):
        if not label.endswith("PRIVATE KEY"):
            continue
        lines = inside.splitlines()
        headers = [line for line in lines if ":" in line]
        if label.startswith("ENCRYPTED") or any("ENCRYPTED" in line for line in headers):
            raise NoIdentity(
                "the node's key is encrypted",
                cause="the Swarm is autolocked and this host is a manager",
                remedy=f"docker swarm update --autolock=false, {_HELP}",
            )
        body = [line.strip() for line in lines if ":" not in line and line.strip()]
        return "\n".join([f"-----BEGIN {label}-----", *body, f"-----END {label}-----", ""])
    raise ValueError("the key's file has no key")


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _content(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MOST)
    # Text that isn't ASCII is outside the PEM blocks.
    return data.decode("ascii", "replace")
