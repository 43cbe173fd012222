"""nf_tables over netlink without libnftables, for namespaces where a container may have own rules.

libnftables decodes every table, set and expression that it reads, and aborts the process on some
that the kernel accepts. A container must not be able to do that to us. So we encode rules
ourselves, the kernel only acknowledges them, and we read little: the chains, and whether they have
rules. What we read isn't trusted, and is limited to `MOST` messages.

All functions work in the calling thread's network namespace. Constants:
linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from dataplane.nlmsg import (
    ACK,
    APPEND,
    CREATE,
    ERROR,
    EXCLUSIVE,
    HEADER,
    attribute,
    attributes,
    error_number,
    message,
    nest,
)
from driver.errors import DOCTOR, KernelError, reporting
from driver.kernel.netfilter import FAMILY, IPV4, answers, dump, exists, one, open_socket

MOST: Final = 4096
"""Messages that are read of one answer. A container with more is treated as if it had a match."""

NETDEV: Final = 5
PREROUTING, INPUT, FORWARD, OUTPUT, POSTROUTING = range(5)
TCP: Final = 6

_SUBSYSTEM: Final = 10 << 8
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN, _GETCHAIN, _DELCHAIN = range(6)
_NEWRULE, _GETRULE, _DELRULE, _NEWSET, _, _DELSET = range(6, 12)
_NEWSETELEM, _GETSETELEM, _DELSETELEM = range(12, 15)

# Only for nft(8), whose single type for a number in host byte order is a mark.
_TYPE_MARK, _TYPE_ADDRESS = 19, 7
_DATA_VERDICT: Final = 0xFFFFFF00
_SET_MAP, _SET_DYNAMIC = 8, 0x20
_GOTO: Final = -4
_VERDICT_REGISTER, _REGISTER = 0, 1
_META_L4PROTO, _CT_DIRECTION = 16, 1
_EQUAL, _UNEQUAL = 0, 1
_ELEMENTS_PER_MESSAGE: Final = 1000
"""An attribute holds 64 KiB; an element takes some 40 bytes."""
_HOST_ORDER: Final = bytes((0, 4)) + struct.pack("=I", 1)
"""User data of a set (libnftnl): its key is in host byte order. Only listings use it."""


# --- attributes


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("!I", value & 0xFFFFFFFF))


def _value(kind: int, value: bytes) -> bytes:
    return nest(kind, attribute(1, value))


def _goto(kind: int, chain: str) -> bytes:
    return nest(kind, nest(2, _number(1, _GOTO), _text(2, chain)))


# --- expressions of rules


def _expression(name: str, *parts: bytes) -> bytes:
    return nest(1, _text(1, name), nest(2, *parts))


def destination() -> bytes:
    """Load the packet's IPv4 destination."""
    return _expression(
        "payload", _number(1, _REGISTER), _number(2, 1), _number(3, 16), _number(4, 4)
    )


def protocol() -> bytes:
    """Load the packet's transport protocol."""
    return _expression("meta", _number(1, _REGISTER), _number(2, _META_L4PROTO))


def direction() -> bytes:
    """Load the packet's direction in its connection; 0 is that of the first packet."""
    return _expression("ct", _number(1, _REGISTER), _number(2, _CT_DIRECTION))


def constant(value: bytes) -> bytes:
    """Load a constant."""
    return _expression("immediate", _number(1, _REGISTER), _value(2, value))


def turn(count: int) -> bytes:
    """Load 0 to `count` - 1 in turn."""
    return _expression("numgen", _number(1, _REGISTER), _number(2, count), _number(3, 0))


def equals(value: bytes) -> bytes:
    """Continue only if the register equals `value`."""
    return _expression("cmp", _number(1, _REGISTER), _number(2, _EQUAL), _value(3, value))


def differs(value: bytes) -> bytes:
    """Continue only if the register differs from `value`."""
    return _expression("cmp", _number(1, _REGISTER), _number(2, _UNEQUAL), _value(3, value))


def among(name: str) -> bytes:
    """Continue only if the register is in the set."""
    return _expression("lookup", _text(1, name), _number(2, _REGISTER))


def follow(name: str) -> bytes:
    """Take the verdict that the map has for the register."""
    return _expression(
        "lookup", _text(1, name), _number(2, _REGISTER), _number(3, _VERDICT_REGISTER)
    )


def translate(name: str) -> bytes:
    """Replace the register by its value in the map."""
    return _expression("lookup", _text(1, name), _number(2, _REGISTER), _number(3, _REGISTER))


def remember(name: str) -> bytes:
    """Add the register to the set."""
    return _expression("dynset", _text(1, name), _number(3, 0), _number(4, _REGISTER))


def goto(chain: str) -> bytes:
    return _expression("immediate", _number(1, _VERDICT_REGISTER), _goto(2, chain))


