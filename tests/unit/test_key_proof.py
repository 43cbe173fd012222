"""Proofs that a key of WireGuard belongs to a node."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from driver.key_proof import SEED, is_proven, proven_key

PRIME = (1 << 255) - 19


def test_the_public_key_is_the_one_that_the_kernel_derives() -> None:
    """What is announced is X25519's public key of the private one, for any seed."""
    for number in range(64):
        made = proven_key("node1", bytes([number]) * SEED)
        pair = X25519PrivateKey.from_private_bytes(made.private)
        raw = pair.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        assert base64.b64encode(raw).decode() == made.public
        assert is_proven(made.public, "node1", made.proof)


def test_a_proof_holds_for_one_node_and_one_key() -> None:
    """Neither another node nor another key can use it."""
    made, other = (proven_key("node1", bytes([number]) * SEED) for number in (1, 2))
    assert not is_proven(made.public, "node2", made.proof)
    assert not is_proven(made.public, "node", made.proof)
    assert not is_proven(other.public, "node1", made.proof)


def test_the_same_key_in_other_bytes_is_refused() -> None:
    """X25519 ignores the highest bit and reduces numbers: a key has one text alone."""
    made = proven_key("node1", bytes(SEED))
    raw = base64.b64decode(made.public)
    copy = base64.b64encode(raw[:31] + bytes([raw[31] | 128])).decode()
    assert not is_proven(copy, "node1", made.proof)


@pytest.mark.parametrize("place", range(96))
def test_a_changed_proof_is_refused(place: int) -> None:
    """A bit that differs anywhere makes it worthless."""
    made = proven_key("node1", bytes(SEED))
    proof = bytearray(base64.b64decode(made.proof))
    proof[place] ^= 1
    assert not is_proven(made.public, "node1", base64.b64encode(proof).decode())


@pytest.mark.parametrize(
    "point",
    [bytes(32), (1).to_bytes(32, "little"), (PRIME - 1).to_bytes(32, "little"), b"\xff" * 32],
)
def test_points_for_which_anybody_can_sign_are_refused(point: bytes) -> None:
    """Points of small order, and numbers beyond the field, prove nothing of a real key."""
    made = proven_key("node1", bytes(SEED))
    for rest in (bytes(64), point + bytes(32), base64.b64decode(made.proof)[32:]):
        assert not is_proven(made.public, "node1", base64.b64encode(point + rest).decode())


@pytest.mark.parametrize("proof", ["", "A", "=", "A" * 128, "\x00" * 128, "\u00e9" * 128])
def test_what_is_no_proof_is_refused(proof: str) -> None:
    """Any text of a hostile host is answered, not raised."""
    made = proven_key("node1", bytes(SEED))
    assert not is_proven(made.public, "node1", proof)


def test_a_private_key_is_not_shown() -> None:
    """A key pair in a log or an error has no private key."""
    made = proven_key("node1", bytes(SEED))
    assert str(made.private) not in repr(made)
    assert "private" not in repr(made)
