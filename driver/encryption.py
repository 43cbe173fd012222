"""Encrypted networks between hosts: which peers have which keys, and when this host's change.

The router tells peers this host's public keys in the sessions, and tells us theirs. A peer counts
under the node ID of its certificate: its inner addresses are derived from that. Invariants:

- A peer without known keys gets nothing: it is in no flood list, and no device has it.
- A key belongs to one node, which has proved that it is its own (`key_proof.py`). Who announces a
  key without a proof gets nothing, and takes nothing from the host that has the key.
- What is known of a peer holds while it shares an encrypted network, whatever happens to routers,
  sessions and this process: only public keys are stored.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Final, Protocol

import msgspec
import structlog

from dataplane.control import EncryptionFacts, EncryptionKeys, PeerKeys
from dataplane.errors import DataplaneError
from driver.errors import FreeFlowError, StateError
from driver.inner_addresses import SLOTS, inner_address
from driver.key_proof import SEED, is_proven, proven_key
from driver.key_rotation import KeyAge, KeyStep, step
from driver.model import EncryptedPeer, IPAddress, Network
from driver.store import Store
from driver.vip_table import NetworkState
from driver.worker import Worker

log = structlog.get_logger()

EVERY: Final = 0.5
"""Seconds between two questions to the router, while there are encrypted networks."""
IDLE: Final = 10.0
REPAIR_EVERY: Final = 10.0
"""Seconds after which devices are checked again though nothing has changed."""
FRESH: Final = 180.0
"""Seconds for which a handshake holds: WireGuard makes a new one every two minutes, since there are
always packets (keepalive)."""
FACT: Final = "encryption"
NO_KEY: Final = (
    "it has announced no key: its FreeFlow is of an earlier version, its kernel has no WireGuard, "
    "or it has no container on an encrypted network"
)
NO_SESSION: Final = "its router has no session with this host's, so its keys aren't known"
UNPROVEN: Final = (
    "it has not proved that the key which it announces is its own: it is another host's, or "
    "its FreeFlow is of another version"
)
TAKEN: Final = "it announces a key that another host has announced"


class KernelPeer(Protocol):
    """A peer of a device: `driver.kernel.wireguard.PeerState`."""

    @property
    def handshake(self) -> float: ...

    @property
    def received(self) -> int: ...

    @property
    def sent(self) -> int: ...


class EncryptionKernel(Protocol):
    """Implemented by `driver.kernel.encryption_namespace.EncryptionNamespace`.

    Raises KernelError.
    """

    port: int

    def make(self) -> object: ...

    def keys(self) -> tuple[str, str] | None: ...

    def slot(self) -> int: ...

    def renew(self, slot: int, private: bytes) -> None: ...

    def activate(self, slot: int) -> None: ...

    def apply(self, node: str, peers: tuple[EncryptedPeer, ...]) -> None: ...

    def states(self, slot: int) -> Mapping[str, KernelPeer]: ...


class KeyExchange(Protocol):
    """Implemented by `dataplane.router_client.RouterClient`. Raises DataplaneError."""

    def encryption(self) -> EncryptionFacts: ...


class _StoredPeer(msgspec.Struct, frozen=True):
    node: str
    address: str
    keys: tuple[str, str]
    slot: int
    port: int


class _Stored(msgspec.Struct, frozen=True):
    """What outlives this process."""

    node: str = ""
    keys: tuple[str, ...] = ()
    """This host's own, to notice that devices are new."""
    proofs: tuple[str, ...] = ()
    """Of the keys, by slot."""
    rotated: float = 0.0
    former: bool = False
    peers: tuple[_StoredPeer, ...] = ()


@dataclass(frozen=True, slots=True)
class PeerEncryption:
    """A host that shares an encrypted network, as status shows it. `handshake`: seconds since the
    last one with the key by which it sends; None: there was none. `reason`: why nothing is sent."""

    address: IPAddress
    node: str = ""
    inner: str = ""
    handshake: float | None = None
    received: int = 0
    sent: int = 0
    reason: str = ""
    silent: tuple[int, ...] = ()
    """UDP ports of the peer with which there is no recent handshake."""


@dataclass(frozen=True, slots=True)
class EncryptionState:
    """The encryption of this host. `rotated`: seconds since its active key became active."""

    node: str
    slot: int
    port: int
    rotated: float
    error: str
    peers: tuple[PeerEncryption, ...]


