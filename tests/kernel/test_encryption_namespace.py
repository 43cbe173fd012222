"""Encrypted networks in the kernel, with bridges in WireGuard's place, which drop and count.

The real ones are in `tests/vm`. What is tested here holds without them: packets of an encrypted
network are routed in the encryption namespace, whatever exists there.
"""

from __future__ import annotations

import hashlib
import json
import socket
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import IPv4Address

import pytest

from driver import names
from driver.errors import KernelError
from driver.inner_addresses import PREFIX, inner_address
from driver.kernel.encryption_namespace import EncryptionNamespace
from driver.kernel.namespace import ENCRYPTION_PIN, in_netns
from driver.kernel.wireguard import DeviceState, PeerState, WireGuardPeer
from driver.model import EncryptedPeer, Network
from testbed.kernel_hosts import RUN, Container, KernelHost, Lab, a_network, eventually

PEER = EncryptedPeer("far", IPv4Address("10.1.0.2"), ("a" * 43 + "=", "b" * 43 + "="), 0, 4797)
OTHER = EncryptedPeer("far2", IPv4Address("10.1.0.3"), ("c" * 43 + "=", "d" * 43 + "="), 1, 5000)


@dataclass
class KeysInMemory:
    """Keys and peers of devices that have none."""

    keys: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    peers: dict[str, dict[str, WireGuardPeer]] = field(default_factory=dict)
    taken: set[int] = field(default_factory=set)
    puts: int = 0

    def state(self, name: str) -> DeviceState:
        peers = {
            key: PeerState(
                (str(peer.endpoint), peer.port),
                frozenset({type(PREFIX)(f"{peer.inner}/128")}),
                0.0,
                0,
                0,
            )
            for key, peer in self.peers.get(name, {}).items()
        }
        return DeviceState(self.keys.get(name, ""), self.ports.get(name, 0), peers)

    def set_key(self, name: str, private: bytes) -> None:
        self.keys[name] = hashlib.sha256(private).hexdigest()

    def set_port(self, name: str, port: int) -> None:
        if port in self.taken:
            raise KernelError("setting a port", cause="Address already in use")
        self.ports[name] = port

    def put(self, name: str, peer: WireGuardPeer) -> None:
        self.puts += 1
        for others in (self.peers.setdefault(name, {}),):
            for key in [key for key, other in others.items() if other.inner == peer.inner]:
                del others[key]
            others[peer.key] = peer

    def drop(self, name: str, key: str) -> None:
        del self.peers[name][key]

    def close(self) -> None:
        pass


def stand_in(host: KernelHost, devices: KeysInMemory) -> EncryptionNamespace:
    """Give a host devices in WireGuard's place."""
    kernel = host.kernel

    def make() -> EncryptionNamespace:
        return EncryptionNamespace(
            RUN, kernel._host, kernel.underlay, 4797, kind="bridge", opener=lambda _: devices
        )

    kernel.encryption = host.do(make)
    host.do(kernel.encryption.make)
    for slot in (0, 1):
        # As a WireGuard device, it asks nobody for a MAC address.
        inside(host, "ip", "link", "set", names.wireguard(slot), "arp", "off")
    return kernel.encryption


def secret(number: int = 1) -> Network:
    return replace(a_network(number, mtu=1370), encrypted=True)


def inside(host: KernelHost, *command: str) -> str:
    """Run a program in the encryption namespace."""
    return host.run("nsenter", f"--net={RUN / ENCRYPTION_PIN}", *command)


def sent(host: KernelHost, slot: int) -> int:
    """Packets that a device has taken."""
    found = json.loads(inside(host, "ip", "-j", "-s", "link", "show", names.wireguard(slot)))
    return int(found[0]["stats64"]["tx"]["packets"])


