"""What status shows of encrypted networks: control plane and data plane apart."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Final

from driver.encryption import FRESH, EncryptionState, PeerEncryption
from plugin.status import EncryptedPeerStatus, EncryptionStatus

TLS: Final = "tls1.3"
WIREGUARD: Final = "wireguard"
STALE: Final = "the last handshake is too old: its UDP ports are closed, or it is down"


def encryption_status(
    state: EncryptionState, names: Mapping[str, str], sessions: Set[str]
) -> EncryptionStatus:
    """`names` of hosts by address; `sessions`: addresses of hosts whose router has one with this
    host's."""
    return EncryptionStatus(
        slot=state.slot,
        port=state.port,
        rotated=round(state.rotated, 1),
        error=state.error,
        peers=[_peer(peer, names, sessions) for peer in state.peers],
    )


def _peer(
    peer: PeerEncryption, names: Mapping[str, str], sessions: Set[str]
) -> EncryptedPeerStatus:
    address = str(peer.address)
    works = not peer.reason and peer.handshake is not None and peer.handshake < FRESH
    return EncryptedPeerStatus(
        address=address,
        name=names.get(address, ""),
        node=peer.node,
        inner=peer.inner,
        control=TLS if address in sessions else "",
        data=WIREGUARD if works else "",
        handshake=None if peer.handshake is None else round(peer.handshake, 1),
        received=peer.received,
        sent=peer.sent,
        silent=list(peer.silent),
        reason=peer.reason or ("" if works else STALE),
    )
