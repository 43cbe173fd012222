"""Keys and peers of encrypted networks: who gets what, in each situation, without a real kernel."""

from __future__ import annotations

import itertools
import random
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from msgspec.structs import replace

from dataplane.control import PeerKeys
from driver.encryption import FACT, NO_KEY, NO_SESSION, TAKEN, UNPROVEN
from driver.inner_addresses import PREFIX, inner_address, other_slot
from driver.key_proof import proven_key
from tests.unit.encryption_world import PERIOD, World, a_network, announced, seed


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path, 3)
    made.settle()
    return made


def test_hosts_reach_each_other(world: World) -> None:
    """Each host sends to each other one, to its inner address, after the keys were exchanged."""
    assert world.all_deliver()
    host, other = world.hosts[1], world.hosts[2]
    reach = host.encryption.reach(a_network(), frozenset({other.address}))
    assert reach == {inner_address(other.node, other.kernel.active)}


def test_other_networks_use_the_underlay(world: World) -> None:
    """A network that isn't encrypted has the peers' own addresses."""
    peers = frozenset({world.hosts[2].address})
    assert world.hosts[1].encryption.reach(a_network(encrypted=False), peers) == peers


def test_nothing_before_the_keys_are_known(tmp_path: Path) -> None:
    """Without a key of a peer nothing is sent to it, not to its underlay address either."""
    world = World(tmp_path, 2)
    host, other = world.hosts[1], world.hosts[2]
    host.sessions.clear()
    world.settle()
    assert host.encryption.reach(a_network(), frozenset({other.address})) == frozenset()
    assert host.kernel.peers == ()
    state = host.encryption.state()
    assert state is not None
    assert [peer.reason for peer in state.peers] == [NO_SESSION]


def test_earlier_version_gets_nothing(world: World) -> None:
    """A peer that announces no key gets nothing, and status says why."""
    world.hosts[1].listed = {2, 3, 4}
    late = World(Path(world.hosts[1].store.path).parent.parent / "late", 1).hosts[1]
    late.says = PeerKeys(address="192.0.2.4", node="node4")
    world.hosts[4] = late
    world.hosts[1].sessions.add(4)
    for _ in range(3):
        world.hosts[1].step()
    assert not world.hosts[1].encryption.reach(a_network(), frozenset({IPv4Address("192.0.2.4")}))
    state = world.hosts[1].encryption.state()
    assert state is not None
    assert {str(peer.address): peer.reason for peer in state.peers}["192.0.2.4"] == NO_KEY


def test_a_key_of_another_host_is_refused(world: World) -> None:
    """Who announces another host's keys gets nothing, and the other host keeps what it has."""
    first, victim, liar = world.hosts[1], world.hosts[2], world.hosts[3]
    liar.says = replace(victim.encryption_facts(), address=str(liar.address), node=liar.node)
    first.store.put_fact(FACT, "{}")
    first.restart()
    world.settle()
    assert world.delivers(first, victim)
    assert not world.delivers(first, liar)
    state = first.encryption.state()
    assert state is not None
    assert {peer.address: peer.reason for peer in state.peers}[liar.address] == UNPROVEN


@pytest.mark.parametrize("count", [0, 1])
def test_each_key_needs_a_proof(tmp_path: Path, count: int) -> None:
    """Keys without a proof, as an unfinished version announces them, get nothing."""
    world = World(tmp_path, 2)
    other = world.hosts[2]
    pairs = tuple(proven_key(other.node, seed(number)) for number in (901, 902))
    whole = announced(other.node, str(other.address), pairs)
    other.says = replace(whole, proofs=whole.proofs[:count])
    world.settle()
    assert {peer.node for peer in world.hosts[1].kernel.peers} == set()
    other.says = whole
    world.settle()
    assert {peer.node for peer in world.hosts[1].kernel.peers} == {other.node}


