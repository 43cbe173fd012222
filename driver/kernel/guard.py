"""Rules in the host's namespace about who may speak with the overlay's port: this host's peers, and nobody else.

VXLAN has no authentication, and the kernel's device takes frames from any address, learns from them, and then sends there.
Containers of any network reach the port: of their own host directly, of others with their host's address (masquerading).
So, for the ports that networks of this host use:

- input: only from peers; nothing from this host itself, and nothing by a bridge, veth or tunnel by which no peer is reached.
- output: nothing that a socket of this namespace sends to a peer's port. What the kernel's VXLAN device sends has no socket
  here. So a process needs CAP_NET_RAW in the host's namespace (packet sockets pass no hook) to get past.
- forward, postrouting: nothing of containers that has got this host's address, or comes with a peer's. The same for the port
  of the routers' sessions, since a router takes calls from its peers' addresses alone.

The table outlives the plugin's process, as the devices do. Another process takes over what it finds in it, until it knows
better. A port without complete knowledge isn't guarded: a peer that is cut off would be worse.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any, Final

import structlog

from driver import names
from driver.errors import DOCTOR, KernelError
from driver.kernel.namespace import in_netns
from driver.kernel.netfilter import FAMILY as FAMILY_HEADER
from driver.kernel.nft import Session
from driver.kernel.nlmsg import attributes, message, messages
from driver.model import IPAddress

log = structlog.get_logger()

FAMILY: Final = "inet"
NAME: Final = "freeflow_guard"
TABLE: Final = f"{FAMILY} {NAME}"

SHARE: Final = 20
"""So many times as long as looking took is waited before the next look."""
STRANGERS: Final = 256
"""Addresses of strangers that are remembered, for ten minutes."""

_FORMER: Final = 10_000
"""Addresses of peers that are remembered."""

_SUSPECTS: Final = '{ "bridge", "veth", "netkit", "vxlan", "geneve", "dummy" }'
"""Kinds of devices behind which containers are. Where one of them leads to peers it is none of them."""

# linux/netfilter/nfnetlink.h, nf_tables.h
_GET_GENERATION: Final = 10 << 8 | 16
_NETFILTER: Final = 12
"""NETLINK_NETFILTER, linux/netlink.h."""
_GENERATION: Final = 1


@dataclass(frozen=True, slots=True)
class Guarded:
    """`ports` that are guarded; why others aren't, empty if all are, and for how many seconds now; addresses that were turned
    away lately, without those of hosts that were peers."""

    ports: tuple[int, ...] = ()
    reason: str = ""
    seconds: float = 0.0
    strangers: tuple[IPAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the table is to say. `peers` by port; `devices` lead to them; `near` are networks all of whose hosts may speak."""

    peers: Mapping[int, frozenset[IPAddress]] = field(default_factory=dict)
    devices: frozenset[str] = frozenset()
    sessions: int | None = None
    near: frozenset[IPv4Network | IPv6Network] = frozenset()

    def commands(self) -> str:
        """The whole table, in place of one that is there: one transaction."""
        pairs = [(port, peer) for port in sorted(self.peers) for peer in self.peers[port]]
        hosts = {peer for _, peer in pairs}
        lists: dict[str, list[str]] = {
            "ports": [str(port) for port in sorted(self.peers)],
            "sessions": [str(self.sessions)] if self.sessions and hosts else [],
            "underlay": [f'"{name}"' for name in sorted(self.devices)],
        }
        for version in (4, 6):
            lists[f"peers{version}"] = [
                f"{port} . {peer}" for port, peer in pairs if peer.version == version
            ]
            lists[f"hosts{version}"] = [str(peer) for peer in hosts if peer.version == version]
            lists[f"near{version}"] = [str(net) for net in self.near if net.version == version]
        body = "".join(_set(name, _TYPES[name], lists.get(name, ())) for name in _TYPES)
        return f"add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n{body}{_CHAINS}}}\n"


