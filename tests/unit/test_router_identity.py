"""This host's identity: read from an engine's files, through everything that happens to them."""

from __future__ import annotations

import itertools
import shutil
import ssl
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from dataplane.errors import NoIdentity
from dataplane.router import identities as module
from dataplane.router import node_identity
from dataplane.router.identities import SwarmIdentity, choose
from dataplane.router.node_identity import Certified, Identity, certified
from tests.unit.swarm_ca import CLUSTER, Authority, Node, write


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def meet(one: Identity, other: Identity) -> Certified:
    """The peer's certificate in a handshake. Raises `ssl.SSLError`."""
    return node_identity._shake_hands(other.server, one.client)


def found(origin: module.Identities) -> Identity:
    """The current identity, which must exist."""
    identity = origin.current()
    assert identity is not None, origin.reason
    return identity


@pytest.mark.parametrize("role", ["swarm-worker", "swarm-manager"])
def test_a_node(tmp_path: Path, authority: Authority, role: str) -> None:
    """Node, Swarm and role are the certificate's, although the key has header lines that OpenSSL
    refuses.
    """
    write(tmp_path, authority.root, authority.node("node1", role))
    origin = SwarmIdentity(tmp_path)
    own = found(origin).own
    assert (own.node, own.cluster, own.role) == ("node1", CLUSTER, role)
    assert own.expires == pytest.approx(time.time() + 90 * 86400, abs=60)
    assert origin.reason == ""
    assert origin.current() is origin.current()


def test_headers_matter(authority: Authority) -> None:
    """OpenSSL refuses the key with its header lines, so removing them is necessary."""
    node = authority.node("node1")
    with pytest.raises((ssl.SSLError, ValueError)):
        node_identity.make(authority.root, node.chain, node.key_text(), module.SWARM_ROLES)
    plain = module.plain_key(node.key_text())
    assert plain == node.key_text(headers=False)
    assert module.plain_key(plain) == plain
    # As engines on other systems, and editors, end lines.
    assert module.plain_key(node.key_text().replace("\n", "\r\n")) == plain


def test_no_swarm(tmp_path: Path) -> None:
    """Without a folder, with an empty one, and after the node has left, there is no identity, and
    the reason says what to do.
    """
    for folder in (tmp_path / "nowhere", tmp_path):
        origin = SwarmIdentity(folder)
        assert origin.current() is None
        assert "join it to one" in origin.reason
        assert "SESSION_KEY" in origin.reason


def test_autolock(tmp_path: Path, authority: Authority) -> None:
    """An encrypted key is never tried: the reason says that the Swarm is autolocked, also for the
    old format.
    """
    node = authority.node("node1", "swarm-manager")
    old = node.key_text().replace("kek-version", "Proc-Type: 4,ENCRYPTED\nkek-version")
    for key in (node.key_text(b"secret"), old):
        write(tmp_path, authority.root, node, key=key)
        origin = SwarmIdentity(tmp_path)
        assert origin.current() is None
        assert "--autolock=false" in origin.reason
    write(tmp_path, authority.root, node)
    assert origin.current() is not None
    write(tmp_path, authority.root, node, key=node.key_text(b"secret"))
    assert origin.current() is None


def test_unreadable(tmp_path: Path, authority: Authority) -> None:
    """The reason names a file that can't be read."""
    write(tmp_path, authority.root, authority.node("node1"))
    key = tmp_path / "certificates/swarm-node.key"
    key.unlink()
    key.mkdir()
    origin = SwarmIdentity(tmp_path)
    assert origin.current() is None
    assert "swarm-node.key can't be read: Is a directory" in origin.reason


def test_renewal_and_roles(tmp_path: Path, authority: Authority) -> None:
    """A renewed certificate, one for another role, and that of another Swarm are each found by the
    next check.
    """
    write(tmp_path, authority.root, authority.node("node1"))
    origin = SwarmIdentity(tmp_path)
    before = found(origin)
    write(tmp_path, authority.root, authority.node("node1"))
    renewed = found(origin)
    assert renewed is not before
    write(tmp_path, authority.root, authority.node("node1", "swarm-manager"))
    assert found(origin).own.role == "swarm-manager"
    shutil.rmtree(tmp_path / "certificates")
    assert origin.current() is None
    other = Authority()
    write(tmp_path, other.root, other.node("node2", cluster="another"))
    assert found(origin).own.cluster == "another"