class Encryption:
    """The thread that keeps keys and peers right.

    `states` are the sync loop's, `own` this host's addresses. `period`: seconds between two
    rotations. `clock` is the wall's.
    """

    def __init__(
        self,
        store: Store,
        kernel: EncryptionKernel,
        router: KeyExchange,
        *,
        states: Callable[[], Mapping[str, NetworkState]],
        own: Callable[[], frozenset[IPAddress]],
        period: float,
        changed: Callable[[], None] = lambda: None,
        seeds: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._kernel = kernel
        self._router = router
        self._states = states
        self._own = own
        self._period = period
        self._changed = changed
        self._seeds = seeds
        self._clock = clock
        self._lock = threading.Lock()
        self._stored = self._load()
        self._peers = {one.node: _peer(one) for one in self._stored.peers}
        self._reasons: dict[IPAddress, str] = {}
        self._keys: EncryptionKeys | None = None
        self._shared: frozenset[IPAddress] = frozenset()
        self._applied: object = None
        self._repair_at = float("-inf")
        self._error = ""
        self._worker = Worker("encryption", self.once, retry=EVERY)

    def start(self) -> None:
        self._worker.start()

    def stop(self) -> None:
        self._worker.stop()

    def wake(self) -> None:
        """Networks or endpoints have changed."""
        self._repair_at = float("-inf")
        self._worker.wake()

    # --- for others

    def keys(self) -> EncryptionKeys | None:
        """What the router tells peers; None: no container here is on an encrypted network."""
        with self._lock:
            return self._keys

    def reach(self, network: Network, peers: frozenset[IPAddress]) -> frozenset[IPAddress]:
        """The addresses to which VXLAN packets for these peers go; of an encrypted network, inner
        ones of those whose keys are known."""
        if not network.encrypted:
            return peers
        with self._lock:
            return frozenset(
                inner_address(peer.node, peer.slot)
                for peer in self._peers.values()
                if peer.address in peers
            )

    def outer(self) -> dict[IPAddress, IPAddress]:
        """Inner address to the peer's address on the underlay."""
        with self._lock:
            return {
                inner_address(peer.node, slot): peer.address
                for peer in self._peers.values()
                for slot in SLOTS
            }

    def state(self) -> EncryptionState | None:
        """For status; None: no container here is on an encrypted network."""
        keys, now = self.keys(), self._clock()
        if keys is None and not self._error:
            return None
        with self._lock:
            known = {peer.address: peer for peer in self._peers.values()}
            shared, reasons, stored = self._shared, dict(self._reasons), self._stored
        slot = 0 if keys is None else keys.slot
        try:
            states = self._kernel.states(slot)
            standby = self._kernel.states(1 - slot)
        except FreeFlowError:
            states = standby = {}
        return EncryptionState(
            node=stored.node,
            slot=slot,
            port=self._kernel.port,
            rotated=max(0.0, now - stored.rotated),
            error=self._error,
            peers=tuple(
                _shown(
                    address, known.get(address), (states, standby), reasons.get(address, ""), now
                )
                for address in sorted(shared | known.keys(), key=str)
            ),
        )

    # --- the loop

    def once(self) -> float:
        """Check once; returns the seconds until the next check."""
        networks = self._networks()
        if not networks and not self._peers:
            with self._lock:
                self._keys = None
            return IDLE
        try:
            self._check(networks)
            self._report("")
        except (FreeFlowError, DataplaneError) as error:
            self._report(str(error))
        return EVERY

    def _report(self, error: str) -> None:
        if error and error != self._error:
            log.warning("encryption not up to date", reason=error)
        self._error = error

    def _networks(self) -> list[Network]:
        """Encrypted networks with endpoints here."""
        store = self._store
        return [
            network
            for network in store.networks()
            if network.encrypted and network.overlay and store.has_endpoints(network.id)
        ]

    def _check(self, networks: list[Network]) -> None:
        own = self._kernel.keys()
        if own is None and networks:
            # Somebody has removed the devices, or the first container is just being made.
            self._kernel.make()
            own = self._kernel.keys()
        if own is None:
            self._publish([], self._stored.node)
            return
        try:
            facts = self._router.encryption()
        except DataplaneError:
            # What is known holds.
            facts = EncryptionFacts()
        node = facts.node or self._stored.node
        own = self._prove(own, node)
        self._learn(facts, self._sharing(networks), own)
        now = self._clock()
        wanted = (node, own, tuple(self._peers.values()))
        refusal: FreeFlowError | None = None
        if wanted != self._applied or now >= self._repair_at:
            self._repair_at = now + REPAIR_EVERY
            self._applied = None
            try:
                self._kernel.apply(node, tuple(self._peers.values()))
                self._applied = wanted
            except FreeFlowError as error:
                # Of one peer, perhaps: the others are to know this host's keys all the same.
                refusal = error
        told = {fact.node for fact in facts.peers}
        self._rotate(own, node, told.issuperset(self._peers))
        self._publish(networks, node)
        if refusal is not None:
            raise refusal

    def _sharing(self, networks: list[Network]) -> frozenset[IPAddress] | None:
        """The other hosts on these networks; None: that isn't known of all of them yet."""
        states, own = self._states(), self._own()
        found: set[IPAddress] = set()
        for network in networks:
            view = states.get(network.id, NetworkState()).view
            if view is None or not own:
                return None
            found.update(peer.address for peer in view.peers)
        return frozenset(found) - own

    def _publish(self, networks: list[Network], node: str) -> None:
        keys, told = self._kernel.keys(), None
        proofs = self._stored.proofs
        if keys is not None and networks and self._are_proven(keys, node):
            told = EncryptionKeys(
                keys=keys,
                proofs=(proofs[0], proofs[1]),
                slot=self._kernel.slot(),
                port=self._kernel.port,
            )
        with self._lock:
            changed, self._keys = told != self._keys, told
        if changed:
            self._changed()
        self._save(replace_keys(self._stored, node, keys or ()))

    # --- peers

    def _learn(
        self,
        facts: EncryptionFacts,
        shared: frozenset[IPAddress] | None,
        own: tuple[str, str],
    ) -> None:
        peers, reasons = dict(self._peers), {}
        if shared is not None:
            for node in [node for node, peer in peers.items() if peer.address not in shared]:
                peer = peers.pop(node)
                log.info("encryption peer removed", node=node, address=str(peer.address))
            reasons = dict.fromkeys(shared, NO_SESSION)
        for fact in facts.peers:
            address = ip_address(fact.address)
            if shared is not None and address not in shared:
                continue
            reasons[address] = self._learn_one(peers, fact, address, facts.node, own)
        for peer in peers.values():
            reasons[peer.address] = ""
        with self._lock:
            changed = peers != self._peers
            self._peers, self._reasons = peers, reasons
            self._shared = self._shared if shared is None else shared
        if changed:
            self._changed()

    @staticmethod
    def _learn_one(
        peers: dict[str, EncryptedPeer],
        fact: PeerKeys,
        address: IPAddress,
        own_node: str,
        own: tuple[str, str],
    ) -> str:
        """Add a peer that has told its keys; returns why it can't be."""
        keys = fact.keys
        if len(keys) != len(SLOTS) or not fact.node or fact.node == own_node:
            return NO_KEY
        if len(fact.proofs) != len(SLOTS):
            return UNPROVEN
        if not all(map(is_proven, keys, (fact.node,) * len(SLOTS), fact.proofs)):
            return UNPROVEN
        # An address has one node: the one that has the session now.
        for node, peer in list(peers.items()):
            if peer.address == address and node != fact.node:
                del peers[node]
                log.info("encryption peer removed", node=node, address=str(address))
        others = {key for node, peer in peers.items() if node != fact.node for key in peer.keys}
        if len(set(keys)) != len(SLOTS) or not others.union(own).isdisjoint(keys):
            return TAKEN
        told = EncryptedPeer(fact.node, address, (keys[0], keys[1]), fact.slot, fact.port)
        before = peers.get(fact.node)
        if before != told:
            peers[fact.node] = told
            if before is None:
                log.info("encryption peer added", node=fact.node, address=str(address))
            else:
                log.info("encryption peer changed", node=fact.node, address=str(address))
        return ""

    # --- rotation

    def _rotate(self, own: tuple[str, str], node: str, told: bool) -> None:
        """`told`: there is a session with each peer."""
        stored, now, slot = self._stored, self._clock(), self._kernel.slot()
        if set(stored.keys) != set(own):
            # The devices are new.
            stored = msgspec.structs.replace(stored, keys=own, rotated=now, former=False)
        elif not 0 < stored.rotated <= now:
            # The clock was changed.
            stored = msgspec.structs.replace(stored, rotated=now)
        age = KeyAge(stored.rotated, stored.former)
        ready = told if age.former else self._is_ready(slot, now)
        match step(age, now, self._period, ready=ready):
            case KeyStep.ROTATE if node:
                self._kernel.activate(1 - slot)
                stored = msgspec.structs.replace(stored, rotated=now, former=True)
                log.info("encryption keys rotated", slot=1 - slot)
            case KeyStep.RENEW:
                stored = self._renew(replace_keys(stored, node, own), 1 - slot)
                stored = msgspec.structs.replace(stored, former=False)
        self._save(stored)

    def _prove(self, own: tuple[str, str], node: str) -> tuple[str, str]:
        """Replace keys for which there is no proof: of devices that are new, or of a node that
        this host was before. Returns the keys."""
        stored = self._stored
        for slot in SLOTS:
            if node and not self._is_proven(own, node, slot):
                stored = self._renew(replace_keys(stored, node, own), slot)
                self._save(stored)
                own = self._kernel.keys() or own
        return own

    def _renew(self, stored: _Stored, slot: int) -> _Stored:
        """Give a slot a new key, which is this node's."""
        made = proven_key(stored.node, self._seeds(SEED))
        self._kernel.renew(slot, made.private)
        proofs = [*stored.proofs, "", ""][: len(SLOTS)]
        proofs[slot] = made.proof
        keys = self._kernel.keys() or stored.keys
        return msgspec.structs.replace(stored, keys=keys, proofs=tuple(proofs))

    def _is_proven(self, own: tuple[str, str], node: str, slot: int) -> bool:
        proofs = self._stored.proofs
        return slot < len(proofs) and is_proven(own[slot], node, proofs[slot])

    def _are_proven(self, own: tuple[str, str], node: str) -> bool:
        return all(self._is_proven(own, node, slot) for slot in SLOTS)

    def _is_ready(self, slot: int, now: float) -> bool:
        """Whether the standby key works with all peers with which the active one does."""
        if now < self._stored.rotated + self._period:
            return True
        active, standby = self._kernel.states(slot), self._kernel.states(1 - slot)
        return all(
            not _is_fresh(active.get(key), now) or _is_fresh(standby.get(key), now)
            for peer in self._peers.values()
            for key in peer.keys
        )

    # --- what outlives this process

    def _load(self) -> _Stored:
        text = self._store.fact(FACT)
        try:
            return _Stored() if text is None else msgspec.json.decode(text, type=_Stored)
        except msgspec.MsgspecError as error:
            log.error("stored keys of peers are unreadable", reason=str(error))
            return _Stored()

    def _save(self, stored: _Stored) -> None:
        peers = tuple(
            _StoredPeer(peer.node, str(peer.address), peer.keys, peer.slot, peer.port)
            for peer in self._peers.values()
        )
        stored = msgspec.structs.replace(stored, peers=peers)
        if stored == self._stored:
            return
        self._stored = stored
        try:
            self._store.put_fact(FACT, msgspec.json.encode(stored).decode())
        except StateError as error:
            log.error("keys of peers not stored", reason=str(error))


def replace_keys(stored: _Stored, node: str, keys: tuple[str, ...]) -> _Stored:
    return msgspec.structs.replace(stored, node=node or stored.node, keys=keys or stored.keys)


def _peer(one: _StoredPeer) -> EncryptedPeer:
    return EncryptedPeer(one.node, ip_address(one.address), one.keys, one.slot, one.port)


def _is_fresh(state: KernelPeer | None, now: float) -> bool:
    return state is not None and now - state.handshake < FRESH


def _shown(
    address: IPAddress,
    peer: EncryptedPeer | None,
    states: tuple[Mapping[str, KernelPeer], Mapping[str, KernelPeer]],
    reason: str,
    now: float,
) -> PeerEncryption:
    """`states` of this host's active device and of the standby one."""
    if peer is None:
        return PeerEncryption(address, reason=reason or NO_KEY)
    found = PeerEncryption(address, peer.node, str(inner_address(peer.node, peer.slot)))
    state = states[0].get(peer.keys[peer.slot])
    if state is None:
        return replace(found, reason="the kernel doesn't have its key yet")
    return replace(
        found,
        handshake=max(0.0, now - state.handshake) if state.handshake else None,
        received=state.received,
        sent=state.sent,
        silent=tuple(
            peer.port + slot
            for slot in SLOTS
            if not all(_is_fresh(one.get(peer.keys[slot]), now) for one in states)
        ),
        reason="" if state.handshake else "no handshake yet: its UDP port is closed, or it is down",
    )
