"""Which RDMA device is used, and why none is, where none can be: with fake devices."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import pytest

from dataplane.router import device_scanner, devices
from dataplane.router.device_scanner import NO_ADDRESS, DeviceScanner, decode, offer_devices
from dataplane.router.devices import (
    INFINIBAND,
    NO_DEVICE,
    NO_PYVERBS,
    ROCE,
    ROCE_V1,
    DevicePort,
    DeviceScan,
    Gid,
    Unusable,
    choose,
)
from dataplane.router.loop import EpollLoop
from testbed.patience import patience

V4, V6 = ip_address("192.0.2.1"), ip_address("2001:db8::1")
LOCAL = Gid(0, ROCE, IPv6Address("fe80::1"))


def gid(index: int, address: str, kind: str = ROCE) -> Gid:
    return Gid(index, kind, IPv6Address(address))


def port(*gids: Gid, name: str = "mlx5_0", number: int = 1, active: bool = True) -> DevicePort:
    return DevicePort(name, number, active, 4096, gids)


@pytest.mark.parametrize(
    ("address", "gids", "index"),
    [
        (V4, (LOCAL, gid(1, "::ffff:192.0.2.1")), 1),
        (V4, (gid(2, "::ffff:192.0.2.1", ROCE_V1), gid(3, "::ffff:192.0.2.1")), 3),
        (V6, (LOCAL, gid(4, "2001:db8::1")), 4),
    ],
)
def test_roce(address: devices.IPAddress, gids: tuple[Gid, ...], index: int) -> None:
    """The GID with the underlay's address is used for RoCE v2, never that for RoCE v1."""
    scan = choose(address, [port(*gids)])
    assert scan.device is not None
    assert (scan.device.gid_index, scan.device.kind, scan.why) == (index, ROCE, "")


@pytest.mark.parametrize(
    ("address", "shown"), [("::ffff:192.0.2.1", "192.0.2.1"), ("2001:db8::1", "2001:db8::1")]
)
def test_text(address: str, shown: str) -> None:
    """A device's text has the IPv4 address in place of the GID that it is mapped to."""
    device = devices.Device("rxe0", 1, 3, address, ROCE, 1024)
    assert str(device) == f"rxe0 port 1, RoCE v2 {shown} (GID 3)"


def test_infiniband() -> None:
    """On InfiniBand, the port is used whose GID the interface with the underlay's address has."""
    ports = [
        port(gid(0, "fe80::a", INFINIBAND)),
        port(gid(0, "fe80::b", INFINIBAND), name="mlx5_1"),
    ]
    scan = choose(V4, ports, frozenset({IPv6Address("fe80::b").packed}))
    assert scan.device is not None
    assert (scan.device.name, scan.device.kind) == ("mlx5_1", INFINIBAND)


@pytest.mark.parametrize(
    ("ports", "why"),
    [
        ((), NO_DEVICE),
        ((port(LOCAL),), "mlx5_0: port 1 doesn't have the underlay's address 192.0.2.1"),
        ((port(gid(1, "::ffff:192.0.2.1"), active=False),), "mlx5_0: port 1 is not active"),
        (
            (port(gid(1, "::ffff:192.0.2.1", ROCE_V1)),),
            "mlx5_0: it has 192.0.2.1 for RoCE v1 only",
        ),
        (
            (Unusable("rxe0", 0, "it can't be opened"), port(LOCAL)),
            "rxe0: it can't be opened (1 more: freeflow doctor)",
        ),
    ],
)
def test_why_not(ports: tuple[DevicePort | Unusable, ...], why: str) -> None:
    """Where no device can be used, the result says why, and for each device that was checked."""
    scan = choose(V4, ports)
    assert (scan.device, scan.why) == (None, why)
    assert len(scan.unusable) == len(ports)


def test_one_of_two() -> None:
    """Of two ports with the address the first is used, and the other says so."""
    both = [port(gid(1, "::ffff:192.0.2.1"), number=n) for n in (1, 2)]
    scan = choose(V4, both)
    assert scan.device is not None
    assert scan.device.port == 1
    assert scan.unusable == (Unusable("mlx5_0", 2, "mlx5_0 is used"),)