def test_nothing_new(tmp_path: Path, authority: Authority) -> None:
    """Files that are rewritten, or a key with other header lines, are the same identity: no session
    ends.
    """
    node = authority.node("node1", "swarm-manager")
    write(tmp_path, authority.root, node)
    origin = SwarmIdentity(tmp_path)
    before = found(origin)
    write(tmp_path, authority.root, node)
    assert origin.current() is before
    more = node.key_text().replace("kek-version: 17", "kek-version: 18\nraft-dek-pending: abc")
    write(tmp_path, authority.root, node, key=more)
    assert origin.current() is before
    write(tmp_path, authority.root + Authority().root, node)
    assert found(origin) is not before


def test_files_are_replaced_one_by_one(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the new key waits for its certificate the old identity stays in use, but not for
    ever.
    """
    write(tmp_path, authority.root, authority.node("node1"))
    origin = SwarmIdentity(tmp_path)
    before = found(origin)
    new = authority.node("node1", "swarm-manager")
    write(tmp_path, authority.root, new, only=("swarm-node.key",))
    assert origin.current() is before
    write(tmp_path, authority.root, new, only=("swarm-node.crt",))
    assert found(origin).own.role == "swarm-manager"
    write(tmp_path, authority.root, authority.node("node1"), only=("swarm-node.key",))
    assert origin.current() is not None
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    assert origin.current() is None
    assert "can't be used" in origin.reason
    write(tmp_path, authority.root, new)
    assert origin.current() is not None


Breaker = Callable[[Authority, Node], tuple[str, str, str]]
BROKEN: dict[str, Breaker] = {
    "empty": lambda a, n: ("", "", ""),
    "no root": lambda a, n: ("", n.chain, n.key_text()),
    "no certificate": lambda a, n: (a.root, "", n.key_text()),
    "no key": lambda a, n: (a.root, n.chain, a.root),
    "garbage": lambda a, n: ("\0" * 100, "\xff" * 100, "x" * 100),
    "cut": lambda a, n: (a.root, n.chain, n.key_text()[:150]),
    "cut inside": lambda a, n: (a.root, n.chain[:200], n.key_text()),
    "another's key": lambda a, n: (a.root, n.chain, a.node("x").key_text()),
    "another's root": lambda a, n: (Authority().root, n.chain, n.key_text()),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files(tmp_path: Path, authority: Authority, what: str) -> None:
    """Invalid files give no identity and a reason, and no other error."""
    root, chain, key = BROKEN[what](authority, authority.node("node1"))
    folder = tmp_path / "certificates"
    folder.mkdir()
    for file, text in zip(module._NAMES, (root, chain, key), strict=True):
        (folder / file).write_text(text, "latin-1")
    origin = SwarmIdentity(tmp_path)
    assert origin.current() is None
    assert "can't be used" in origin.reason


def test_expiry(tmp_path: Path, authority: Authority) -> None:
    """An expired certificate is no identity, whether it has expired before it is read or
    afterwards.
    """
    write(tmp_path, authority.root, authority.node("node1", lasts=timedelta(hours=-1)))
    origin = SwarmIdentity(tmp_path)
    assert origin.current() is None
    assert "expired" in origin.reason
    write(tmp_path, authority.root, authority.node("node1", lasts=timedelta(hours=1)))
    now = [time.time()]
    origin = SwarmIdentity(tmp_path, lambda: now[0])
    assert origin.current() is not None
    now[0] += 3601
    assert origin.current() is None
    assert "expired" in origin.reason
    now[0] -= 3601
    assert origin.current() is not None


def test_rotation_of_the_root(tmp_path: Path) -> None:
    """While the root is rotated, nodes of the old and the new root accept each other, whatever the
    order of steps.
    """
    old, new = Authority(), Authority()
    both = old.root + new.root
    crossed = old.cross(new)
    steps = [
        (old.root, old.node("node1")),
        (old.root, new.node("node1", above=crossed)),
        (both, old.node("node1")),
        (both, new.node("node1", above=crossed)),
        (new.root, new.node("node1", above=crossed)),
        (new.root, new.node("node1")),
    ]
    identities = []
    for number, (root, node) in enumerate(steps):
        write(tmp_path / str(number), root, node)
        identities.append(found(SwarmIdentity(tmp_path / str(number))))
    for one, other in itertools.pairwise(identities):
        assert meet(one, other).node == "node1"
        assert meet(other, one).node == "node1"
    with pytest.raises(ssl.SSLError):
        meet(identities[0], identities[-1])


def test_a_root_that_another_has_signed(tmp_path: Path) -> None:
    """If a company's authority has signed the Swarm's root, that root is trusted, as by the
    engine.
    """
    company = Authority("company")
    swarm = Authority("swarm-ca", above=company)
    write(tmp_path, swarm.root, swarm.node("node1", above=company.root))
    assert found(SwarmIdentity(tmp_path)).own.node == "node1"


def test_whom_it_speaks_with(tmp_path: Path, authority: Authority) -> None:
    """A peer is another node of the same Swarm, worker or manager; other certificates of the same
    root are refused.
    """
    write(tmp_path, authority.root, authority.node("node1"))
    own = found(SwarmIdentity(tmp_path))
    own.check(Certified("node2", CLUSTER, "swarm-worker", 0))
    own.check(Certified("node2", CLUSTER, "swarm-manager", 0))
    for peer, why in [
        (Certified("node2", "another", "swarm-worker", 0), "another Swarm"),
        (Certified("node2", CLUSTER, "swarm-ca", 0), "swarm-ca"),
        (Certified("node1", CLUSTER, "swarm-worker", 0), "own certificate"),
    ]:
        with pytest.raises(NoIdentity, match=why):
            own.check(peer)


@pytest.mark.parametrize(
    "subject",
    [
        (),
        (("commonName", "a"),),
        (("commonName", "a"), ("organizationName", "o")),
        (
            *(("commonName", "a"), ("commonName", "b")),
            *(("organizationName", "o"), ("organizationalUnitName", "r")),
        ),
        (("commonName", "A B"), ("organizationName", "o"), ("organizationalUnitName", "r")),
        (("commonName", "a\n"), ("organizationName", "o"), ("organizationalUnitName", "r")),
        (("commonName", ""), ("organizationName", "o"), ("organizationalUnitName", "r")),
    ],
)
def test_odd_names(subject: tuple[tuple[str, str], ...]) -> None:
    """A certificate that does not name exactly one node, role and Swarm is refused."""
    with pytest.raises(ValueError, match="certificate"):
        certified(
            {
                "subject": tuple((part,) for part in subject),
                "notAfter": "Nov 27 22:00:00 2026 GMT",
            }
        )
    with pytest.raises(ValueError, match="certificate"):
        certified(None)


@pytest.mark.parametrize(
    "use", [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH], ids=lambda u: u._name
)
def test_uses(tmp_path: Path, authority: Authority, use: ExtendedKeyUsageOID) -> None:
    """A certificate for one direction only is refused: nodes' certificates are for both."""
    write(tmp_path, authority.root, authority.node("node1", uses=(use,)))  # type: ignore[arg-type]
    origin = SwarmIdentity(tmp_path)
    assert origin.current() is None


def test_a_secret() -> None:
    """Hosts with the same secret accept each other and have different IDs; a host with another
    secret is refused.
    """
    one, other = (found(choose(None, "s" * 32)) for _ in range(2))
    assert one.own.node != other.own.node
    one.check(meet(one, other))
    other.check(meet(other, one))
    outsider = found(choose(None, "t" * 32))
    for pair in ((one, outsider), (outsider, one)):
        with pytest.raises(ssl.SSLError):
            meet(*pair)


def test_a_secret_goes_before_the_swarm(tmp_path: Path, authority: Authority) -> None:
    """A secret has priority over the Swarm's certificates; without both there is a reason."""
    write(tmp_path, authority.root, authority.node("node1"))
    assert found(choose(tmp_path)).own.node == "node1"
    assert found(choose(tmp_path, "s" * 32)).own.role == "freeflow-host"
    neither = choose(None)
    assert neither.current() is None
    assert "SESSION_KEY" in neither.reason


def test_nothing_is_left_open(tmp_path: Path, authority: Authority) -> None:
    """The key is in memory only: reading it leaves no file and no descriptor."""
    write(tmp_path, authority.root, authority.node("node1"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    found(SwarmIdentity(tmp_path))
    write(tmp_path, authority.root, authority.node("node1"), key="x")
    assert SwarmIdentity(tmp_path).current() is None
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        module._NAMES
    )