def underlay_frames(host: KernelHost) -> socket.socket:
    """A socket that gets all frames of the host's device on the underlay."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        made.bind(("eth0", 3))
        made.settimeout(0.2)
        return made

    return in_netns(host.namespace, make)


def vxlan_frames(packets: socket.socket, port: int = 4799) -> list[bytes]:
    """Frames to a VXLAN port that were seen, in either address family."""
    found = []
    try:
        while True:
            frame = packets.recv(65535)
            if port.to_bytes(2, "big") in frame[:64]:
                found.append(frame)
    except TimeoutError:
        return found


@dataclass
class Secret:
    """A container of an encrypted network with two peers."""

    host: KernelHost
    devices: KeysInMemory
    encryption: EncryptionNamespace
    container: Container

    @property
    def network(self) -> Network:
        return self.container.network

    def flood(self, *peers: EncryptedPeer) -> None:
        inner = [inner_address(peer.node, peer.slot) for peer in peers]
        self.host.do(lambda: self.host.kernel.set_peers(self.network.id, inner))


@pytest.fixture
def scene(two: Lab) -> Secret:
    host = two.hosts[0]
    devices = KeysInMemory()
    encryption = stand_in(host, devices)
    made = Secret(host, devices, encryption, host.container(secret(), 2))
    host.do(lambda: encryption.apply("own", [PEER, OTHER]))
    made.flood(PEER, OTHER)
    return made


def test_packets_go_to_the_encrypting_device(scene: Secret) -> None:
    """A container's frames reach the active device, and none of them the underlay."""
    with underlay_frames(scene.host) as packets:
        before = sent(scene.host, 0)
        scene.container.echoes(IPv4Address("10.9.0.77"), tries=2)
        eventually("the device to get packets", lambda: sent(scene.host, 0) >= before + 2)
        assert vxlan_frames(packets) == []


def test_nothing_leaves_without_devices(scene: Secret) -> None:
    """Without devices, routes or the namespace's pin nothing of the network leaves the host."""
    with underlay_frames(scene.host) as packets:
        inside(scene.host, "ip", "-6", "route", "flush", "dev", "ffw0")
        scene.container.echoes(IPv4Address("10.9.0.77"), tries=2, timeout=0.1)
        for slot in (0, 1):
            inside(scene.host, "ip", "link", "del", names.wireguard(slot))
        scene.container.echoes(IPv4Address("10.9.0.78"), tries=2, timeout=0.1)
        scene.host.do(scene.encryption.remove)
        scene.container.echoes(IPv4Address("10.9.0.79"), tries=2, timeout=0.1)
        assert vxlan_frames(packets) == []


def test_underlay_addresses_of_peers_lead_nowhere(scene: Secret) -> None:
    """Even with a peer's underlay address in its flood list, the device sends nothing there."""
    with underlay_frames(scene.host) as packets:
        with pytest.raises(KernelError):
            scene.host.do(
                lambda: scene.host.kernel.set_peers(scene.network.id, [IPv4Address("10.1.0.2")])
            )
        scene.container.echoes(IPv4Address("10.9.0.77"), tries=2, timeout=0.1)
        assert vxlan_frames(packets) == []


def test_what_arrives_unencrypted_is_dropped(two: Lab) -> None:
    """A host that sends in the clear with the network's number reaches no container."""
    host, other = two.hosts
    stand_in(host, KeysInMemory())
    near = host.container(secret(), 2)
    far = other.container(a_network(mtu=1370), 3)
    other.set_peers(far.network, host)
    with near.packets() as packets:
        far.echoes(near.ipv4, tries=3, timeout=0.2)
        frames = vxlan_frames(packets, 0)
    mac = bytes.fromhex(far.endpoint.mac.replace(":", ""))
    assert not [frame for frame in frames if frame[6:12] == mac]


def test_rotation_changes_route_and_source(scene: Secret) -> None:
    """Another slot: the route leads to its device, and packets have its address."""
    scene.host.do(lambda: scene.encryption.activate(1))
    assert scene.host.do(scene.encryption.slot) == 1
    route = json.loads(inside(scene.host, "ip", "-6", "-j", "route", "show", str(PREFIX)))
    assert [(item["dev"], item["prefsrc"]) for item in route] == [
        ("ffw1", str(inner_address("own", 1)))
    ]
    before = sent(scene.host, 1)
    scene.container.echoes(IPv4Address("10.9.0.77"), tries=2)
    eventually("the device to get packets", lambda: sent(scene.host, 1) >= before + 2)


