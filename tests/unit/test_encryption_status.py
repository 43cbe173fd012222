"""What status, doctor, ping, connections and metrics say of encrypted networks."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

import msgspec
import pytest

from dataplane.control import ConnectionFact, Connections
from driver.encryption import EncryptionState, PeerEncryption
from plugin import problems
from plugin.cli.doctor import check_encryption, check_wireguard, encryption_notes
from plugin.cli.show import show_connections, show_status
from plugin.encryption_status import STALE, encryption_status
from plugin.metrics import render
from tests.unit.documented import is_documented
from tests.unit.statuses import encryption, network, status

GOOD = PeerEncryption(IPv4Address("192.0.2.2"), "n2", "fd66:6677::2", 20.0, 10, 20)
SILENT = PeerEncryption(IPv4Address("192.0.2.3"), reason="it has announced no key")


def state(*peers: PeerEncryption, error: str = "") -> EncryptionState:
    return EncryptionState("n1", 1, 4797, 60.0, error, peers)


def test_control_and_data_apart() -> None:
    """The session and the packets are told apart: one may work without the other."""
    found = encryption_status(state(GOOD, SILENT), {"192.0.2.2": "host2"}, {"192.0.2.3"})
    assert [(peer.name, peer.control, peer.data) for peer in found.peers] == [
        ("host2", "", "wireguard"),
        ("", "tls1.3", ""),
    ]
    assert (found.by, found.slot, found.port, found.rotated) == ("wireguard", 1, 4797, 60.0)


@pytest.mark.parametrize(
    ("age", "data", "reason"), [(179.0, "wireguard", ""), (181.0, "", STALE), (None, "", STALE)]
)
def test_old_handshake(age: float | None, data: str, reason: str) -> None:
    """A peer without a recent handshake counts as one to which nothing gets."""
    (peer,) = encryption_status(state(replace(GOOD, handshake=age)), {}, set()).peers
    assert (peer.data, peer.reason) == (data, reason)


def test_problems() -> None:
    """A host to which nothing is sent is a warning, an error of the kernel an error; both are
    documented.
    """
    found = encryption_status(state(GOOD, SILENT, error="refused"), {}, set())
    findings = list(problems.encryption(found))
    assert [(finding.severity, finding.cause) for finding in findings] == [
        ("error", "refused"),
        ("warning", "it has announced no key"),
    ]
    assert "192.0.2.3" in findings[1].what
    assert "4797 and 4798" in findings[1].remedy
    assert all(map(is_documented, (finding.what for finding in findings)))
    assert list(problems.encryption(None)) == []


def test_shown() -> None:
    """Status shows each host, what protects control and data, and why nothing is sent."""
    text = show_status(status(networks=[network(encrypted=True)]))
    assert "encryption wireguard, UDP 4797 and 4798, key in use for 2 h" in text
    assert "10.0.4.0/24, encrypted" in text
    lines = {line.split()[0]: line for line in text.splitlines() if "192.0.2." in line}
    assert "42 s ago" in lines["host2"]
    assert "tls1.3" in lines["host2"]
    assert "nothing is sent" in lines["-"]
    assert "no handshake yet" in lines["-"]


def test_not_shown_without_encrypted_networks() -> None:
    """A host without encrypted networks shows nothing of them."""
    assert "encrypt" not in show_status(status(encryption=None))


def test_doctor() -> None:
    """Doctor names ports that don't answer, and says of each host what encrypts."""
    silent = msgspec.structs.replace(encryption().peers[0], silent=[4798])
    facts = status(encryption=encryption(peers=[silent, encryption().peers[1]]))
    (finding,) = check_encryption(facts)
    assert is_documented(finding.what)
    assert "UDP port 4798 of host host2" in finding.what
    assert list(check_encryption(status(encryption=None))) == []
    assert encryption_notes(facts) == [
        "encryption with host host2: control tls1.3, data wireguard",
        "encryption with host 192.0.2.3: control no session, data no handshake yet",
    ]


def test_kernel_is_tried_only_where_it_matters() -> None:
    """Without encrypted networks a kernel without WireGuard is no problem."""
    assert list(check_wireguard(status())) == []


def test_connections() -> None:
    """A list with encrypted connections has a column for what encrypts them; others have none."""
    plain = ConnectionFact(
        namespace=1,
        container="web",
        network="n",
        local="10.0.4.1:80",
        remote="10.0.4.2:5000",
        path="shm",
    )
    secret = msgspec.structs.replace(plain, path="overlay", encryption="wireguard")
    assert "ENCRYPTED" not in show_connections(Connections(connections=(plain,), reasons={}))
    both = show_connections(Connections(connections=(plain, secret), reasons={}))
    assert "ENCRYPTED BY" in both
    assert "wireguard" in both


def test_metrics() -> None:
    """Metrics count hosts that are reached and that aren't, and say how old handshakes and the key
    are.
    """
    text = render(status(networks=[network(encrypted=True)])).decode()
    for line in (
        "freeflow_encrypted_networks 1.0",
        'freeflow_encryption_peers{state="up"} 1.0',
        'freeflow_encryption_peers{state="down"} 1.0',
        'freeflow_encryption_handshake_age_seconds{host="host2"} 42.5',
        "freeflow_encryption_key_age_seconds 7300.0",
    ):
        assert line in text