def dnat() -> bytes:
    """Translate the connection's destination to the address in the register."""
    return _expression("nat", _number(1, 1), _number(2, IPV4), _number(3, _REGISTER))


def reset() -> bytes:
    """Refuse with a TCP reset."""
    return _expression("reject", _number(1, 1), attribute(2, b"\0"))


def unreachable() -> bytes:
    """Refuse with ICMP's "port unreachable"."""
    return _expression("reject", _number(1, 0), attribute(2, b"\3"))


# --- messages


@dataclass(frozen=True, slots=True)
class Hook:
    """The hook of a base chain: its type, number and priority."""

    kind: str
    number: int
    priority: int


class Batch:
    """Changes of an IPv4 table in one transaction."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._messages: list[bytes] = []
        self._sets = 0

    def _add(self, kind: int, flags: int, *parts: bytes) -> None:
        body = FAMILY.pack(IPV4, 0, 0) + _text(1, self._table) + b"".join(parts)
        self._messages.append(message(_SUBSYSTEM | kind, flags, len(self._messages) + 1, body))

    def add_table(self) -> None:
        """Make the table unless it exists."""
        self._add(_NEWTABLE, CREATE)

    def create_table(self) -> None:
        """Make the table; the transaction fails if it exists."""
        self._add(_NEWTABLE, CREATE | EXCLUSIVE)

    def delete_table(self) -> None:
        self._add(_DELTABLE, 0)

    def add_chain(self, name: str, hook: Hook | None = None) -> None:
        parts = [_text(3, name)]
        if hook is not None:
            place = (_number(1, hook.number), _number(2, hook.priority))
            parts += [nest(4, *place), _number(5, 1), _text(7, hook.kind)]
        self._add(_NEWCHAIN, CREATE, *parts)

    def delete_chain(self, name: str) -> None:
        """Delete a chain without rules, to which no rule leads."""
        self._add(_DELCHAIN, 0, _text(3, name))

    def flush_chain(self, name: str) -> None:
        """Delete all rules of a chain."""
        self._add(_DELRULE, 0, _text(2, name))

    def add_rule(self, chain: str, *expressions: bytes) -> None:
        """Append a rule."""
        self._add(_NEWRULE, CREATE | APPEND, _text(2, chain), nest(4, *expressions))

    def _add_set(self, name: str, key: int, flags: int, *parts: bytes) -> None:
        self._sets += 1
        self._add(
            _NEWSET,
            CREATE,
            _text(2, name),
            _number(3, flags),
            _number(4, key),
            _number(5, 4),
            *parts,
            _number(10, self._sets),
        )

    def add_set(self, name: str) -> None:
        """A set of addresses."""
        self._add_set(name, _TYPE_ADDRESS, 0)

    def add_dynamic_set(self, name: str, size: int) -> None:
        """A set of addresses that rules add to."""
        self._add_set(name, _TYPE_ADDRESS, _SET_DYNAMIC, nest(9, _number(1, size)))

    def add_verdicts(self, name: str) -> None:
        """A map from addresses to chains."""
        self._add_set(name, _TYPE_ADDRESS, _SET_MAP, _number(6, _DATA_VERDICT), _number(7, 0))

    def add_turns(self, name: str) -> None:
        """A map from numbers to addresses."""
        data = (_number(6, _TYPE_ADDRESS), _number(7, 4))
        self._add_set(name, _TYPE_MARK, _SET_MAP, *data, attribute(13, _HOST_ORDER))

    def delete_set(self, name: str) -> None:
        """Delete a set or map that no rule uses."""
        self._add(_DELSET, 0, _text(2, name))

    def _elements(self, kind: int, flags: int, name: str, elements: list[bytes]) -> None:
        for start in range(0, len(elements), _ELEMENTS_PER_MESSAGE):
            part = elements[start : start + _ELEMENTS_PER_MESSAGE]
            self._add(kind, flags, _text(2, name), nest(3, *part))

    def add_addresses(self, name: str, addresses: Iterable[IPv4Address]) -> None:
        made = [nest(1, _value(1, address.packed)) for address in addresses]
        self._elements(_NEWSETELEM, CREATE | EXCLUSIVE, name, made)

    def delete_addresses(self, name: str, addresses: Iterable[IPv4Address]) -> None:
        """Delete elements of a set or map; each must exist."""
        made = [nest(1, _value(1, address.packed)) for address in addresses]
        self._elements(_DELSETELEM, 0, name, made)

    def add_gotos(self, name: str, chains: Iterable[tuple[IPv4Address, str]]) -> None:
        made = [nest(1, _value(1, address.packed), _goto(2, chain)) for address, chain in chains]
        self._elements(_NEWSETELEM, CREATE | EXCLUSIVE, name, made)

    def put_turns(self, name: str, targets: Iterable[tuple[int, IPv4Address]]) -> None:
        made = [
            nest(1, _value(1, struct.pack("=I", number)), _value(2, address.packed))
            for number, address in targets
        ]
        self._elements(_NEWSETELEM, CREATE | EXCLUSIVE, name, made)

    def delete_turns(self, name: str, numbers: Iterable[int]) -> None:
        """Delete elements of a map; each must exist."""
        made = [nest(1, _value(1, struct.pack("=I", number))) for number in numbers]
        self._elements(_DELSETELEM, 0, name, made)

    def commit(self) -> None:
        """Make all changes in the kernel, or none.

        Raises:
            KernelError: the kernel refused.
        """
        if not self._messages:
            return
        *others, last = self._messages
        # The kernel answers during the send: it acknowledges the last message, and reports
        # refusals.
        size, kind, flags, sequence, port = HEADER.unpack_from(last)
        last = HEADER.pack(size, kind, flags | ACK, sequence, port) + last[HEADER.size :]
        body = FAMILY.pack(0, 0, 10)
        begin = message(_BATCH_BEGIN, 0, 0, body)
        end = message(_BATCH_END, 0, len(self._messages) + 1, body)
        whole = b"".join((begin, *others, last, end))
        refused, acknowledged = 0, False
        with reporting("nftables can't be changed"), open_socket(len(whole)) as channel:
            channel.send(whole)
            for got, number, answer in answers(channel):
                if got == ERROR:
                    refused = refused or error_number(answer)
                    acknowledged |= number == sequence and not error_number(answer)
        if refused or not acknowledged:
            reason = os.strerror(refused) if refused else "no answer"
            raise KernelError(
                f"nftables refused a change of table ip {self._table}", cause=reason, remedy=DOCTOR
            )


# --- queries


def _listing(kind: int, family: int, *parts: bytes) -> Iterator[tuple[int, bytes]]:
    return dump(_SUBSYSTEM | kind, family, MOST, *parts)


def has_table(name: str) -> bool:
    """Whether there is such an IPv4 table.

    Raises:
        KernelError: the kernel doesn't answer.
    """
    with reporting("nftables can't be read"):
        return exists(_SUBSYSTEM | _GETTABLE, IPV4, _text(1, name))


def has_address(table: str, name: str, address: IPv4Address) -> bool:
    """Whether a set of an IPv4 table exists and has this address."""
    element = nest(3, nest(1, _value(1, address.packed)))
    try:
        return exists(_SUBSYSTEM | _GETSETELEM, IPV4, _text(1, table), _text(2, name), element)
    except OSError:
        return False


def turn_of(table: str, name: str, number: int) -> IPv4Address | None:
    """The address that a map of an IPv4 table has for a number; None: it has none."""
    element = nest(3, nest(1, _value(1, struct.pack("=I", number))))
    try:
        found = one(_SUBSYSTEM | _GETSETELEM, IPV4, _text(1, table), _text(2, name), element)
        for kind in (3, 1, 2, 1):
            found = dict(attributes(found))[kind]
        return IPv4Address(found)
    except (OSError, KeyError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain. Only a base chain has `kind` and `hook`."""

    family: int
    table: bytes
    name: bytes
    kind: bytes = b""
    hook: int | None = None