def test_a_host_cannot_take_a_new_key_of_another(world: World) -> None:
    """A member of the Swarm that announces another's new standby key before that one itself does
    not cut it off: only the proof's own node gets the key.
    """
    first, victim, liar = world.hosts[1], world.hosts[2], world.hosts[3]
    known = victim.kernel.keys()
    own = liar.encryption_facts()
    assert known is not None
    world.now += PERIOD
    first.sessions.discard(victim.number)
    for _ in range(200):
        victim.step()
        # It hears of the victim's new key, and tells it on; the victim's own session is slow.
        told = victim.encryption_facts()
        for key, proof in zip(told.keys, told.proofs, strict=True):
            if key not in known:
                keys, proofs = (own.keys[0], key), (own.proofs[0], proof)
                liar.says = replace(own, keys=keys, proofs=proofs)
        first.sessions.discard(victim.number)
        first.step()
        first.sessions.add(victim.number)
        world.step(10)
    assert liar.says is not None
    world.settle()
    assert world.delivers(first, victim)
    assert world.delivers(victim, first)
    (shown,) = [peer for peer in first.kernel.peers if peer.node == victim.node]
    assert shown.keys == victim.kernel.keys()


def test_two_nodes_cannot_share_a_key(world: World) -> None:
    """If the owner of a key proves it for another node too, only the first one gets it: the kernel
    knows one address for each key.
    """
    first, other, liar = world.hosts[1], world.hosts[2], world.hosts[3]
    pairs = tuple(proven_key(other.node, seed(number)) for number in (901, 902))
    copies = tuple(proven_key(liar.node, seed(number)) for number in (901, 902))
    other.says = announced(other.node, str(other.address), pairs)
    world.settle()
    liar.says = announced(liar.node, str(liar.address), copies)
    first.store.put_fact(FACT, "{}")
    first.restart()
    world.settle()
    assert {peer.node for peer in first.kernel.peers} == {other.node}
    state = first.encryption.state()
    assert state is not None
    assert {peer.address: peer.reason for peer in state.peers}[liar.address] == TAKEN


def test_another_node_at_an_address(world: World) -> None:
    """A host that joined anew, or whose router has another identity after a restart, replaces the
    node that had its address.
    """
    host, other = world.hosts[1], world.hosts[2]
    pairs = tuple(proven_key("reborn", seed(number)) for number in (901, 902))
    other.says = announced("reborn", str(other.address), pairs)
    world.settle()
    assert {peer.node for peer in host.kernel.peers} == {"reborn", "node3"}
    assert inner_address("reborn", 0) in host.encryption.reach(
        a_network(), frozenset({other.address})
    )


def test_a_node_with_another_identity_has_new_keys(world: World) -> None:
    """Proofs hold for one node, so a host that joins anew makes keys anew, and is reached."""
    host = world.hosts[1]
    before = host.kernel.keys()
    host.name = "joined"
    world.settle()
    after = host.kernel.keys()
    assert before is not None
    assert after is not None
    assert set(before).isdisjoint(after)
    assert world.all_deliver()


def test_own_key_is_refused(world: World) -> None:
    """A peer that announces this host's own key gets nothing new."""
    first, liar = world.hosts[1], world.hosts[3]
    keys = first.kernel.keys()
    assert keys is not None
    liar.says = replace(first.encryption_facts(), address=str(liar.address), node=liar.node)
    world.settle()
    assert all(set(peer.keys).isdisjoint(keys) for peer in first.kernel.peers)


def test_one_key_twice_is_refused(tmp_path: Path) -> None:
    """Both slots with one key would take each other's address."""
    world = World(tmp_path, 2)
    one = proven_key("node2", seed(77))
    world.hosts[2].says = announced("node2", "192.0.2.2", (one, one))
    world.settle()
    assert world.hosts[1].kernel.peers == ()


