"""Guards the overlay's UDP port on the host: only peers may send to it.

VXLAN has no authentication: the kernel's device accepts frames from any address, learns from them,
and then sends there. Containers of any network reach the port: their own host's directly, other
hosts' with their host's address (masquerading). The rules are in `guard_rules.py`.

The table outlives the plugin's process, as the devices do. A new process takes over the peers that
it finds there until it knows better. A port whose peers aren't all known isn't guarded: cutting off
a peer would be worse.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any, Final

import structlog

from dataplane.nlmsg import Netlink, attributes
from driver.errors import KernelError
from driver.kernel.guard_rules import TABLE, Wanted
from driver.kernel.namespace import in_netns
from driver.kernel.netfilter import FAMILY as FAMILY_HEADER
from driver.kernel.nft import Session
from driver.model import IPAddress

log = structlog.get_logger()

SHARE: Final = 20
"""The table is checked again after so many times as long as the last check took."""
_FORMER: Final = 10_000
"""Addresses of former peers that are remembered."""

# linux/netfilter/nfnetlink.h, nf_tables.h
_GET_GENERATION: Final = 10 << 8 | 16
_NETFILTER: Final = 12
"""NETLINK_NETFILTER, linux/netlink.h."""
_GENERATION: Final = 1


@dataclass(frozen=True, slots=True)
class Guarded:
    """What status reports.

    `ports` are guarded; `reason` says why others aren't, empty if all are, and `seconds` for how
    long. `strangers` are addresses whose packets were dropped lately, former peers excluded.
    """

    ports: tuple[int, ...] = ()
    reason: str = ""
    seconds: float = 0.0
    strangers: tuple[IPAddress, ...] = ()


@dataclass(slots=True)
class _Known:
    """A network of this host: its port, and its peers if they are known."""

    port: int
    peers: frozenset[IPAddress] | None = None


class Guard:
    """The table of one host. `sessions` is the port of the routers' sessions.

    Methods are safe from any thread. `_lock` guards what is known of networks and peers, `_writing`
    the table and everything about it; a thread that needs both takes `_writing` first.
    """

    def __init__(self, namespace: int, sessions: int | None = None) -> None:
        self._namespace = namespace
        self._sessions = sessions
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._known: dict[str, _Known] = {}
        self._devices: frozenset[str] = frozenset()
        self._near: frozenset[IPv4Network | IPv6Network] = frozenset()
        self._routers: frozenset[IPAddress] = frozenset()
        self.has_routers = False
        """Whether there ever were other hosts on networks of other drivers."""
        self._session: Session | None = None
        self._generations: Netlink | None = None
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
        """Set the peers of a network."""
        with self._lock:
            if short in self._known:
                if len(self._former) > _FORMER:
                    self._former.clear()
                self._former |= peers
                self._known[short].peers = peers

    def routers(self, hosts: frozenset[IPAddress]) -> None:
        """Set the other hosts on networks of other drivers: the routers have sessions with them."""
        with self._lock:
            self._routers = hosts
            self.has_routers = self.has_routers or bool(hosts)

    def forget(self, short: str) -> None:
        """Forget a network whose VXLAN device is gone."""
        with self._lock:
            self._known.pop(short, None)

    def known(self) -> dict[str, frozenset[IPAddress]]:
        """The peers of each network whose peers are known."""
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
        """The peers of all networks, of other drivers too."""
        with self._lock:
            return self._routers.union(
                *(known.peers or () for known in self._known.values()),
                *(self._inherited or {}).values(),
            )

    def reached(
        self, devices: Iterable[str], near: Iterable[IPv4Network | IPv6Network] = ()
    ) -> None:
        """Set the host's devices that lead to peers, and the networks of `Wanted.near`."""
        with self._lock:
            self._devices, self._near = frozenset(devices), frozenset(near)

    def _wanted(self) -> tuple[Wanted, str]:
        """The content that the table should have, and why ports are missing in it."""
        inherited = self._inherited or {}
        peers: dict[int, frozenset[IPAddress]] = {}
        waiting = set()
        with self._lock:
            for port in {known.port for known in self._known.values()}:
                there = [known.peers for known in self._known.values() if known.port == port]
                known_peers = frozenset(peer for members in there for peer in members or ())
                if None not in there:
                    inherited.pop(port, None)
                    peers[port] = known_peers
                elif port in inherited or (self._written and port in self._written.peers):
                    peers[port] = known_peers | inherited.get(port, frozenset())
                else:
                    waiting.add(port)
            for port in inherited.keys() - peers.keys():
                del inherited[port]
            wanted = Wanted(peers, self._devices, self._sessions, self._near, self._routers)
        reason = (
            f"the peers of the networks on UDP port {', '.join(map(str, sorted(waiting)))} "
            "aren't known yet"
            if waiting
            else ""
        )
        return wanted, reason

    # --- the table

    def refresh(self) -> bool:
        """Write the table if its content has to change, or another process has changed it.

        Returns whether it was written. Never raises: `facts` reports failures.
        """
        with self._writing:
            try:
                return self._refresh()
            except (KernelError, OSError) as error:
                if str(error) != self._failure:
                    log.warning("the overlay's port isn't guarded", reason=str(error))
                self._fail(str(error))
                self._written = None
                return False

    def _fail(self, reason: str) -> None:
        """Note why a port isn't guarded; an empty reason: all are."""
        if reason and not self._failure:
            self._failing_since = time.monotonic()
        self._failure = reason

    def _refresh(self) -> bool:
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
        if wanted.is_empty:
            self._session.run(f"add table {TABLE}\ndelete table {TABLE}\n")
            self._proof = None
        else:
            # Elements are unique by construction: nft refuses one that is there twice.
            self._session.run(wanted.commands())
            self._proof = self._content()
        self._generation = self._current_generation()
        if self._written is not None and wanted == self._written:
            log.warning(
                "the rules that guard the overlay's port were changed, and are restored now"
            )
        elif wanted.peers and (
            self._written is None or wanted.peers.keys() != self._written.peers.keys()
        ):
            log.info("the overlay's port is guarded", ports=sorted(wanted.peers))
        self._written = wanted
        self._fail(reason)
        return True

    def _is_whole(self, now: float) -> bool:
        """Whether the table is as it was written."""
        if now < self._due:
            return True
        generation = self._current_generation()
        if generation == self._generation:
            return True
        found = self._content()
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

    def _content(self) -> object:
        """The table as it is, without handles, counters and elements that packets add."""
        return [_lasting(item) for item in self._objects()]

    def _read(self) -> dict[int, frozenset[IPAddress]]:
        """The peers by port that an earlier process wrote."""
        found: dict[int, set[IPAddress]] = {}
        for item in self._objects():
            nft_set = item.get("set", {})
            for element in nft_set.get("elem", ()):
                if nft_set["name"] == "ports":
                    found.setdefault(int(element), set())
                elif nft_set["name"].startswith("peers"):
                    port, peer = element["concat"]
                    found.setdefault(int(port), set()).add(ip_address(peer))
        return {port: frozenset(peers) for port, peers in found.items()}

    def _current_generation(self) -> int:
        """The generation of this namespace's rules; each transaction changes it."""
        assert self._generations is not None
        answer = self._generations.get(_GET_GENERATION, FAMILY_HEADER.pack(0, 0, 0))
        generation = dict(attributes(answer, FAMILY_HEADER.size))[_GENERATION]
        return int.from_bytes(generation, "big")

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
        """Remove the table; false if there is none."""
        with self._writing:
            if self._session is None:
                self._session = in_netns(self._namespace, Session)
            existed = bool(self._objects())
            self._session.run(f"add table {TABLE}\ndelete table {TABLE}\n")
            self._written = None
            self._inherited = {}
            with self._lock:
                self._known.clear()
                self._routers = frozenset()
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


def _generations() -> Netlink:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER)
    made.bind((0, 0))
    made.settimeout(5)
    return Netlink(made)


def _element(value: Any) -> IPAddress:
    return ip_address(value["elem"]["val"] if isinstance(value, dict) else value)


def _lasting(item: dict[str, Any]) -> object:
    """An object of a listing without what changes by itself."""
    kind, body = next(iter(item.items()))
    kept = {name: value for name, value in body.items() if name != "handle"}
    if kind == "set" and str(body.get("name", "")).startswith("strangers"):
        kept.pop("elem", None)
    if kind == "rule":
        kept["expr"] = [part for part in body.get("expr", ()) if "counter" not in (part or {})]
    return kind, kept
