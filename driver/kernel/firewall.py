"""Checks whether a rule of the host's firewall may match the overlay's packets.

Packets that the fast path encapsulates or decapsulates bypass the hooks of the host's namespace. So
we read the rules at these hooks: those of nftables, which include iptables' own in today's
distributions, and the tables of iptables-legacy. A rule is harmless if one of its conditions can't
hold for a UDP packet between this host and a peer on the overlay's port, or if it only counts. An
unknown expression counts as harmful: the packets then stay on the kernel path.

Why the conditions are evaluated, and not just "any rule but Docker's own": firewalld is on by
default in the distributions of the Red Hat family, and ufw is common on Ubuntu. Both have rules and
drop policies at these hooks that accept the overlay's port once it is opened. Without evaluation
those hosts would lose the fast path to other hosts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Any, Final

from driver.errors import KernelError
from driver.kernel import guard_rules
from driver.kernel.namespace import in_netns
from driver.kernel.nft import Session

_IN: Final = ("ingress", "prerouting", "input")
_OUT: Final = ("output", "postrouting", "egress")
_FAMILIES: Final = ("ip", "inet", "netdev")
_DEEPEST: Final = 16
_HARMLESS: Final = ("counter", "comment")
_LEGACY: Final = Path("/proc/thread-self/net/ip_tables_names")
SHARE: Final = 20
"""The rules are read again after so many times as long as reading them took."""
LEAST: Final = 2.0
"""Least seconds between two reads."""


@dataclass(frozen=True, slots=True)
class Packets:
    """The overlay's packets: UDP to `ports`, through `devices`, between `own` addresses and
    `peers`."""

    ports: frozenset[int]
    devices: Mapping[int, str]
    own: frozenset[IPv4Address]
    peers: frozenset[IPv4Address]

    def inward(self, hook: str) -> bool:
        return hook in _IN


def _among(values: Iterable[object], right: Any) -> bool | None:
    """Whether a rule's operand equals all of the values (True), none (False), or perhaps some
    (None)."""
    found = {_is(value, right) for value in values}
    if found == {True}:
        return True
    return False if found <= {False} else None


def _is(value: object, right: Any) -> bool | None:
    if isinstance(right, str) and right.startswith("@"):
        return None
    if isinstance(right, list):
        return _any(_is(value, item) for item in right)
    if isinstance(right, dict):
        return _is_in(value, right)
    if isinstance(value, IPv4Address):
        return str(value) == str(right)
    if isinstance(right, str) and right.endswith("*") and isinstance(value, str):
        return value.startswith(right[:-1])
    return str(value) == str(right)


def _any(answers: Iterable[bool | None]) -> bool | None:
    found = set(answers)
    if True in found:
        return True
    return None if None in found else False


def _is_in(value: object, right: dict[str, Any]) -> bool | None:
    if "set" in right:
        return _any(_is(value, item) for item in right["set"])
    if "elem" in right:
        return _is(value, right["elem"].get("val"))
    if "range" in right:
        low, high = right["range"]
        if isinstance(value, IPv4Address):
            return IPv4Address(low) <= value <= IPv4Address(high)
        if isinstance(value, int) and isinstance(low, int):
            return low <= value <= int(high)
        return None
    if "prefix" in right and isinstance(value, IPv4Address):
        prefix = right["prefix"]
        try:
            return value in ip_network((prefix["addr"], int(prefix["len"])), strict=False)
        except ValueError:
            return False
    return None


def _values(left: dict[str, Any], packets: Packets, hook: str) -> Iterable[object] | None:
    """The packets' values of a rule's operand; None: unknown; empty: they have no such field."""
    inward = packets.inward(hook)
    if "payload" in left:
        protocol, name = left["payload"].get("protocol"), left["payload"].get("field")
        if protocol == "ip":
            return {
                "saddr": packets.peers if inward else packets.own,
                "daddr": packets.own if inward else packets.peers,
                "protocol": ("udp",),
                "version": (4,),
            }.get(str(name))
        if protocol in ("udp", "th"):
            return packets.ports if name == "dport" else None
        # Raw bytes may be anything; the packets contain no other protocols.
        return None if protocol is None or protocol == "ether" else ()
    if "meta" in left:
        names = tuple(packets.devices.values())
        known: dict[str, Sequence[object]] = {
            "l4proto": ("udp",),
            "protocol": ("ip",),
            "nfproto": ("ipv4",),
        }
        known |= {"iifname": names, "iif": names} if inward else {"oifname": names, "oif": names}
        return known.get(str(left["meta"].get("key")))
    return None


_NUMBERS: Final = {17: "udp", "17": "udp", 2: "ipv4", "2": "ipv4", 0x800: "ip", "2048": "ip"}


def _named(right: Any) -> Any:
    """Protocols by name: listings contain some as numbers."""
    if isinstance(right, list):
        return [_named(item) for item in right]
    if isinstance(right, dict) and "set" in right:
        return {"set": [_named(item) for item in right["set"]]}
    return _NUMBERS.get(right, right) if isinstance(right, (int, str)) else right


def _matches(match: dict[str, Any], packets: Packets, hook: str) -> bool | None:
    left, right, operator = match.get("left"), match.get("right"), match.get("op", "==")
    if not isinstance(left, dict):
        return None
    if "ct" in left and left["ct"].get("key") == "state" and operator in ("==", "in"):
        states = right if isinstance(right, list) else [right]
        states = right["set"] if isinstance(right, dict) and "set" in right else states
        # Only a malformed UDP packet is invalid, and the fast path doesn't take those.
        return False if set(map(str, states)) <= {"invalid", "untracked"} else None
    values = _values(left, packets, hook)
    if values is None:
        return None
    by_name = "meta" in left or left.get("payload", {}).get("field") == "protocol"
    answer = _among(values, _named(right) if by_name else right)
    if operator in ("==", "in"):
        return answer
    if operator == "!=":
        # Packets without the field match neither way.
        return (None if answer is None else not answer) if values else False
    return None


class _Rules:
    """A listing of rules, checked for rules that may match the packets."""

    def __init__(self, objects: Iterable[dict[str, Any]], packets: Packets) -> None:
        self._packets = packets
        self._chains: list[dict[str, Any]] = []
        self._rules: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for item in objects:
            if guard_rules.own(item):
                # Our own table accepts all of these packets.
                continue
            if "chain" in item:
                self._chains.append(item["chain"])
            elif "rule" in item:
                rule = item["rule"]
                key = (rule["family"], rule["table"], rule["chain"])
                self._rules.setdefault(key, []).append(rule)

    def obstacle(self) -> str:
        """The first rule or policy that may drop or change the packets; empty if there is none."""
        for chain in self._chains:
            hook = str(chain.get("hook", ""))
            if chain["family"] not in _FAMILIES or hook not in (*_IN, *_OUT):
                continue
            if chain["family"] == "netdev" and not self._on_device(chain):
                continue
            key = (chain["family"], chain["table"], chain["name"])
            harm, ended = self._walk(key, hook, 0)
            if not harm and not ended and chain.get("policy") == "drop":
                harm = "its policy is drop"
            if harm:
                return f"chain {chain['name']} of table {chain['family']} {chain['table']}: {harm}"
        return ""

    def _on_device(self, chain: dict[str, Any]) -> bool:
        devices = chain.get("dev")
        devices = devices if isinstance(devices, list) else [devices]
        return bool(set(devices) & set(self._packets.devices.values()))

    def _walk(self, key: tuple[str, str, str], hook: str, depth: int) -> tuple[str, bool]:
        """Why a chain may harm the packets, and whether it surely accepts all of them."""
        if depth > _DEEPEST:
            return "its chains are too deep", False
        for rule in self._rules.get(key, ()):
            harm, ended, left = self._check_rule(rule, key, hook, depth)
            if harm:
                return harm, False
            if ended:
                return "", True
            if left:
                return "", False
        return "", False

    def _check_rule(
        self, rule: dict[str, Any], key: tuple[str, str, str], hook: str, depth: int
    ) -> tuple[str, bool, bool]:
        """Why a rule may harm the packets; whether it surely accepts all; whether all surely leave
        here."""
        sure = True
        expressions = rule.get("expr", [])
        says_what = any(
            isinstance(item, dict) and set(item) & {"accept", "drop", "jump", "goto", "return"}
            for item in expressions
        )
        for expression in expressions:
            name, body = _named_part(expression)
            if name == "match":
                answer = _matches(body, self._packets, hook)
                if answer is False:
                    return "", False, False
                sure &= answer is True
            elif name == "xt" and _is_match(body, says_what):
                sure = False
            elif name in _HARMLESS:
                continue
            elif name == "limit":
                sure = False
            elif name == "accept":
                return "", sure, False
            elif name == "return":
                return "", False, sure
            elif name in ("jump", "goto"):
                harm, ended = self._walk((*key[:2], body["target"]), hook, depth + 1)
                return harm, sure and ended, sure and name == "goto"
            else:
                return f"a rule with {name} may match the overlay's packets", False, False
        return "", False, False


def _named_part(expression: Any) -> tuple[str, Any]:
    if not isinstance(expression, dict):
        return "xt", None
    return next(iter(expression.items()))


def _is_match(body: Any, says_what: bool) -> bool:
    """Whether an expression of iptables that nft doesn't know is a condition, not an action."""
    if isinstance(body, dict):
        return body.get("type") == "match"
    return says_what