_TYPES: Final = {
    "ports": "type inet_service;",
    "sessions": "type inet_service;",
    "underlay": "type ifname;",
    "peers4": "type inet_service . ipv4_addr;",
    "peers6": "type inet_service . ipv6_addr;",
    "hosts4": "type ipv4_addr;",
    "hosts6": "type ipv6_addr;",
    "near4": "type ipv4_addr; flags interval; auto-merge;",
    "near6": "type ipv6_addr; flags interval; auto-merge;",
    "strangers4": f"type ipv4_addr; size {STRANGERS}; flags dynamic,timeout; timeout 10m;",
    "strangers6": f"type ipv6_addr; size {STRANGERS}; flags dynamic,timeout; timeout 10m;",
}


def _set(name: str, kind: str, elements: Collection[str]) -> str:
    values = f" elements = {{ {', '.join(elements)} }};" if elements else ""
    return f" set {name} {{ {kind}{values} }}\n"


def _both(rule: str) -> str:
    """A rule for IPv4 and for IPv6: `%` stands for the protocol's name, `#` for its version."""
    return "".join(
        f"  {rule.replace('%', protocol).replace('#', version)}\n"
        for protocol, version in (("ip", "4"), ("ip6", "6"))
    )


_TO_PEER: Final = "udp dport . % daddr @peers#"
_TO_NEAR: Final = "udp dport @ports % daddr @near#"
_TO_ROUTER: Final = "tcp dport @sessions % daddr @hosts#"
_SUSPECT: Final = f"meta iifkind {_SUSPECTS} iifname != @underlay"
# What this host's own kernel wraps comes from a VXLAN device of the overlay namespace, what it sends itself from none.
_FORWARDED: Final = f'iif != 0 iifname != "{names.VXLAN}*"'
_CHAINS: Final = (
    " chain strangers {\n"
    '  iifname "lo" counter drop\n'
    f"  {_SUSPECT} counter drop\n"
    + _both("udp dport . % saddr @peers# return")
    + _both("% saddr @near# return")
    # Apart from the drop: where the set is full the rule ends there.
    + _both("add @strangers# { % saddr }")
    + "  counter drop\n }\n"
    " chain input {\n  type filter hook input priority -150; policy accept;\n"
    "  udp dport @ports goto strangers\n }\n"
    " chain output {\n  type filter hook output priority -150; policy accept;\n"
    # True for each packet that has a socket in this namespace: others have no uid.
    + _both(f"{_TO_PEER} meta skuid >= 0 counter drop")
    + _both(f"{_TO_NEAR} meta skuid >= 0 counter drop")
    + _both(f"{_TO_ROUTER} meta skuid != 0 counter drop")
    + " }\n chain forward {\n  type filter hook forward priority -150; policy accept;\n"
    + _both(f"{_SUSPECT} {_TO_PEER} % saddr @hosts# counter drop")
    + _both(f"{_SUSPECT} {_TO_NEAR} % saddr @near# counter drop")
    + _both(f"{_SUSPECT} {_TO_ROUTER} % saddr @hosts# counter drop")
    + " }\n chain postrouting {\n  type filter hook postrouting priority 200; policy accept;\n"
    + _both(f"{_FORWARDED} ct status snat {_TO_PEER} counter drop")
    + _both(f"{_FORWARDED} ct status snat {_TO_NEAR} counter drop")
    + _both(f"{_FORWARDED} ct status snat {_TO_ROUTER} counter drop")
    + " }\n"
)


@dataclass(slots=True)
class _Known:
    """A network of this host: its port, and its peers if they are known."""

    port: int
    peers: frozenset[IPAddress] | None = None


