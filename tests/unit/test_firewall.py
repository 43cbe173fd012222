"""Which rules of a host's firewall may match the overlay's packets. In doubt, a rule counts."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest

from driver.kernel import guard_rules
from driver.kernel.firewall import Packets, obstacle

PACKETS = Packets(
    ports=frozenset({4799}),
    devices={2: "eth0"},
    own=frozenset({IPv4Address("192.0.2.1")}),
    peers=frozenset({IPv4Address("192.0.2.2"), IPv4Address("192.0.2.3")}),
)


def base(hook: str, policy: str = "accept", **more: Any) -> Any:
    made = {"family": "ip", "table": "t", "name": hook, "type": "filter", "hook": hook}
    return {"chain": {**made, "policy": policy, **more}}


def rule(chain: str, *expressions: Any) -> Any:
    return {"rule": {"family": "ip", "table": "t", "chain": chain, "expr": list(expressions)}}


def match(left: Any, right: Any, op: str = "==") -> Any:
    return {"match": {"op": op, "left": left, "right": right}}


def payload(protocol: str, field: str) -> Any:
    return {"payload": {"protocol": protocol, "field": field}}


def meta(key: str) -> Any:
    return {"meta": {"key": key}}


DPORT, SADDR, DADDR = payload("udp", "dport"), payload("ip", "saddr"), payload("ip", "daddr")
DROP, ACCEPT, COUNTER = {"drop": None}, {"accept": None}, {"counter": {"packets": 0, "bytes": 0}}

HARMLESS = {
    "another port": [match(DPORT, 53), DROP],
    "a range of other ports": [match(DPORT, {"range": [1, 4798]}), DROP],
    "a set of other ports": [match(DPORT, {"set": [53, 4789]}), DROP],
    "TCP": [match(payload("tcp", "dport"), 4799), DROP],
    "by the protocol's name": [match(meta("l4proto"), "tcp"), DROP],
    "by the protocol's number": [match(payload("ip", "protocol"), 6), DROP],
    "IPv6": [match(payload("ip6", "saddr"), "::1"), DROP],
    "another device": [match(meta("iifname"), "docker0"), DROP],
    "devices of a kind": [match(meta("iifname"), "br-*"), DROP],
    "another source": [match(SADDR, {"prefix": {"addr": "172.16.0.0", "len": 12}}), DROP],
    "all but the peers": [match(SADDR, {"prefix": {"addr": "192.0.2.0", "len": 24}}, "!="), DROP],
    "another destination": [match(DADDR, "172.18.0.2"), DROP],
    "invalid packets": [match({"ct": {"key": "state"}}, ["invalid"], "in"), DROP],
    "a counter": [COUNTER],
    "a rule that accepts": [match(DPORT, 4799), ACCEPT],
}
HARMFUL = {
    "the port": [match(DPORT, 4799), DROP],
    "a range with the port": [match(DPORT, {"range": [4000, 5000]}), COUNTER, DROP],
    "a set by name": [match(DPORT, "@blocked"), DROP],
    "one of the peers": [match(SADDR, "192.0.2.3"), DROP],
    "the device": [match(meta("iifname"), "eth0"), {"reject": None}],
    "all devices but one": [match(meta("iifname"), "docker0", "!="), DROP],
    "everything": [DROP],
    "a state": [match({"ct": {"key": "state"}}, ["new"], "in"), DROP],
    "a condition that isn't known": [match(meta("length"), 100), DROP],
    "a condition of iptables": [{"xt": {"type": "match", "name": "u32"}}, DROP],
    "a target of iptables": [{"xt": {"type": "target", "name": "TPROXY"}}],
    "something of iptables": [{"xt": None}],
    "a mark": [{"mangle": {"key": {"meta": {"key": "mark"}}, "value": 1}}],
    "a log": [{"log": {"prefix": "x"}}],
    "a queue": [{"queue": {"num": 1}}],
    "a limit": [{"limit": {"rate": 1, "per": "second"}}, DROP],
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("hook", ["prerouting", "input"])
def test_a_rule_that_means_others(name: str, hook: str) -> None:
    """A rule that can't match the packets, or accepts them, is no obstacle."""
    assert obstacle([base(hook), rule(hook, *HARMLESS[name])], PACKETS) == ""