def test_without_pyverbs() -> None:
    """A host without pyverbs has no device, and no error."""

    def ports() -> Iterator[DevicePort]:
        raise ImportError

    assert devices.find(V4, ports) == DeviceScan(None, NO_PYVERBS)


def test_interfaces_of_an_address(tmp_path: Path) -> None:
    """An InfiniBand interface is recognised by its type and its address. Others have no GID."""
    folder = tmp_path / "lo"
    folder.mkdir()
    (folder / "type").write_text("32\n")
    (folder / "address").write_text(":".join(["80", "00", "02", "08", *["fe"] * 16]) + "\n")
    loopback, elsewhere = ip_address("127.0.0.1"), ip_address("192.0.2.77")
    assert devices.ipoib_gids(loopback, tmp_path) == {b"\xfe" * 16}
    assert devices.ipoib_gids(elsewhere, tmp_path) == frozenset()
    (folder / "type").write_text("772\n")
    assert devices.ipoib_gids(loopback, tmp_path) == frozenset()


def test_what_it_prints_can_be_read() -> None:
    """The router reads each result that a scan prints. An invalid one gives a reason, not an
    error.
    """
    for scan in (
        choose(V4, [port(gid(1, "::ffff:192.0.2.1")), Unusable("rxe0", 0, "why")]),
        DeviceScan(None, NO_DEVICE),
    ):
        assert decode(devices.encode(scan)) == scan
    for text in ("", "[]", "{}", '{"device": {"name": 1}, "why": "", "unusable": []}'):
        assert decode(text).device is None
        assert decode(text).why


def run(loop: EpollLoop, epoll: select.epoll, seconds: float = 10.0) -> Iterator[None]:
    """The loop, a round at a time."""
    deadline = time.monotonic() + patience(seconds)
    while time.monotonic() < deadline:
        for descriptor, events in epoll.poll(loop.timeout(0.05)):
            loop.serve(descriptor, events)
        loop.fire()
        yield
    raise AssertionError("nothing came of it")


def test_scanner() -> None:
    """The scanner reports what a real process found, and scans at once only for another address."""
    epoll = select.epoll()
    loop = EpollLoop(epoll)
    changes: list[DeviceScan] = []
    made = DeviceScanner(loop, lambda: changes.append(made.result))
    assert made.result == NO_ADDRESS
    made.use(V4)
    for _ in run(loop, epoll):
        if len(changes) == 2:
            break
    # The devices of this machine are unknown. What counts is that the process answered.
    assert made.result.device is not None or made.result.why
    made.use(V4)
    assert len(changes) == 2
    made.use(None)
    assert made.result == NO_ADDRESS
    made.close()


@pytest.mark.parametrize("script", ["import time; time.sleep(60)", "raise SystemExit(1)"])
def test_a_scan_that_fails(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan that hangs is killed, and one that fails gives a reason. Neither makes the loop
    wait.
    """
    monkeypatch.setattr(device_scanner, "PATIENCE", 0.2)
    epoll = select.epoll()
    loop = EpollLoop(epoll)
    changes: list[DeviceScan] = []
    made = DeviceScanner(loop, lambda: changes.append(made.result), [sys.executable, "-c", script])
    made.use(V4)
    for _ in run(loop, epoll):
        if len(changes) == 2:
            break
    assert made.result.device is None
    assert made.result.why
    made.close()


def test_devices_of_the_host(tmp_path: Path) -> None:
    """The plugin's /dev/infiniband is the host's, even if that appears later. An existing one
    stays.
    """
    host, own = tmp_path / "host/infiniband", tmp_path / "dev/infiniband"
    own.parent.mkdir()
    offer_devices(host, own)
    assert not own.is_symlink()
    host.parent.mkdir()
    offer_devices(host, own)
    offer_devices(host, own)
    host.mkdir()
    assert own.resolve() == host