def test_addresses_are_those_of_the_node(scene: Secret) -> None:
    """The devices have the node's inner addresses, and another node's after that changes."""

    def addresses() -> set[str]:
        found = json.loads(inside(scene.host, "ip", "-6", "-j", "addr", "show", "scope", "global"))
        listed = [item for link in found for item in link.get("addr_info", [])]
        return {item["local"] for item in listed if "local" in item}

    assert addresses() == {str(inner_address("own", slot)) for slot in (0, 1)}
    scene.host.do(lambda: scene.encryption.activate(1))
    scene.host.do(lambda: scene.encryption.apply("another", [PEER]))
    assert addresses() == {str(inner_address("another", slot)) for slot in (0, 1)}
    assert scene.host.do(scene.encryption.slot) == 1


def test_removed_devices_are_made_again(scene: Secret) -> None:
    """A device that somebody has removed is made again, with another key and the route to it."""
    before = scene.host.do(scene.encryption.keys)
    scene.devices.keys.clear()
    for slot in (0, 1):
        inside(scene.host, "ip", "link", "del", names.wireguard(slot))
    assert scene.host.do(scene.encryption.keys) is None
    scene.host.do(lambda: scene.encryption.apply("own", [PEER]))
    after = scene.host.do(scene.encryption.keys)
    assert before is not None
    assert after is not None
    assert set(after).isdisjoint(before)
    assert "dev ffw0" in inside(scene.host, "ip", "-6", "route", "show", str(PREFIX))


def test_next_container_makes_removed_devices(scene: Secret) -> None:
    """The next container of a network finds all parts of it, though somebody has removed them."""
    scene.devices.keys.clear()
    scene.host.do(scene.encryption.remove)
    device = names.vxlan(scene.network.id, encrypted=True)
    eventually(
        "the VXLAN device to go", lambda: device not in scene.host.do(scene.host.kernel.links)
    )
    scene.host.container(scene.network, 4)
    assert device in scene.host.do(scene.host.kernel.links)
    assert scene.host.do(scene.encryption.keys) is not None


def test_peers_are_exactly_those_given(scene: Secret) -> None:
    """Both devices have both keys of each peer, with its inner address of that slot alone."""
    for name in ("ffw0", "ffw1"):
        assert scene.devices.peers[name] == {
            peer.keys[slot]: WireGuardPeer(
                peer.keys[slot], peer.address, peer.port + slot, inner_address(peer.node, slot)
            )
            for peer in (PEER, OTHER)
            for slot in (0, 1)
        }
    puts = scene.devices.puts
    scene.host.do(lambda: scene.encryption.apply("own", [PEER, OTHER]))
    assert scene.devices.puts == puts
    scene.host.do(lambda: scene.encryption.apply("own", [replace(PEER, port=9000)]))
    assert {peer.port for peer in scene.devices.peers["ffw1"].values()} == {9000, 9001}


def test_a_restarted_plugin_finds_everything(scene: Secret) -> None:
    """Keys, slot and devices stay as they are when the plugin starts again, and traffic goes on."""
    keys = scene.host.do(scene.encryption.keys)
    scene.host.do(lambda: scene.encryption.activate(1))
    scene.host.kernel = scene.host.new_kernel()
    again = stand_in(scene.host, scene.devices)
    scene.host.do(lambda: scene.host.kernel.attach(scene.network, scene.container.endpoint))
    scene.host.do(lambda: again.apply("own", [PEER, OTHER]))
    assert scene.host.do(again.keys) == keys
    assert scene.host.do(again.slot) == 1


def test_renewed_key(scene: Secret) -> None:
    """A new key of a slot leaves the other slot's as it is."""
    before = scene.host.do(scene.encryption.keys)
    scene.host.do(lambda: scene.encryption.renew(1, bytes(range(32))))
    after = scene.host.do(scene.encryption.keys)
    assert before is not None
    assert after is not None
    assert (after[0], after[1] == before[1]) == (before[0], False)