def test_an_unlisted_host_gets_nothing(tmp_path: Path) -> None:
    """A host with a session that shares no encrypted network becomes no peer."""
    world = World(tmp_path, 3)
    world.hosts[1].listed = {2}
    world.settle()
    assert {peer.node for peer in world.hosts[1].kernel.peers} == {"node2"}


def test_a_host_that_leaves_is_forgotten(world: World) -> None:
    """Keys of a host that is no longer on the network go from kernel and store."""
    for host in world.hosts.values():
        assert host.listed is not None
        host.listed -= {3}
    gone = world.hosts.pop(3)
    world.settle()
    assert world.all_deliver()
    for host in world.hosts.values():
        assert {peer.node for peer in host.kernel.peers}.isdisjoint({gone.node})
        assert gone.node not in str(host.store.fact(FACT))


def test_what_is_known_outlives_everything(world: World) -> None:
    """Without router, sessions and engine, and after a restart of the plugin, nothing is lost."""
    host = world.hosts[1]
    host.router_up = False
    host.sessions.clear()
    host.listed = None
    host.restart()
    assert world.all_deliver()
    world.settle()
    assert world.all_deliver()


def test_a_restarted_router_takes_nothing_away(world: World) -> None:
    """A peer's router that doesn't know its keys yet announces none; those known stay."""
    other = world.hosts[2]
    other.says = PeerKeys(address=str(other.address), node=other.node)
    world.settle()
    assert world.all_deliver()


def test_last_container_ends(world: World) -> None:
    """A host without containers on encrypted networks announces no key and has no peers."""
    host = world.hosts[1]
    host.stop_containers()
    world.settle()
    assert host.encryption.keys() is None
    assert host.kernel.peers == ()
    assert host.encryption.state() is None


def test_a_refused_peer_does_not_keep_the_keys_from_others(tmp_path: Path) -> None:
    """If the kernel refuses what one host has announced, the others still get this host's keys."""
    world = World(tmp_path, 3)
    host = world.hosts[1]
    host.kernel.fails = True
    world.settle()
    assert host.encryption.keys() is not None
    state = host.encryption.state()
    assert state is not None
    assert "refused" in state.error
    assert {peer.node for peer in world.hosts[2].kernel.peers} == {"node1", "node3"}


def test_rotation_loses_nothing(world: World) -> None:
    """While keys change, every packet that any host sends at any moment is decrypted."""
    before = {number: host.kernel.keys() for number, host in world.hosts.items()}
    slots = {number: host.kernel.active for number, host in world.hosts.items()}
    for _ in range(int(2.5 * PERIOD / 20)):
        world.now += 19.0
        for host in world.hosts.values():
            host.step()
            assert not _lost(world)
        world.step()
        assert world.all_deliver()
    for number, host in world.hosts.items():
        after = host.kernel.keys()
        assert after is not None
        assert set(after).isdisjoint(before[number] or ())
        assert host.kernel.active == slots[number]


def _lost(world: World) -> list[tuple[int, int]]:
    """From which host to which packets are lost now."""
    return [
        (one.number, other.number)
        for one, other in itertools.permutations(world.hosts.values(), 2)
        if not world.delivers(one, other)
    ]


def test_rotation_waits_for_a_peer_without_the_standby_key(world: World) -> None:
    """A key isn't used before the peers that work have proved to know it, for a period at most."""
    host, other = world.hosts[1], world.hosts[2]
    slot = host.kernel.active
    world.now += PERIOD - 10
    world.step()
    for key in other.kernel.own:
        host.kernel.handshakes[1 - slot, key] = 0.0
    world.now += 10
    host.step()
    assert host.kernel.active == slot
    world.step()
    world.step()
    assert host.kernel.active == 1 - slot