class Guard:
    """The table of one host. `sessions` is the port of the routers' sessions. Methods are safe from any thread."""

    def __init__(self, namespace: int, sessions: int | None = None) -> None:
        self._namespace = namespace
        self._sessions = sessions
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._devices: frozenset[str] = frozenset()
        self._near: frozenset[IPv4Network | IPv6Network] = frozenset()
        self._session: Session | None = None
        self._generations: socket.socket | None = None
        self._inherited: dict[int, frozenset[IPAddress]] | None = None
        self._written: Wanted | None = None
        self._proof: object = None
        self._generation = -1
        self._due = 0.0
        self._failure = ""
        self._failing_since = 0.0
        self._former: set[IPAddress] = set()

    # --- what is known

    def network(self, short: str, port: int) -> None:
        """A network has a VXLAN device here, on this port."""
        with self._lock:
            known = self._known.get(short)
            if known is None or known.port != port:
                self._known[short] = _Known(port)

    def peers(self, short: str, peers: frozenset[IPAddress]) -> None:
        """Who shares it."""
        with self._lock:
            if short in self._known:
                if len(self._former) > _FORMER:
                    self._former.clear()
                self._former |= peers
                self._known[short].peers = peers

    def forget(self, short: str) -> None:
        """Its device is gone."""
        with self._lock:
            self._known.pop(short, None)

    def known(self) -> dict[str, frozenset[IPAddress]]:
        """The peers of each network of which they are known."""
        with self._lock:
            return {
                short: known.peers
                for short, known in self._known.items()
                if known.peers is not None
            }

    @property
    def failed(self) -> bool:
        """Whether a port isn't guarded."""
        return bool(self._failure)

    def everybody(self) -> frozenset[IPAddress]:
        """The peers of all networks."""
        with self._lock:
            return frozenset(
                peer for known in self._known.values() for peer in known.peers or ()
            ).union(*(self._inherited or {}).values())

    def reached(
        self, devices: Iterable[str], near: Iterable[IPv4Network | IPv6Network] = ()
    ) -> None:
        """By which devices of the host the peers are reached."""
        with self._lock:
            self._devices, self._near = frozenset(devices), frozenset(near)

    def _wanted(self) -> tuple[Wanted, str]:
        """What the table is to say, and why ports are missing in it."""
        inherited = self._inherited or {}
        peers: dict[int, frozenset[IPAddress]] = {}
        waiting = set()
        with self._lock:
            for port in {known.port for known in self._known.values()}:
                there = [known.peers for known in self._known.values() if known.port == port]
                said = frozenset(peer for each in there for peer in each or ())
                if None not in there:
                    inherited.pop(port, None)
                    peers[port] = said
                elif port in inherited or (self._written and port in self._written.peers):
                    peers[port] = said | inherited.get(port, frozenset())
                else:
                    waiting.add(port)
            for port in inherited.keys() - peers.keys():
                del inherited[port]
            wanted = Wanted(peers, self._devices, self._sessions, self._near)
        reason = (
            f"who shares the networks on UDP port {', '.join(map(str, sorted(waiting)))} isn't known yet"
            if waiting
            else ""
        )
        return wanted, reason

    # --- the table

    def keep(self) -> bool:
        """Write the table if what it is to say has changed, or somebody has changed it; whether it was written.

        Never raises: see `facts`.
        """
        with self._writing:
            try:
                return self._keep()
            except (KernelError, OSError) as error:
                if str(error) != self._failure:
                    log.warning("the overlay's port isn't guarded", reason=str(error))
                self._fail(str(error))
                self._written = None
                return False

    def _fail(self, reason: str) -> None:
        """Note why a port isn't guarded; empty: all are."""
        if reason and not self._failure:
            self._failing_since = time.monotonic()
        self._failure = reason

    def _keep(self) -> bool:
        if self._session is None:
            self._session = in_netns(self._namespace, Session)
            self._generations = in_netns(self._namespace, _generations)
        if self._inherited is None:
            self._inherited = self._read()
        wanted, reason = self._wanted()
        now = time.monotonic()
        if wanted == self._written and self._is_whole(now):
            self._fail(reason)
            return False
        if not wanted.peers:
            self._session.run(f"add table {TABLE}\ndelete table {TABLE}\n")
            self._proof = None
        else:
            # Its own name alone: an element that is there twice would be refused.
            self._session.run(wanted.commands())
            self._proof = self._look()
        self._generation = self._now()
        if self._written is not None and wanted == self._written:
            log.warning(
                "somebody has changed the rules that guard the overlay's port; they are back"
            )
        elif self._written is None or wanted.peers.keys() != self._written.peers.keys():
            log.info("the overlay's port is guarded", ports=sorted(wanted.peers))
        self._written = wanted
        self._fail(reason)
        return True

    def _is_whole(self, now: float) -> bool:
        """Whether the table is as it was written."""
        if now < self._due:
            return True
        generation = self._now()
        if generation == self._generation:
            return True
        found = self._look()
        self._due = now + (time.monotonic() - now) * SHARE
        if found != self._proof:
            return False
        self._generation = generation
        return True

    def _objects(self) -> list[dict[str, Any]]:
        assert self._session is not None
        try:
            return self._session.query(f"list table {TABLE}", elements=True)
        except KernelError as error:
            if "No such file" in str(error):
                return []
            raise

    def _look(self) -> object:
        """What the table says, without what changes by itself."""
        return [_lasting(item) for item in self._objects()]

    def _read(self) -> dict[int, frozenset[IPAddress]]:
        """The peers by port that an earlier process has written."""
        found: dict[int, set[IPAddress]] = {}
        for item in self._objects():
            each = item.get("set", {})
            if each.get("name") == "ports":
                found |= {int(port): set() for port in each.get("elem", ())}
        for item in self._objects():
            each = item.get("set", {})
            if str(each.get("name", "")).startswith("peers"):
                for element in each.get("elem", ()):
                    port, peer = element["concat"]
                    found.setdefault(int(port), set()).add(ip_address(peer))
        return {port: frozenset(peers) for port, peers in found.items()}

    def _now(self) -> int:
        """The generation of this namespace's rules, which changes with each transaction."""
        assert self._generations is not None
        self._generations.send(message(_GET_GENERATION, 0, 0, FAMILY_HEADER.pack(0, 0, 0)))
        answer = self._generations.recv(1 << 12)
        for kind, _, _, body in messages(answer):
            if kind == _GET_GENERATION - 1:
                generation = dict(attributes(body, FAMILY_HEADER.size)).get(_GENERATION)
                if generation:
                    return int.from_bytes(generation, "big")
        raise KernelError(
            "nftables", cause="the kernel doesn't tell the generation of its rules", remedy=DOCTOR
        )

    def facts(self) -> Guarded:
        """For status."""
        with self._writing:
            written, reason = self._written, self._failure
            failing = time.monotonic() - self._failing_since if reason else 0.0
            if written is None or not written.peers:
                return Guarded((), reason, failing)
            try:
                objects = self._objects()
            except KernelError as error:
                return Guarded((), str(error))
        strangers = {
            _element(value)
            for item in objects
            if str(item.get("set", {}).get("name", "")).startswith("strangers")
            for value in item["set"].get("elem", ())
        }
        with self._lock:
            strangers -= self._former
        return Guarded(
            tuple(sorted(written.peers)), reason, failing, tuple(sorted(strangers, key=str))
        )

    def remove(self) -> bool:
        """Take the table away; false if there is none."""
        with self._writing:
            if self._session is None:
                self._session = in_netns(self._namespace, Session)
            existed = bool(self._objects())
            self._session.run(f"add table {TABLE}\ndelete table {TABLE}\n")
            self._written = None
            self._inherited = {}
            with self._lock:
                self._known.clear()
            return existed

    def close(self) -> None:
        """Close what is open; the table stays."""
        with self._writing:
            if self._session is not None:
                self._session.close()
                self._session = None
            if self._generations is not None:
                self._generations.close()
                self._generations = None


def _generations() -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER)
    made.bind((0, 0))
    made.settimeout(5)
    return made


def _element(value: Any) -> IPAddress:
    return ip_address(value["elem"]["val"] if isinstance(value, dict) else value)


def _lasting(item: dict[str, Any]) -> object:
    """An object of a listing without handles, counters and the elements that packets add."""
    kind, body = next(iter(item.items()))
    kept = {name: value for name, value in body.items() if name != "handle"}
    if kind == "set" and str(body.get("name", "")).startswith("strangers"):
        kept.pop("elem", None)
    if kind == "rule":
        kept["expr"] = [each for each in body.get("expr", ()) if "counter" not in (each or {})]
    return kind, kept


def own(item: Mapping[str, Any]) -> bool:
    """Whether an object of a listing (libnftables-json(5)) is of this table."""
    body = next(iter(item.values()), None)
    if not isinstance(body, Mapping):
        return False
    table = body.get("name") if "table" in item else body.get("table")
    return body.get("family") == FAMILY and table == NAME
