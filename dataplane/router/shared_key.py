"""Certificates derived from a secret that all hosts share, for hosts without a Swarm.

The secret is the seed of a certificate authority's key, the same on each host; each router signs a
certificate for itself. Whoever knows the secret can pose as any host. The secret is stretched
(scrypt), so that an attacker who sees such a certificate can't guess a short one at once.
"""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dataplane.router.node_identity import Identity, make

ROLE: Final = "freeflow-host"
_SALT: Final = b"freeflow session key 1"
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
# The secret never expires, so the certificates don't either: clocks outside a Swarm may be wrong.
_BEGIN: Final = datetime(2000, 1, 1, tzinfo=UTC)
_END: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


class KeyIdentity:
    """The identity of a secret. The node ID is random: a restarted router is another node."""

    reason: Final = ""

    def __init__(self, secret: str) -> None:
        stretched = hashlib.scrypt(
            secret.encode(), salt=_SALT, n=1 << 15, r=8, p=1, maxmem=1 << 26, dklen=48
        )
        # 384 bits modulo a number of 256: all keys are equally likely.
        number = int.from_bytes(stretched, "big") % (_ORDER - 1) + 1
        self._identity = _identity(ec.derive_private_key(number, ec.SECP256R1()))

    def current(self) -> Identity:
        return self._identity


def _identity(authority: ec.EllipticCurvePrivateKey) -> Identity:
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    cluster = f"key-{identifier.digest.hex()}"
    issuer = _name(cluster, ROLE, "authority")
    root = (
        _builder(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(authority, hashes.SHA256())
    )
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = (
        _builder(_name(cluster, ROLE, secrets.token_hex(12)), issuer, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(authority, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    pem = serialization.Encoding.PEM
    return make(
        root.public_bytes(pem).decode(),
        leaf.public_bytes(pem).decode(),
        private.decode(),
        frozenset({ROLE}),
    )


def _name(cluster: str, role: str, node: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, node),
        ]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
