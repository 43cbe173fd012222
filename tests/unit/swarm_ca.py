"""A certificate authority as the Swarm's is, and the files that an engine keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLUSTER: Final = "clusterid0000000000000001"
HEADERS: Final = "kek-version: 17\nraft-dek-needs-rotation: false\n\n"


def name(**parts: str) -> x509.Name:
    """A subject of CN, OU, O."""
    known = {
        "cn": NameOID.COMMON_NAME,
        "ou": NameOID.ORGANIZATIONAL_UNIT_NAME,
        "o": NameOID.ORGANIZATION_NAME,
    }
    return x509.Name([x509.NameAttribute(known[key], value) for key, value in parts.items()])


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


@dataclass(frozen=True)
class Node:
    """A node's certificate chain and key, as PEM."""

    chain: str
    key: ec.EllipticCurvePrivateKey

    def key_text(self, password: bytes | None = None, *, headers: bool = True) -> str:
        """The key's file; with header lines as the engine writes them."""
        text = self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption()
            if password is None
            else serialization.BestAvailableEncryption(password),
        ).decode()
        first, rest = text.split("\n", 1)
        return f"{first}\n{HEADERS if headers else ''}{rest}"


class Authority:
    """A root, or with `above` one that another has signed."""

    def __init__(self, cn: str = "swarm-ca", above: Authority | None = None) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = name(cn=cn)
        self.certificate = (above or self).sign(self.name, self.key, ca=True)

    @property
    def root(self) -> str:
        """As the file of roots has it."""
        return pem(self.certificate)

    def cross(self, other: Authority) -> str:
        """Another's certificate, signed by this one: how a new root is trusted by those who know
        the old.
        """
        return pem(self.sign(other.name, other.key, ca=True))

    def sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *,
        ca: bool = False,
        lasts: timedelta = timedelta(days=90),
        uses: tuple[x509.ObjectIdentifier, ...] = (
            ExtendedKeyUsageOID.SERVER_AUTH,
            ExtendedKeyUsageOID.CLIENT_AUTH,
        ),
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        begin = min(now, now + lasts) - timedelta(hours=1)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(now + lasts)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        # The engine's have these too. Roots of one name are told apart by them: OpenSSL doesn't try
        # one after the other.
        public = x509.SubjectKeyIdentifier.from_public_key
        made = made.add_extension(public(key.public_key()), critical=False).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                public(self.key.public_key())
            ),
            critical=False,
        )
        if not ca:
            made = made.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        return made.sign(self.key, hashes.SHA256())

    def node(
        self,
        node: str,
        role: str = "swarm-worker",
        cluster: str = CLUSTER,
        *,
        lasts: timedelta = timedelta(days=90),
        uses: tuple[x509.ObjectIdentifier, ...] | None = None,
        above: str = "",
    ) -> Node:
        """A node of the Swarm. `above`: what follows its certificate in the file."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = name(cn=node, ou=role, o=cluster)
        signed = (
            self.sign(subject, key, lasts=lasts)
            if uses is None
            else self.sign(subject, key, lasts=lasts, uses=uses)
        )
        return Node(pem(signed) + above, key)


def files(root: str, node: Node, key: str | None = None) -> dict[str, str]:
    """What an engine has in the folder `certificates` of its Swarm's."""
    return {
        "swarm-root-ca.crt": root,
        "swarm-node.crt": node.chain,
        "swarm-node.key": node.key_text() if key is None else key,
    }


def write(
    folder: Path, root: str, node: Node, *, key: str | None = None, only: tuple[str, ...] = ()
) -> None:
    """Put the files where an engine does, each by rename."""
    certificates = folder / "certificates"
    certificates.mkdir(parents=True, exist_ok=True)
    for file, text in files(root, node, key).items():
        if not only or file in only:
            beside = certificates / f".tmp-{file}"
            beside.write_text(text)
            beside.chmod(0o600)
            beside.rename(certificates / file)
