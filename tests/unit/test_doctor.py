"""`freeflow doctor`: from facts to findings. What it reads off the kernel is in
`tests/kernel/test_doctor.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from driver.kernel.rtnl import NetDevice
from plugin.cli.client import Client, Engine
from plugin.cli.doctor import (
    check_clashes,
    check_engine,
    check_guard,
    check_peers,
    check_plugin,
    offload_notes,
    service_notes,
)
from plugin.status import Finding, GuardStatus, PeerStatus, ServiceStatus, Status
from tests.unit.documented import is_documented
from tests.unit.sockets import engine, served
from tests.unit.statuses import finding, host, network, status


def link(name: str, kind: str = "", port: int = 0) -> NetDevice:
    return NetDevice(1, name, kind, 0, 0, port=port)


def only(findings: Iterable[Finding]) -> Finding:
    """The only finding, complete and documented."""
    (found,) = findings
    assert found.severity in ("error", "warning")
    assert found.what
    assert found.cause
    assert found.remedy
    assert is_documented(found.what)
    return found


# --- the engine and the plugin


@pytest.mark.parametrize(
    "version", ["20.10.24+dfsg1", "26.1.5", "28.5.2", "29.0.3", "29.1.0", "129.0.1"]
)
def test_good_engines(tmp_path: Path, version: str) -> None:
    """Engines without known crashes pass."""
    with served(engine({"/version": {"Version": version}}), tmp_path / "s") as path:
        assert list(check_engine(Engine(path))) == []


@pytest.mark.parametrize("version", ["29.0.0", "29.0.1", "29.0.2", "29.0.2-rc.1"])
def test_engines_that_crash(tmp_path: Path, version: str) -> None:
    """Engines that crash with remote network drivers are named, with the version to upgrade to
    (moby#51554).
    """
    with served(engine({"/version": {"Version": version}}), tmp_path / "s") as path:
        found = only(check_engine(Engine(path)))
    assert version in found.what
    assert "moby#51554" in found.cause
    assert "29.0.3" in found.remedy


def test_silent_engine(tmp_path: Path) -> None:
    """An engine that doesn't answer is a finding."""
    found = only(check_engine(Engine(tmp_path / "none")))
    assert (found.severity, found.remedy) == ("error", "systemctl status docker")


def test_plugin_that_does_not_run(tmp_path: Path) -> None:
    """A plugin that doesn't answer is a finding with a remedy, and there is no status."""
    found: dict[str, Status] = {}
    client = Client(tmp_path / "none", Engine(tmp_path / "none"))
    assert only(check_plugin(client, found)).what == "the plugin is not running"
    assert found == {}


def test_what_status_finds_is_found(tmp_path: Path) -> None:
    """doctor includes the problems of `freeflow status`."""
    answer = msgspec.to_builtins(status(problems=[finding()]))
    found: dict[str, Status] = {}
    with served(engine({"/admin/status": answer}), tmp_path / "s") as path:
        client = Client(path, Engine(tmp_path / "none"))
        assert list(check_plugin(client, found)) == [finding()]
    assert found["status"].version == "0.1.0"


# --- other overlays


def test_no_clashes() -> None:
    """Usual interfaces and Docker's own overlay are no conflict."""
    present = [
        link("lo"),
        link("eth0", "veth"),
        link("docker0", "bridge"),
        link("vx-001", "vxlan", 4789),
    ]
    assert list(check_clashes({4799}, present)) == []


@pytest.mark.parametrize(
    ("link", "who"),
    [
        (link("weave", "bridge"), "Weave Net"),
        (link("flannel.1", "vxlan", 8472), "flannel"),
        (link("cilium_vxlan", "vxlan", 8472), "Cilium"),
        (link("cali1234", "veth"), "Calico"),
        (link("vxlan.calico", "vxlan", 4789), "Calico"),
        (link("vxlan_sys_4789", "vxlan", 4789), "Open vSwitch"),
    ],
)
def test_other_overlays(link: NetDevice, who: str) -> None:
    """Another overlay on the host is named, whatever kind its devices are (weave#3116)."""
    found = only(check_clashes({4799}, [link]))
    assert found.severity == "warning"
    assert link.name in found.what
    assert who in found.what


def test_our_port_is_taken_by_a_device() -> None:
    """A VXLAN device of another program on our port is an error, with a port that is free."""
    found = only(check_clashes({4799, 4800}, [link("vx0", "vxlan", 4799)]))
    assert found.severity == "error"
    assert "VXLAN_PORT=4801" in found.remedy


# --- peers

PEERS = [PeerStatus("host1", "192.0.2.1", own=True), PeerStatus("host2", "192.0.2.2")]


def test_peers_that_answer() -> None:
    """Each other host is pinged once, with a small and a full packet; this one and IPv6 ones
    aren't.
    """
    tried = []

    def passes(address: str, size: int) -> bool:
        tried.append((address, size))
        return True

    peers = [*PEERS, PeerStatus("six", "2001:db8::2")]
    found = status(networks=[network(peers=peers), network(peers=peers)])
    assert list(check_peers(found, passes)) == []
    assert tried == [("192.0.2.2", 64), ("192.0.2.2", 1500)]


def test_peer_that_is_silent() -> None:
    """A peer that doesn't answer is named with its address, and its MTU is not a finding."""
    found = only(check_peers(status(networks=[network(peers=PEERS)]), lambda address, size: False))
    assert found.what == "peer host2 (192.0.2.2) does not answer a ping on the underlay"


def test_path_with_a_smaller_mtu() -> None:
    """Full packets that are lost while small ones pass are an error with the size."""
    facts = status(networks=[network(peers=PEERS)], host=host(underlay_mtu=9000))
    found = only(check_peers(facts, lambda address, size: size < 1500))
    assert found.severity == "error"
    assert found.what == "packets of 9000 bytes don't reach peer host2 (192.0.2.2)"


def test_peer_without_a_name() -> None:
    """A peer whose name isn't known is named by its address alone."""
    facts = status(networks=[network(peers=[PeerStatus("", "192.0.2.9")])])
    assert "peer 192.0.2.9 does not" in only(check_peers(facts, lambda address, size: False)).what


def test_services_too_large_for_dns() -> None:
    """A service whose tasks Docker's DNS doesn't tell is noted, with a remedy."""
    large = ServiceStatus("web", "10.0.4.2", ["10.0.4.7"] * 3, by_list=True)
    found = status(networks=[network(services=[large])])
    (note,) = service_notes(found)
    assert "service web on network backend" in note
    assert "dnsrr" in note
    assert service_notes(status()) == []


# --- strangers at the overlay's port


def test_strangers() -> None:
    """Addresses that sent to the overlay's port and are no peers are named, the first few of
    many.
    """
    assert list(check_guard(status())) == []
    assert list(check_guard(msgspec.structs.replace(status(), guard=GuardStatus([4799])))) == []
    many = [f"192.0.2.{number}" for number in range(10)]
    found = only(
        check_guard(msgspec.structs.replace(status(), guard=GuardStatus([4799], "", many)))
    )
    assert "192.0.2.0" in found.what
    assert "7 more" in found.what
    assert "192.0.2.9" not in found.what


@pytest.mark.parametrize(
    ("offload", "text"),
    [
        (True, "underlay: eth0 segments UDP tunnels"),
        (False, "doesn't segment UDP tunnels"),
        (None, ""),
    ],
)
def test_tunnel_offload(offload: bool | None, text: str) -> None:
    """Doctor says where bulk data goes, as far as the kernel says what the device can."""
    notes = offload_notes(status(host=host(tunnel_offload=offload)))
    assert (text in notes[0]) if text else not notes