@pytest.mark.parametrize("name", HARMFUL)
def test_a_rule_that_may_mean_them(name: str) -> None:
    """A rule that may match some of the packets and does more than count is an obstacle, named by
    its chain."""
    said = obstacle([base("input"), rule("input", *HARMFUL[name])], PACKETS)
    assert "chain input of table ip t" in said


def test_what_leaves_is_the_other_way_round() -> None:
    """At output, source and destination are swapped, and the device is the outgoing one."""
    own = [match(SADDR, "192.0.2.1"), DROP]
    assert obstacle([base("output"), rule("output", *own)], PACKETS)
    assert not obstacle([base("input"), rule("input", *own)], PACKETS)
    out = [match(meta("oifname"), "eth0"), DROP]
    assert obstacle([base("postrouting"), rule("postrouting", *out)], PACKETS)


def test_a_policy_of_drop() -> None:
    """A chain with a drop policy is an obstacle, unless a rule surely accepts all of the
    packets."""
    assert "its policy is drop" in obstacle([base("input", "drop")], PACKETS)
    every = rule("input", match(DPORT, 4799), ACCEPT)
    assert obstacle([base("input", "drop"), every], PACKETS) == ""
    some = rule("input", match(SADDR, "192.0.2.2"), match(DPORT, 4799), ACCEPT)
    assert obstacle([base("input", "drop"), some], PACKETS)
    perhaps = rule("input", match({"ct": {"key": "state"}}, ["established"], "in"), ACCEPT)
    assert obstacle([base("input", "drop"), perhaps], PACKETS)
    assert obstacle([base("input", "drop"), rule("input", COUNTER), every], PACKETS) == ""


def test_rules_after_acceptance_do_not_count() -> None:
    """Rules after one that surely accepts don't count; rules before it do."""
    every = rule("input", match(DPORT, 4799), ACCEPT)
    assert obstacle([base("input"), every, rule("input", DROP)], PACKETS) == ""
    assert obstacle([base("input"), rule("input", DROP), every], PACKETS)


def test_chains_that_are_jumped_to() -> None:
    """The target of a jump counts if the jump may match the packets; endless jumps are an
    obstacle."""
    deep = {"chain": {"family": "ip", "table": "t", "name": "deep"}}
    jump = rule("input", {"jump": {"target": "deep"}})
    elsewhere = rule("input", match(meta("iifname"), "docker0"), {"jump": {"target": "deep"}})
    drop, give = rule("deep", DROP), rule("deep", {"return": None})
    assert obstacle([base("input"), deep, jump, drop], PACKETS)
    assert not obstacle([base("input"), deep, elsewhere, drop], PACKETS)
    assert not obstacle([base("input"), deep, jump, give, drop], PACKETS)
    accept = rule("deep", match(DPORT, 4799), ACCEPT)
    assert not obstacle([base("input", "drop"), deep, jump, accept], PACKETS)
    again = rule("deep", {"jump": {"target": "deep"}})
    assert "deep" in obstacle([base("input"), deep, jump, again], PACKETS)


def test_hooks_that_it_does_not_pass() -> None:
    """FORWARD, other families and other devices' ingress never see the packets."""
    assert not obstacle([base("forward", "drop")], PACKETS)
    assert not obstacle([base("input", "drop", family="ip6")], PACKETS)
    netdev = base("ingress", "drop", family="netdev", dev="eth1")
    assert not obstacle([netdev], PACKETS)
    assert obstacle([base("ingress", "drop", family="netdev", dev="eth0")], PACKETS)
    assert obstacle([base("ingress", "drop", family="netdev", dev=["eth1", "eth0"])], PACKETS)


def test_own_rules_are_no_obstacle() -> None:
    """The plugin's own table doesn't count; one of the same name in another family does."""
    own = [base("input", family="inet"), rule("input", DROP)]
    own[1]["rule"]["family"] = "inet"
    assert obstacle(own, PACKETS)
    for item in own:
        next(iter(item.values()))["table"] = guard_rules.NAME
    assert not obstacle(own, PACKETS)
    for item in own:
        next(iter(item.values()))["family"] = "ip"
    assert obstacle(own, PACKETS)
