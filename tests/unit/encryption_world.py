"""Hosts of an encrypted network in virtual time: keys and peers as the kernel would have them.

`World.delivers` says whether a packet that one host sends now is decrypted by the other.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Network
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from dataplane.control import EncryptionFacts, PeerKeys
from dataplane.errors import RouterAway
from driver.encryption import Encryption
from driver.errors import KernelError
from driver.inner_addresses import SLOTS, inner_address
from driver.key_proof import ProvenKey
from driver.model import EncryptedPeer, Endpoint, IPAddress, Network, NetworkView, Peer
from driver.store import Store
from driver.vip_table import NetworkState

NET = "n" * 25
PERIOD = 3600.0


def key_text(number: int) -> str:
    """A key as WireGuard writes it."""
    return f"{number:042d}A="


def seed(number: int) -> bytes:
    """Bytes in place of random ones."""
    return hashlib.sha256(str(number).encode()).digest()


def announced(node: str, address: str, pairs: tuple[ProvenKey, ...]) -> PeerKeys:
    """What a host announces of these keys."""
    return PeerKeys(
        address=address,
        node=node,
        keys=tuple(pair.public for pair in pairs),
        proofs=tuple(pair.proof for pair in pairs),
        port=4797,
    )


def a_network(network_id: str = NET, *, encrypted: bool = True) -> Network:
    return Network(
        id=network_id,
        vni=70012,
        port=4799,
        mtu=1370,
        prefix6=IPv6Network("fd00:1:2:3::/64"),
        encrypted=encrypted,
    )


@dataclass
class FakePeer:
    handshake: float = 0.0
    received: int = 0
    sent: int = 0


@dataclass
class FakeEncryptionKernel:
    """The encryption namespace in memory. `keys_made` counts for all hosts."""

    keys_made: itertools.count[int]
    port: int = 4797
    own: list[str] = field(default_factory=list)
    active: int = 0
    node: str = ""
    peers: tuple[EncryptedPeer, ...] = ()
    handshakes: dict[tuple[int, str], float] = field(default_factory=dict)
    """By slot and the peer's key."""
    fails: bool = False
    applied: int = 0
    knows_node: bool = False
    """The plugin has told it its node ID since it started."""

    def make(self) -> None:
        if not self.own:
            self.own = [key_text(next(self.keys_made)) for _ in SLOTS]

    def keys(self) -> tuple[str, str] | None:
        return (self.own[0], self.own[1]) if self.own else None

    def slot(self) -> int:
        return self.active

    def renew(self, slot: int, private: bytes) -> None:
        pair = X25519PrivateKey.from_private_bytes(private)
        raw = pair.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.own[slot] = base64.b64encode(raw).decode()

    def activate(self, slot: int) -> None:
        if not self.knows_node:
            raise KernelError("the key can't be changed")
        self.active = slot

    def apply(self, node: str, peers: tuple[EncryptedPeer, ...]) -> None:
        if self.fails:
            raise KernelError("refused", cause="a test")
        self.node, self.peers = node, peers
        self.knows_node = bool(node)
        self.applied += 1

    def states(self, slot: int) -> dict[str, FakePeer]:
        return {
            key: FakePeer(self.handshakes.get((slot, key), 0.0))
            for peer in self.peers
            for key in peer.keys
        }

    def key_behind(self, inner: object) -> str | None:
        """The key for which packets to an inner address are encrypted."""
        for peer in self.peers:
            for slot in SLOTS:
                if inner_address(peer.node, slot) == inner:
                    return peer.keys[slot]
        return None


class AskedRouter:
    """The router of a host, as its plugin asks it."""

    def __init__(self, host: EncryptedHost) -> None:
        self._host = host

    def encryption(self) -> EncryptionFacts:
        return self._host.ask()


