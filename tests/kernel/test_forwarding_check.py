"""Which rules of a container make it count as forwarding, on a real kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from driver.kernel import nf_tables, nft
from driver.kernel.forwarding_check import may_forward
from driver.kernel.namespace import in_netns
from testbed.kernel_hosts import new_namespace, write_vips

DOCKER = (
    "add table ip nat\n"
    "add chain ip nat OUTPUT { type nat hook output priority -100; }\n"
    "add chain ip nat POSTROUTING { type nat hook postrouting priority 100; }\n"
    "add chain ip nat DOCKER_OUTPUT\n"
    "add chain ip nat DOCKER_POSTROUTING\n"
    "add rule ip nat OUTPUT ip daddr 127.0.0.11 jump DOCKER_OUTPUT\n"
    "add rule ip nat POSTROUTING ip daddr 127.0.0.11 counter jump DOCKER_POSTROUTING\n"
    "add rule ip nat DOCKER_POSTROUTING ip saddr 127.0.0.11 udp sport 4000 snat to :53\n"
)


@pytest.fixture
def namespace() -> Iterator[int]:
    made = new_namespace()
    yield made
    os.close(made)


def test_what_every_container_has_is_nothing(namespace: int) -> None:
    """Docker's rules for its DNS and our VIP rules rewrite no received packets."""
    assert not may_forward(namespace)
    nft.run(DOCKER, namespace)
    assert not may_forward(namespace)
    write_vips(namespace, {IPv4Address("10.0.0.2"): (IPv4Address("10.0.0.3"),)})
    assert not may_forward(namespace)
    nft.run(
        "add table inet a\n"
        "add chain inet a pre { type nat hook prerouting priority 0; }\n"
        "add chain inet a in { type filter hook prerouting priority 0; }\n"
        "add rule inet a in counter\n",
        namespace,
    )
    assert not may_forward(namespace)


@pytest.mark.parametrize("tool", ["iptables-nft", "iptables-legacy"])
def test_docker_rules_by_iptables(namespace: int, tool: str) -> None:
    """Docker's rules written by iptables-nft are recognised; those of iptables-legacy aren't
    read."""
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")

    def run(*arguments: str) -> None:
        command = [tool, "--wait", "-t", "nat", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    in_netns(namespace, lambda: run("-N", "DOCKER_POSTROUTING"))
    in_netns(
        namespace, lambda: run("-I", "POSTROUTING", "-d", "127.0.0.11", "-j", "DOCKER_POSTROUTING")
    )
    assert may_forward(namespace) == (tool == "iptables-legacy")
    in_netns(namespace, lambda: run("-A", "POSTROUTING", "-j", "MASQUERADE"))
    assert may_forward(namespace)


@pytest.mark.parametrize(
    "rules",
    [
        "add chain ip t pre { type nat hook prerouting priority 0; }\n"
        "add rule ip t pre dnat to 10.0.0.1\n",
        DOCKER + "add rule ip nat POSTROUTING masquerade\n",
        "add table inet t\n"
        "add chain inet t post { type nat hook postrouting priority 0; }\n"
        "add rule inet t post ip daddr 10.0.0.0/8 masquerade\n",
        "add table inet t\n"
        "add chain inet t post { type nat hook postrouting priority 0; }\n"
        "add rule inet t post ip daddr != 127.0.0.11 masquerade\n",
        "add table inet freeflow\n"
        "add chain inet freeflow post { type nat hook postrouting priority 0; }\n"
        "add rule inet freeflow post masquerade\n",
        "add table netdev t\n"
        "add chain netdev t in { type filter hook ingress device lo priority 0; }\n",
    ],
    ids=["dnat", "masquerade", "inet", "not dns", "our name", "netdev"],
)
def test_who_rewrites_passes_on(namespace: int, rules: str) -> None:
    """Rules at prerouting or postrouting rewrite received packets, or replies; a netdev chain may
    forward them."""
    nft.run("add table ip t\n" + rules, namespace)
    assert may_forward(namespace)


def test_more_than_is_read_passes_on(namespace: int) -> None:
    """A container with more chains than are read counts as forwarding."""
    chains = "".join(f"add chain ip t c{n}\n" for n in range(nf_tables.MOST + 1))
    nft.run("add table ip t\n", namespace)
    assert not may_forward(namespace)
    nft.run(chains, namespace)
    assert may_forward(namespace)
