"""What `freeflow doctor` reads off the kernel, each in a network namespace of its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import pytest
from pyroute2 import IPRoute

from driver.kernel import nft
from driver.kernel.namespace import isolated
from plugin.cli.doctor import (
    check_firewall,
    check_kernel,
    check_leftovers,
    check_port,
    links,
)
from plugin.status import Finding
from tests.unit.documented import is_documented
from tests.unit.statuses import EP, status

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")

T = TypeVar("T")


def said(checked: Iterable[Finding]) -> list[str]:
    """What was found; each of it is in docs/troubleshooting.md."""
    findings = list(checked)
    assert all(is_documented(finding.what) for finding in findings)
    return [finding.what for finding in findings]


def alone(prepare: Callable[[IPRoute], object], look: Callable[[], T]) -> T:
    """What `look` sees in a namespace that `prepare` has furnished."""

    def body() -> T:
        with IPRoute() as route:
            route.link("set", index=1, state="up")
            prepare(route)
        return look()

    return isolated(body)


def nothing(route: IPRoute) -> None:
    """Furnish nothing."""


def test_kernel_has_what_is_needed() -> None:
    """This machine's kernel passes, and the probes leave nothing behind."""
    assert check_kernel() == []
    assert not list(Path("/sys/class/net").glob("probe*"))


def test_links_are_read_with_kind_and_port() -> None:
    """VXLAN devices are told with their UDP port."""

    def prepare(route: IPRoute) -> None:
        route.link("add", ifname="vx0", kind="vxlan", vxlan_id=7, vxlan_port=4799)
        route.link("add", ifname="br0", kind="bridge")

    found = {link.name: (link.type, link.vni, link.port) for link in alone(prepare, links)}
    assert found["vx0"] == ("vxlan", 7, 4799)
    assert found["br0"] == ("bridge", 0, 0)


def test_port_that_is_free() -> None:
    """A free port passes, and the probe doesn't keep it."""
    assert alone(nothing, lambda: [*check_port({4799}), *check_port({4799})]) == []


def test_port_that_a_program_holds() -> None:
    """A port that a program holds is named."""

    def look() -> list[str]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
            holder.bind(("127.0.0.1", 4799))
            return said(check_port({4799, 4800}))

    assert alone(nothing, look) == ["a program holds FreeFlow's UDP port 4799"]


RULES = "add table inet f\nadd chain inet f in {{ type filter hook input priority 0; policy {policy}; }}\n{rule}"


@pytest.mark.parametrize(
    ("policy", "rule", "findings"),
    [
        ("accept", "", 0),
        ("drop", "", 1),
        ("drop", "add rule inet f in udp dport 4799 accept\n", 0),
        ("drop", "add rule inet f in udp dport { 53, 4799 } accept\n", 0),
        ("drop", "add rule inet f in udp dport 14799 accept\n", 1),
    ],
)
def test_firewall(policy: str, rule: str, findings: int) -> None:
    """A firewall that drops by default and doesn't name our port is found, another isn't."""

    def look() -> list[str]:
        nft.run(RULES.format(policy=policy, rule=rule))
        return said(check_firewall({4799}))

    found = alone(nothing, look)
    assert found == ["the firewall may drop UDP port 4799"] * findings


def test_no_firewall() -> None:
    """Without any rules there is no finding."""
    assert alone(nothing, lambda: list(check_firewall({4799}))) == []


def test_leftovers(tmp_path: Path) -> None:
    """Our links that no endpoint has are named, others aren't."""

    def prepare(route: IPRoute) -> None:
        route.link("add", ifname="ffc000000000001", kind="veth", peer="other0")
        route.link("add", ifname=f"ffc{EP[:12]}", kind="veth", peer="other1")

    found = alone(prepare, lambda: list(check_leftovers(tmp_path, status())))
    assert said(found) == ["1 link without an endpoint: ffc000000000001"]