def test_learned_entries_follow_a_peer(scene: Secret) -> None:
    """What was learned behind a peer's former inner address leads to the one that it uses now."""
    device, mac = names.vxlan(scene.network.id, encrypted=True), "02:42:0a:09:00:4d"
    former, now = inner_address("far", 0), inner_address("far", 1)
    scene.host.in_overlay(
        *("bridge", "fdb", "add", mac, "dev", device, "dst", str(former), "self", "dynamic")
    )
    scene.flood(replace(PEER, slot=1), OTHER)
    assert scene.host.do(lambda: scene.host.kernel.learned(scene.network.id)) == {mac: now}
    scene.host.kernel.outer = lambda: {now: PEER.address}
    assert scene.host.do(lambda: scene.host.kernel.locate(scene.network.id, mac)) == PEER.address


def test_network_is_not_guarded_and_leaves_nothing(scene: Secret) -> None:
    """An encrypted network opens no port of the host, and cleanup removes all of it."""
    assert scene.host.do(scene.host.kernel.guarded).ports == ()
    assert scene.host.do(scene.host.kernel.inventory).networks == {names.short(scene.network.id)}
    removed = scene.host.do(scene.host.kernel.cleanup)
    assert names.vxlan(scene.network.id, encrypted=True) in removed
    assert {"ffw0", "ffw1", str(ENCRYPTION_PIN)} <= set(removed)
    assert scene.host.do(scene.encryption.keys) is None


def test_the_network_goes_with_its_last_endpoint(scene: Secret) -> None:
    """Bridge and VXLAN device of an encrypted network are removed like others'."""
    scene.host.do(lambda: scene.host.kernel.detach(scene.network.id, scene.container.endpoint.id))
    scene.host.do(lambda: scene.host.kernel.remove_network(scene.network.id))
    assert not scene.host.do(scene.host.kernel.links)


def test_same_host_takes_the_fast_path_and_peers_do_not(scene: Secret) -> None:
    """Containers of one host reach each other; the stages that send to the underlay know nothing of
    the network."""
    near = scene.host.container(scene.network, 3)
    scene.host.refresh()
    assert scene.container.pings(near.ipv4)
    stage = scene.host.do(scene.host.kernel.stage)
    assert stage.stage != "tunnel"


def test_other_networks_stay_as_they_are(two: Lab) -> None:
    """Beside an encrypted network, one that isn't connects two hosts as before."""
    host, other = two.hosts
    stand_in(host, KeysInMemory())
    host.container(secret(9), 9)
    plain = a_network(2)
    one, far = host.container(plain, 2), other.container(plain, 3)
    two.mesh(plain)
    assert one.pings(far.ipv4)


def test_kernel_without_wireguard(two: Lab) -> None:
    """Without WireGuard the endpoint fails with the remedy, and no device is left that sends."""
    host = two.hosts[0]
    kernel = host.kernel
    kernel.encryption = host.do(
        lambda: EncryptionNamespace(
            RUN,
            kernel._host,
            kernel.underlay,
            4797,
            kind="nosuchkind",
            opener=lambda _: KeysInMemory(),
        )
    )
    with pytest.raises(KernelError, match=r"no WireGuard; .*CONFIG_WIREGUARD"):
        host.container(secret(), 2)
    names_left = host.do(kernel.links)
    assert not [name for name in names_left if name.startswith((names.VXLAN, names.ENCRYPTED))]
    plain = a_network(2)
    assert host.container(plain, 2).pings(host.container(plain, 3).ipv4)


def test_taken_port(two: Lab) -> None:
    """A UDP port that another program has is named, with the setting that changes it."""
    host = two.hosts[0]
    with pytest.raises(KernelError, match=r"UDP port 4798 .*ENCRYPTION_PORT"):
        stand_in(host, KeysInMemory(taken={4798}))


def test_mtu(two: Lab) -> None:
    """An encrypted network's packets are smaller by what WireGuard and IPv6 take."""
    host = two.hosts[0]
    assert host.do(partial(host.kernel.underlay_mtu, encrypted=True)) == 1370
    assert host.do(host.kernel.underlay_mtu) == 1450