def obstacle(objects: Iterable[dict[str, Any]], packets: Packets) -> str:
    """The rule of a listing (libnftables-json(5)) that may harm the packets; empty: there is
    none."""
    return _Rules(objects, packets).obstacle()


class Firewall:
    """The rules of a namespace, read at a rate that their number allows."""

    def __init__(self, namespace: int) -> None:
        self._namespace = namespace
        self._session: Session | None = None
        self._packets: Packets | None = None
        self._reason = ""
        self.due = 0.0

    def obstacle(
        self,
        *,
        ports: set[int],
        devices: Mapping[int, str],
        own: set[IPv4Address],
        peers: set[IPv4Address],
    ) -> str:
        """Why the overlay's packets must pass the firewall's hooks; empty: they needn't."""
        packets = Packets(frozenset(ports), devices, frozenset(own), frozenset(peers))
        now = time.monotonic()
        if packets == self._packets and now < self.due:
            return self._reason
        self._reason = self._read(packets)
        self._packets = packets
        took = time.monotonic() - now
        self.due = now + max(LEAST, took * SHARE)
        return self._reason

    def _read(self, packets: Packets) -> str:
        try:
            legacy = in_netns(self._namespace, _legacy_tables)
            if legacy:
                return f"iptables-legacy has rules (table {legacy[0]}), which aren't read"
            if self._session is None:
                self._session = in_netns(self._namespace, Session)
            objects = self._session.query("list ruleset")
        except KernelError as error:
            return f"the firewall's rules can't be read: {error}"
        reason = obstacle(objects, packets)
        return f"the firewall's {reason}" if reason else ""

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


def _legacy_tables() -> list[str]:
    try:
        return _LEGACY.read_text().split()
    except FileNotFoundError:
        return []