@dataclass
class EncryptedHost:
    """A host; its router has sessions with those in `sessions`."""

    world: World
    number: int
    kernel: FakeEncryptionKernel
    store: Store
    sessions: set[int] = field(default_factory=set)
    router_up: bool = True
    listed: set[int] | None = field(default_factory=set)
    """The other hosts on the network; None: the engine has not answered."""
    name: str = ""
    """Its node ID, if it isn't derived from its number."""
    says: PeerKeys | None = None
    """What it announces in place of its keys: a hostile host, or one of an earlier version."""

    def __post_init__(self) -> None:
        self.encryption = self.made()

    @property
    def node(self) -> str:
        return self.name or f"node{self.number}"

    @property
    def address(self) -> IPAddress:
        return IPv4Address(f"192.0.2.{self.number}")

    def made(self) -> Encryption:
        return Encryption(
            self.store,
            self.kernel,
            AskedRouter(self),
            states=self.states,
            own=lambda: frozenset({self.address}),
            period=PERIOD,
            clock=lambda: self.world.now,
            seeds=lambda _: seed(next(self.kernel.keys_made)),
        )

    def restart(self) -> None:
        """The plugin ends and starts; the kernel keeps what it has."""
        self.kernel.knows_node = False
        self.encryption = self.made()

    def states(self) -> dict[str, NetworkState]:
        if self.listed is None:
            return {}
        peers = [*self.listed, self.number]
        view = NetworkView(
            id=NET,
            name="secret",
            driver="freeflow",
            peers=tuple(Peer(f"p{n}", IPv4Address(f"192.0.2.{n}")) for n in peers),
        )
        return {NET: NetworkState(view=view)}

    def encryption_facts(self) -> PeerKeys:
        if self.says is not None:
            return self.says
        told = self.encryption.keys()
        bare = PeerKeys(address=str(self.address), node=self.node)
        if told is None:
            return bare
        return PeerKeys(
            address=bare.address,
            node=bare.node,
            keys=told.keys,
            proofs=told.proofs,
            slot=told.slot,
            port=told.port,
        )

    def start_container(self) -> None:
        self.store.put_network(a_network())
        self.store.put_endpoint(Endpoint(f"{self.number:064x}", NET, "02:42:0a:00:00:01"))
        self.kernel.make()

    def stop_containers(self) -> None:
        self.store.delete_endpoint(f"{self.number:064x}")

    def step(self) -> None:
        self.encryption.once()

    def ask(self) -> EncryptionFacts:
        if not self.router_up:
            raise RouterAway("no router")
        others = [
            self.world.hosts[number] for number in sorted(self.sessions & set(self.world.hosts))
        ]
        return EncryptionFacts(
            node=self.node, peers=tuple(other.encryption_facts() for other in others)
        )


class World:
    """Hosts 1 to `count`, with sessions between all of them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.now = 1_000_000.0
        made = itertools.count(1)
        self.hosts: dict[int, EncryptedHost] = {}
        for number in range(1, count + 1):
            kernel = FakeEncryptionKernel(made)
            host = EncryptedHost(self, number, kernel, Store(folder / str(number)))
            self.hosts[number] = host
        for host in self.hosts.values():
            host.sessions = set(self.hosts) - {host.number}
            host.listed = set(host.sessions)
            host.start_container()

    def step(self, seconds: float = 0.5) -> None:
        """Time passes, each host checks once, and the kernels shake hands."""
        self.now += seconds
        for host in self.hosts.values():
            host.step()
        for one, other in itertools.permutations(self.hosts.values(), 2):
            for mine, theirs in itertools.product(SLOTS, SLOTS):
                if self.works(one, mine, other, theirs):
                    key = other.kernel.own[theirs]
                    one.kernel.handshakes[mine, key] = self.now

    def settle(self) -> None:
        for _ in range(4):
            self.step()

    def works(self, one: EncryptedHost, mine: int, other: EncryptedHost, theirs: int) -> bool:
        """Whether a packet of one host's slot is decrypted by the other host's, and accepted."""
        key = one.kernel.key_behind(inner_address(other.node, theirs))
        if not other.kernel.own or key != other.kernel.own[theirs] or not one.kernel.own:
            return False
        return any(
            peer.keys[mine] == one.kernel.own[mine] and peer.node == one.node
            for peer in other.kernel.peers
        )

    def delivers(self, one: EncryptedHost, other: EncryptedHost) -> bool:
        """Whether a packet that a host sends now to another one arrives."""
        inner = one.encryption.reach(a_network(), frozenset({other.address}))
        slots = [slot for slot in SLOTS if inner_address(other.node, slot) in inner]
        return bool(slots) and self.works(one, one.kernel.active, other, slots[0])

    def all_deliver(self) -> bool:
        return all(
            self.delivers(one, other)
            for one, other in itertools.permutations(self.hosts.values(), 2)
        )
