"""The router's messages and its layout of an arena are those of the C headers."""

from __future__ import annotations

import re
import shutil
import subprocess
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.errors import WrongMessage
from dataplane.router import layout, reasons
from dataplane.router import library_wire as wire
from dataplane.router.library_wire import Address, MessageKind
from dataplane.router.reasons import Reason
from dataplane.router.verbs_wire import MAX_MESSAGE

LIBRARY: Final = Path(__file__).parents[2] / "dataplane/library"
A = Address(IPv4Address("10.0.4.7"), 0x1234)
B = Address(IPv6Address("fd00::9"), 0xFEDC)
N32, M32 = 0x01020304, 0x0A0B0C0D
N64, M64, K64 = 0x0102030405060708, 0x1112131415161718, 0x2122232425262728

EXAMPLES: Final[list[tuple[wire.Message, str]]] = [
    (
        wire.Hello(N32, M32, "0123abcd"),
        f"struct hello m = {{.message = {{HELLO, sizeof m}}, .version = {N32}, .layout_version = {M32}, "
        '.build = "0123abcd"}',
    ),
    (
        wire.Welcome(N32, 2, True, 3, 4, 5, 6, 7, 8, 9),
        f"struct welcome m = {{.message = {{WELCOME, sizeof m}}, .version = {N32}, .layout_version = 2, .enabled = 1, "
        ".operations = 3, .age = 4, .bytes = 5, .bulk = 6, .spin = 7, .ring_limit = 8, .verbs = 9}",
    ),
    (
        wire.Request(N32, N64, A, B),
        f"struct request m = {{.message = {{REQUEST, sizeof m}}, .connection = {N32}, .cookie = {N64}u, "
        ".local = {.bytes = {10, 0, 4, 7}, .family = AF_INET, .port = 0x1234}, "
        ".remote = {.bytes = {0xfd, [15] = 9}, .family = AF_INET6, .port = 0xfedc}}",
    ),
    (
        wire.Grant(N32, N64, M64, K64, 99, 1, 63),
        f"struct grant m = {{.message = {{GRANT, sizeof m}}, .connection = {N32}, .cookie = {N64}u, .arena = {M64}u, "
        f".incarnation = {K64}u, .token = 99, .side = 1, .slot = 63}}",
    ),
    (
        wire.Refuse(N32, N64, 4, True),
        f"struct refuse m = {{.message = {{REFUSE, sizeof m}}, .connection = {N32}, .cookie = {N64}u, .reason = 4, .passes = 1}}",
    ),
    (
        wire.Bell(N32, N64, M64, 1),
        f"struct bell m = {{.message = {{BELL, sizeof m}}, .index = {N32}, .arena = {N64}u, .token = {M64}u, .side = 1}}",
    ),
    (
        wire.Fetch(N32, N64, M64, 1),
        f"struct bell m = {{.message = {{FETCH, sizeof m}}, .index = {N32}, .arena = {N64}u, .token = {M64}u, .side = 1}}",
    ),
    (
        wire.Ring(N32, N64, 1),
        f"struct bell m = {{.message = {{RING, sizeof m}}, .index = {N32}, .arena = {N64}u, .side = 1}}",
    ),
    (
        wire.Hear(N32, N64, 1),
        f"struct bell m = {{.message = {{HEAR, sizeof m}}, .index = {N32}, .arena = {N64}u, .side = 1}}",
    ),
    (
        wire.Release(63, N64, M64, K64),
        f"struct release m = {{.message = {{RELEASE, sizeof m}}, .slot = 63, .arena = {N64}u, .incarnation = {M64}u, "
        f".token = {K64}u}}",
    ),
    (
        wire.Note(6, N64),
        f"struct note m = {{.message = {{NOTE, sizeof m}}, .reason = 6, .cookie = {N64}u}}",
    ),
]
"""A message, and the C that makes the same."""