def _chain(family: int, data: bytes) -> Chain:
    found = dict(attributes(data))
    hook = dict(attributes(found.get(4, b""))).get(1, b"")
    return Chain(
        family,
        found.get(1, b"").rstrip(b"\0"),
        found.get(3, b"").rstrip(b"\0"),
        found.get(7, b"").rstrip(b"\0"),
        int.from_bytes(hook, "big") if hook else None,
    )


def chains() -> Iterator[Chain]:
    """All chains of all families.

    Raises:
        InterruptedDumpError, OSError, OverflowError: as `netfilter.dump`.
        ValueError: as `nlmsg.attributes`.
    """
    for family, data in _listing(_GETCHAIN, 0):
        yield _chain(family, data)


def rules(chain: Chain) -> Iterator[list[tuple[bytes, dict[int, bytes]]]]:
    """The expressions of each rule of a chain, as names and attributes.

    Raises:
        InterruptedDumpError, OSError, OverflowError: as `netfilter.dump`.
        ValueError: as `nlmsg.attributes`.
    """
    where = (attribute(1, chain.table + b"\0"), attribute(2, chain.name + b"\0"))
    for _, data in _listing(_GETRULE, chain.family, *where):
        whole = dict(attributes(data))
        # Kernels without this filter list the rules of other chains, too.
        if (whole.get(1), whole.get(2)) != (chain.table + b"\0", chain.name + b"\0"):
            continue
        found = []
        for _, expression in attributes(whole.get(4, b"")):
            parts = dict(attributes(expression))
            name = parts.get(1, b"").rstrip(b"\0")
            found.append((name, dict(attributes(parts.get(2, b"")))))
        yield found