def test_former_key_waits_for_peers_that_are_not_told(world: World) -> None:
    """A peer whose session is lost during a rotation still sends to the former slot, and loses
    nothing for long enough."""
    host, deaf = world.hosts[1], world.hosts[2]
    world.now += PERIOD - 10
    world.step()
    for one in world.hosts.values():
        one.sessions.discard(2)
    deaf.sessions.clear()
    for _ in range(30):
        world.step(20)
        assert not _lost(world)
    assert host.kernel.active == 1
    for one in world.hosts.values():
        one.sessions = set(world.hosts) - {one.number}
    before = host.kernel.keys()
    for _ in range(2 * int(PERIOD / 20)):
        world.step(20)
        assert not _lost(world)
    assert host.kernel.keys() != before


def test_rotation_that_is_due_at_a_start(world: World) -> None:
    """A plugin that was away when a rotation was due does it after its start."""
    host = world.hosts[1]
    slot = host.kernel.active
    world.now += 1.5 * PERIOD
    host.restart()
    for _ in range(3):
        world.step()
        assert not _lost(world)
    assert host.kernel.active == 1 - slot


def test_rotation_at_random(tmp_path: Path) -> None:
    """With restarts, lost sessions and lost routers at random moments nothing is lost, as long as
    each host is told within a period."""
    chance = random.Random(16)
    world = World(tmp_path, 3)
    world.settle()
    for _ in range(1500):
        host = world.hosts[chance.randint(1, 3)]
        match chance.randint(0, 6):
            case 0:
                host.restart()
            case 1:
                host.router_up = False
            case 2:
                host.sessions.clear()
            case 3:
                host.listed = None
            case _:
                host.router_up = True
                host.sessions = set(world.hosts) - {host.number}
                host.listed = set(host.sessions)
        world.step(chance.uniform(0.5, 20.0))
        assert not _lost(world)


def test_a_new_device_starts_anew(world: World) -> None:
    """After a reboot the devices have new keys: they are announced, and age from then on."""
    host = world.hosts[1]
    host.kernel.own = []
    host.kernel.make()
    world.settle()
    assert world.all_deliver()


def test_removed_devices_are_made_again(world: World) -> None:
    """While containers use them, devices that somebody has removed are made again."""
    host = world.hosts[1]
    host.kernel.own = []
    world.settle()
    assert world.all_deliver()


def test_devices_are_not_made_without_need(world: World) -> None:
    """Without containers on encrypted networks none are made."""
    host = world.hosts[1]
    host.kernel.own = []
    host.stop_containers()
    world.settle()
    assert host.kernel.own == []


def test_clock_goes_back(world: World) -> None:
    """A clock that was set back neither stops rotation for ever nor rotates at once."""
    slot = world.hosts[1].kernel.active
    world.now -= 10 * PERIOD
    world.settle()
    assert world.hosts[1].kernel.active == slot
    world.now += PERIOD
    world.settle()
    assert world.hosts[1].kernel.active == 1 - slot


def test_kernel_failure_is_reported_and_repeated(world: World) -> None:
    """What the kernel refuses is in status, and is tried again."""
    host = world.hosts[1]
    host.kernel.fails = True
    world.now += 20
    host.step()
    state = host.encryption.state()
    assert state is not None
    assert "a test" in state.error
    host.kernel.fails = False
    applied = host.kernel.applied
    host.step()
    assert host.kernel.applied == applied + 1
    state = host.encryption.state()
    assert state is not None
    assert not state.error


def test_damaged_store(world: World) -> None:
    """Stored peers that can't be read are forgotten, and learned again."""
    host = world.hosts[1]
    host.store.put_fact(FACT, "{broken")
    host.restart()
    world.settle()
    assert world.all_deliver()


def test_inner_addresses() -> None:
    """They are of the prefix, differ by node, and those of one node differ in the last bit."""
    found = {inner_address(f"node{number}", slot) for number in range(1000) for slot in (0, 1)}
    assert len(found) == 2000
    assert all(address in PREFIX for address in found)
    assert other_slot(inner_address("x", 0)) == inner_address("x", 1)
    assert other_slot(inner_address("x", 1)) == inner_address("x", 0)