NUMBERS: Final = {
    "PROTOCOL_VERSION": wire.PROTOCOL_VERSION,
    "FREEFLOW_VERSION": layout.VERSION,
    "FREEFLOW_MAGIC": layout.MAGIC,
    "PAGE": layout.PAGE,
    "SLOTS": layout.SLOTS,
    "SIDES": layout.SIDES,
    "BELLS": layout.BELLS,
    "RING_SIZE": layout.RING_SIZE,
    "RING_HEADER": layout.RING_HEADER,
    "SLOT_OFFSET": layout.SLOT_OFFSET,
    "BULK_OFFSET": layout.BULK_OFFSET,
    "ARENA_SIZE": layout.ARENA_SIZE,
    "REMOTE_RING_LEAST": layout.REMOTE_RING_LEAST,
    "REMOTE_RING_MOST": layout.REMOTE_RING_MOST,
    "arena_size(131072)": layout.arena_size(131072),
    "offsetof(struct ring, incarnation)": layout.INCARNATION_OFFSET,
    "offsetof(struct ring, messages)": layout.MESSAGES_OFFSET,
    "offsetof(struct ring, stop)": layout.STOP_OFFSET,
    "offsetof(struct ring, over)": layout.OVER_OFFSET,
    "offsetof(struct ring, stopped)": layout.STOPPED_OFFSET,
    "offsetof(struct ring, broken)": layout.BROKEN_OFFSET,
    "offsetof(struct ring, received)": layout.RECEIVED_OFFSET,
    "offsetof(struct arena, version)": 8,
    "offsetof(struct arena, sides[0].dirty)": layout.DIRTY_OFFSET,
    "sizeof ((struct arena *)0)->sides[0].dirty": 8 * layout.BELLS,
    "offsetof(struct arena, size_of_ring)": 12,
    "offsetof(struct arena, remote)": 16,
    "SLOT_OFFSET + (5 * SIDES + 1) * PAGE": layout.ring_offset(5, 1),
    "BULK_OFFSET + (size_t)(5 * SIDES + 1) * RING_SIZE": layout.bulk_offset(5, 1),
    "BULK_OFFSET + (size_t)(5 * SIDES + 1) * 262144": layout.bulk_offset(5, 1, 262144),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a C program that includes the headers prints: a number, or a message in hexadecimal, by
    its C text.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("headers")
    lines = [
        f'printf("%s=%llu\\n", {_quoted(text)}, (unsigned long long)({text}));' for text in NUMBERS
    ]
    for number, (_, text) in enumerate(EXAMPLES):
        lines.append(f'{{ {text}; show("{number}", &m, sizeof m); }}')
    (folder / "headers.c").write_text(
        "#include <stdio.h>\n#include <sys/socket.h>\n"
        f'#include "{LIBRARY}/layout.h"\n#include "{LIBRARY}/protocol.h"\n'
        "static void show(const char *name, const void *m, size_t size)\n"
        '{ printf("%s=", name); for (size_t i = 0; i < size; i++) printf("%02x", ((const unsigned char *)m)[i]); '
        'puts(""); }\n'
        f"int main(void) {{ {' '.join(lines)} return 0; }}\n"
    )
    program = folder / "headers"
    subprocess.run(
        [compiler, "-std=gnu11", "-o", str(program), str(folder / "headers.c")], check=True
    )
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return dict(line.rsplit("=", 1) for line in output.splitlines())


def _quoted(text: str) -> str:
    return f'"{text}"'


@pytest.mark.parametrize("text", NUMBERS)
def test_layout(said: dict[str, str], text: str) -> None:
    """Every number of the arena's layout equals the header's."""
    assert int(said[text]) == NUMBERS[text]


@pytest.mark.parametrize(
    "number", range(len(EXAMPLES)), ids=lambda n: type(EXAMPLES[n][0]).__name__
)
def test_messages(said: dict[str, str], number: int) -> None:
    """Each message is packed to the bytes that a C compiler makes of the same message, and read
    from them.
    """
    message, _ = EXAMPLES[number]
    data = bytes.fromhex(said[str(number)])
    assert wire.pack(message) == data
    assert wire.unpack(data) == message
    assert len(data) <= MAX_MESSAGE


def _enumeration(name: str) -> dict[str, int]:
    header = (LIBRARY / "protocol.h").read_text()
    body = re.search(rf"enum {name} {{(.*?)}};", header, re.DOTALL)
    assert body is not None
    return {
        key: int(value) for key, value in re.findall(r"^\s*(\w+) = (\d+)", body[1], re.MULTILINE)
    }


def test_kinds() -> None:
    """Kinds of messages have the header's numbers, and each is tested here."""
    assert _enumeration("kind") == {kind.name: kind.value for kind in MessageKind}
    assert {type(message).__name__.upper() for message, _ in EXAMPLES} == set(
        MessageKind.__members__
    )


def test_reasons() -> None:
    """Reasons that libraries note have the header's numbers; those that the router works out are
    apart.
    """
    told = {f"REASON_{reason.name}": reason.value for reason in Reason}
    header = _enumeration("reason")
    assert {name: value for name, value in told.items() if value < reasons.STATUS_ONLY} == header


def test_every_reason_is_said() -> None:
    """Each reason has a word of its own and a sentence."""
    assert len({reason.word for reason in Reason}) == len(Reason)
    assert all(reason.sentence and reason.word.replace("-", "").isalpha() for reason in Reason)


def test_every_reason_is_documented() -> None:
    """docs/troubleshooting.md has a row for each word, and for no other."""
    text = (LIBRARY.parents[1] / "docs/troubleshooting.md").read_text()
    table = text.split("## Why a connection is on `overlay`")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    words = [word for row in rows for word in re.findall(r"`([a-z-]+)`", row)]
    assert sorted(words) == sorted(reason.word for reason in Reason)


def test_mapped_addresses_are_ipv4() -> None:
    """An IPv4 connection of a dual-stack socket has IPv4 addresses."""
    mapped = Address(IPv6Address("::ffff:10.0.4.7"), 80)
    message = wire.unpack(wire.pack(wire.Request(1, 1, mapped, mapped)))
    assert isinstance(message, wire.Request)
    assert message.local == Address(IPv4Address("10.0.4.7"), 80)


@given(st.binary(max_size=MAX_MESSAGE + 8))
def test_garbage(data: bytes) -> None:
    """Any bytes are either a message or WrongMessage."""
    try:
        message = wire.unpack(data)
    except WrongMessage:
        return
    assert len(wire.pack(message)) == len(data)


@given(
    st.sampled_from(EXAMPLES),
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_messages(example: tuple[wire.Message, str], damage: list[tuple[int, int]]) -> None:
    """A damaged message is another message, which can be packed again, or WrongMessage."""
    data = bytearray(wire.pack(example[0]))
    for place, value in damage:
        data[place % len(data)] = value
    try:
        message = wire.unpack(bytes(data))
    except WrongMessage:
        return
    assert len(wire.pack(message)) == len(data)
