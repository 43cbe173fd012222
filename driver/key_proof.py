"""Keys for WireGuard that prove whose they are: nobody can announce a key that belongs to another.

A public key is no secret, so any host could announce another's. Each announced key therefore comes
with a proof: the node ID, signed with the private key. WireGuard's curve has no signatures, but its
keys are those of Ed25519 in another form (RFC 7748, section 4.1: the birational map). So a key is
made as one of Ed25519, signs once, and is then used as one of X25519 alone. Invariant: who does not
have the private key of a public one has no proof for it, and a proof holds for one node.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

SEED: Final = 32
_POINT: Final = 32
_SIGNATURE: Final = 64
_PRIME: Final = (1 << 255) - 19
_WITHOUT_SIGN: Final = (1 << 255) - 1


@dataclass(frozen=True, slots=True)
class ProvenKey:
    """A key pair of a node. `public` and `proof` are announced, in base64."""

    private: bytes = field(repr=False)
    public: str
    proof: str


def proven_key(node: str, seed: bytes) -> ProvenKey:
    """The key pair of 32 random bytes, and the proof that it is this node's."""
    signer = Ed25519PrivateKey.from_private_bytes(seed)
    point = signer.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    # What Ed25519 derives from a seed (RFC 8032, section 5.1.5) is X25519's private key.
    private = bytearray(hashlib.sha512(seed).digest()[:32])
    private[0] &= 248
    private[31] = private[31] & 127 | 64
    proof = point + signer.sign(_statement(node))
    return ProvenKey(bytes(private), _text(_converted(point)), _text(proof))


@lru_cache(1 << 14)
def is_proven(public: str, node: str, proof: str) -> bool:
    """Whether the host with this node ID had the private key when it made the proof."""
    try:
        data = base64.b64decode(proof, validate=True)
    except (binascii.Error, ValueError):
        return False
    point, signature = data[:_POINT], data[_POINT:]
    if len(point) != _POINT or len(signature) != _SIGNATURE or _text(_converted(point)) != public:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(point).verify(signature, _statement(node))
    except (InvalidSignature, ValueError):
        return False
    return True


def _statement(node: str) -> bytes:
    return b"freeflow wireguard key of node " + node.encode()


def _converted(point: bytes) -> bytes:
    """The public key of X25519 for one of Ed25519; empty if there is none."""
    y = int.from_bytes(point, "little") & _WITHOUT_SIGN
    if y >= _PRIME or y == 1:
        return b""
    return ((1 + y) * pow(1 - y, -1, _PRIME) % _PRIME).to_bytes(32, "little")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
