"""Encrypted networks between hosts that run the built plugin: whatever happens, no byte of
containers is on the wire in the clear, and nothing is lost.

The wire between the virtual machines is captured from their first frame to their last. A capture
looks for a mark, which is in everything that containers send, and for the containers' MAC
addresses. An emulated processor needs minutes for the plugins, so these are `long`;
`tests/kernel/test_wireguard.py` has the same promises for `driver/kernel` alone.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import pytest

from testbed.images import TOP
from testbed.process import wait_until
from testbed.vm import Guest, Process, guests
from testbed.vm.capture import WireCapture
from tests.vm.plugin_hosts import (
    PluginContainer,
    PluginHost,
    PluginHosts,
    plugin_hosts,
)

BUILT: Final = TOP / "build/plugin"
MARK: Final = b"in the clear: container."
PROGRAM: Final = "/src/tests/vm/programs/marked.py"
PORT: Final = 7300
VXLAN: Final = 4799
NAMESPACE: Final = "/run/freeflow-admin/netns/encryption"
SETTINGS: Final = {"ENCRYPTION_ROTATION": "60"}

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.long,
    pytest.mark.skipif(not (BUILT / "config.json").exists(), reason="needs make plugin"),
]


def address(number: int, container: int = 1) -> str:
    return f"10.78.{number}.{container}"


def marks() -> list[bytes]:
    """The mark, and the MAC address of each container of these tests."""
    macs = [bytes([2, 66, 10, 78, host, one]) for host in (1, 2, 3) for one in (1, 2)]
    return [MARK, *macs]


@contextlib.contextmanager
def encrypted(made: list[Guest]) -> Iterator[tuple[PluginHosts, WireCapture]]:
    """Hosts with an encrypted network, and the capture of all that they send to each other."""
    with (
        made[0].wire.capture(*marks()) as capture,
        plugin_hosts(made, options={"encrypted": "true"}, settings=SETTINGS) as hosts,
    ):
        yield hosts, capture


def ping(source: PluginContainer, target: str, size: int = 600) -> bool:
    """Whether a ping full of marks is answered."""
    pattern = MARK[:16].hex()
    command = ["ping", "-c", "1", "-W", "2", "-s", str(size), "-p", pattern, target]
    return " 0% packet loss" in source.host.guest.run(source.command(command), check=False).stdout


def reach(source: PluginContainer, target: str) -> None:
    try:
        wait_until(f"{source.address} reaches {target}", partial(ping, source, target), 120, 0.5)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{encryption(source.host)}") from error


class MarkedStream:
    """Records with marks from one container to another."""

    def __init__(self, source: PluginContainer, target: PluginContainer, port: int = PORT) -> None:
        self.server = target.start(["python3", "-ES", PROGRAM, "server", str(port)])
        self.server.wait_for("listening")
        command = ["python3", "-ES", PROGRAM, "client", target.address, str(port), MARK.decode()]
        self.client = source.start(command, stdin=True)
        self.client.wait_for("connected", 120)

    def end(self) -> None:
        """End it; every record has arrived once and in order."""
        self.client.write(b"now\n")
        verdicts = [self.verdict(end) for end in (self.client, self.server)]
        assert verdicts[0].startswith("whole "), verdicts
        assert verdicts[0] == verdicts[1]

    @staticmethod
    def verdict(end: Process) -> str:
        assert end.wait(180) == 0, end.errors
        return end.output.splitlines()[-1]


def nothing_in_the_clear(capture: WireCapture) -> None:
    """There were encrypted packets, no plain ones, and no mark anywhere."""
    assert not capture.found, capture.found[0]
    assert capture.sent(f"udp/{VXLAN}") == 0, capture.counts
    assert capture.sent("udp/4797") + capture.sent("udp/4798") > 0, capture.counts


def encryption(host: PluginHost) -> dict[str, Any]:
    """The part of `freeflow status --json` about encryption."""
    found: dict[str, Any] | None = host.status()["encryption"]
    assert found is not None, host.log()[-3000:]
    return found


def device_keys(host: PluginHost) -> frozenset[str]:
    """The keys of peers that the kernel has, in both devices."""
    program = (
        "from pyroute2 import WireGuard\n"
        "for name in ('ffw0', 'ffw1'):\n"
        "    for message in WireGuard().info(name):\n"
        "        for peer in message.get_attr('WGDEVICE_A_PEERS') or ():\n"
        "            print(peer.get_attr('WGPEER_A_PUBLIC_KEY').decode())\n"
    )
    command = ["nsenter", f"--net={NAMESPACE}", "python3", "-c", program]
    return frozenset(host.guest.run(command).stdout.split())


@pytest.fixture(scope="module")
def pair_of_hosts() -> Iterator[tuple[PluginHosts, WireCapture]]:
    """A new kernel and an old one, with a container each; the first sends before the second is
    there.
    """
    with guests(kernels=["6.12", "5.10"], memory=512) as made, encrypted(made) as both:
        hosts, _ = both
        first = hosts.add_container(1)
        # Nobody is there: these packets must not leave the host in the clear.
        early = first.start(["ping", "-i", "0.2", "-p", MARK[:16].hex(), address(2)])
        second = hosts.add_container(2)
        reach(first, second.address)
        early.kill()
        yield both


def test_first_packets(pair_of_hosts: tuple[PluginHosts, WireCapture]) -> None:
    """From its very first packet on a container's bytes are encrypted, in both directions and in
    packets of full size; `freeflow status` says by what.
    """
    hosts, capture = pair_of_hosts
    first, second = (host.containers[address(host.guest.number)] for host in hosts)
    reach(second, first.address)
    mtu = hosts[0].status()["networks"][0]["mtu"]
    assert ping(first, second.address, mtu - 28)
    for host, other in (hosts, hosts[::-1]):
        (peer,) = encryption(host)["peers"]
        assert (peer["address"], peer["data"], peer["reason"]) == (other.address, "wireguard", "")
        assert peer["handshake"] is not None
    nothing_in_the_clear(capture)


def test_foreign_packets(pair_of_hosts: tuple[PluginHosts, WireCapture]) -> None:
    """A plain VXLAN packet with the network's VNI, as a host of an earlier version would send it,
    does not reach a container.
    """
    hosts, _ = pair_of_hosts
    first, second = (host.containers[address(host.guest.number)] for host in hosts)
    vni = hosts[0].status()["networks"][0]["vni"]
    heard = second.start(["tcpdump", "-lni", "eth0", "arp or udp port 9"])
    heard.wait_for("listening on")
    # Who has the second container's address, asked by one that isn't there.
    alien = bytes([2, 66, 10, 78, 9, 9])
    inner = b"\xff" * 6 + alien + struct.pack("!HHHBBH", 0x806, 1, 0x800, 6, 4, 1)
    inner += alien + bytes([10, 78, 9, 9]) + bytes(6) + bytes(map(int, second.address.split(".")))
    packet = struct.pack("!II", 1 << 27, vni << 8) + inner
    program = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"for _ in range(5): s.sendto(bytes.fromhex({packet.hex()!r}), ({hosts[1].address!r}, {VXLAN}))\n"
    )
    with hosts[0].guest.wire.capture(alien) as sent:
        hosts[0].guest.run(["python3", "-ESc", program])
        wait_until("the packets on the wire", lambda: len(sent.found) >= 5, 30)
        # What was sent after them through the tunnel has arrived.
        assert ping(first, second.address)
        first.run(["bash", "-c", f"echo > /dev/udp/{second.address}/9"])
        heard.wait_for(r"\.9: UDP", 60)
    heard.kill()
    assert "10.78.9.9" not in heard.output


def test_restart_and_rotation(pair_of_hosts: tuple[PluginHosts, WireCapture]) -> None:
    """While the plugin and the router are killed and started again, and while both hosts change
    their keys, a stream loses nothing, and nothing is in the clear.
    """
    hosts, _ = pair_of_hosts
    first, second = (host.containers[address(host.guest.number)] for host in hosts)
    # Only the first test's capture has no plain VXLAN packets at all.
    with hosts[0].guest.wire.capture(*marks()) as capture:
        stream = MarkedStream(first, second)
        before = [device_keys(host) for host in hosts]
        hosts[1].kill_plugin()
        assert ping(first, second.address)
        hosts[1].start_plugin()
        slots = [encryption(host)["slot"] for host in hosts]
        for host, slot in zip(hosts, slots, strict=True):
            wait_until(
                f"{host.guest.name}: its keys are rotated",
                lambda host=host, slot=slot: encryption(host)["slot"] != slot,  # type: ignore[misc]
                300,
                2,
            )

        def renewed() -> bool:
            return all(device_keys(host) != keys for host, keys in zip(hosts, before, strict=True))

        wait_until("new standby keys", renewed, 300, 5)
        assert ping(second, first.address)
        stream.end()
    nothing_in_the_clear(capture)


def test_a_capture_finds_what_is_in_the_clear(
    pair_of_hosts: tuple[PluginHosts, WireCapture],
) -> None:
    """The capture that has found nothing finds the mark when a host itself sends it."""
    hosts, _ = pair_of_hosts
    with hosts[0].guest.wire.capture(*marks()) as capture:
        send = f"echo '{MARK.decode()}' > /dev/udp/{hosts[1].address}/9"
        hosts[0].guest.run(["bash", "-c", send])
        wait_until("the mark", lambda: bool(capture.found), 30)
    assert capture.found[0][:2] == (1, "udp/9")
