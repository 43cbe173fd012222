"""The router's messages to and from its relay have the bytes of the C header."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.errors import WrongMessage
from dataplane.router import relay_wire as wire
from dataplane.router.relay_wire import RelayKind

HEADER: Final = Path(__file__).parents[2] / "dataplane/relay/relay_protocol.h"
N32, M32 = 0x01020304, 0x0A0B0C0D
N64, M64 = 0x0102030405060708, 0x1112131415161718
SHAPES: Final[dict[str, tuple[Callable[[int], wire.Message], str]]] = {
    "number": (lambda kind: wire.Number(kind, N32, 1), f".number = {N32}, .state = 1"),
    "outcome": (
        lambda kind: wire.RelayOutcome(kind, N32, -5, "lost", M32),
        f'.number = {N32}, .error = -5, .text = "lost", .received = {M32}',
    ),
    "offer": (
        lambda kind: wire.Offered(kind, N32, 7, "no", b"\x01\x02\x03"),
        f'.number = {N32}, .error = 7, .text = "no", .size = 3, .words = {{1, 2, 3}}',
    ),
    "accept": (
        lambda kind: wire.RelayAccept(kind, N32, M32, b"\x01\x02\x03"),
        f".number = {N32}, .peer = {M32}, .size = 3, .words = {{1, 2, 3}}",
    ),
    "arena": (
        lambda kind: wire.RelayArena(kind, N64, M32, M64),
        f".arena = {N64}u, .value = {M32}, .owner = {M64}u",
    ),
    "open": (
        lambda _: wire.RelayOpen("mlx5_0", 2, 0x0304, wire.VERBS, N32, wire.ENCRYPT_ALL),
        f'.device = "mlx5_0", .port = 2, .version = RELAY_VERSION, .gid_index = 0x0304, .transport = RELAY_VERBS, '
        f".spin = {N32}, .encryption = RELAY_ENCRYPT_ALL",
    ),
    "opened": (
        lambda _: wire.RelayOpened(-2, "none", 4096),
        '.error = -2, .text = "none", .mtu = 4096',
    ),
    "slot": (
        lambda _: wire.RelaySlot(N32, M32, 63, N64, M64, wire.QUEUE_PAIR),
        f".connection = {N32}, .link = {M32}, .slot = 63, .user = RELAY_QUEUE_PAIR, "
        f".arena = {N64}u, .incarnation = {M64}u",
    ),
    "file": (
        lambda kind: wire.RelayFile(kind, N64, M64, N64 + 1, 1),
        f".file = {N64}u, .token = {M64}u, .owner = {N64 + 1}u, .writable = 1",
    ),
    "expire": (
        lambda _: wire.RelayExpire(N32, 5, wire.QUEUE_PAIR),
        f".link = {N32}, .count = 5, .user = RELAY_QUEUE_PAIR",
    ),
    "counts": (
        lambda _: wire.RelayCounters({name: 1000 + n for n, name in enumerate(wire.COUNTERS)}),
        ".counters = {" + ", ".join(str(1000 + n) for n in range(len(wire.COUNTERS))) + "}",
    ),
    "usage": (
        lambda _: wire.RelayUsage(N32, N64, {name: 1000 + n for n, name in enumerate(wire.USES)}),
        f".link = {N32}, .arena = {N64}u, "
        ".values = {" + ", ".join(str(1000 + n) for n in range(len(wire.USES))) + "}",
    ),
}
KINDS: Final = {
    "number": "LINK SOCKET UNLINK STREAM CLOSE FINISHED LEAVE LEFT DROP DROPPED COUNT ENDED",
    "outcome": "CONNECTED DOWN PAIRED",
    "offer": "LINKED PLACED",
    "accept": "CONNECT PAIR",
    "arena": "ARENA BELL SHARE DISCARD",
    "open": "OPEN",
    "opened": "OPENED",
    "slot": "SLOT",
    "file": "FILE FILE_END FILE_ENDED",
    "expire": "EXPIRE",
    "counts": "COUNTS",
    "usage": "USAGE",
}
"""The kinds of each struct of the header."""
OF_KIND: Final = {
    RelayKind[name]: shape for shape, names in KINDS.items() for name in names.split()
}
EXAMPLES: Final[list[tuple[str, wire.Message, str]]] = [
    (
        kind.name,
        SHAPES[shape][0](kind),
        f"struct relay_{shape} m = {{.message = {{R_{kind.name}, sizeof m}}, {SHAPES[shape][1]}}}",
    )
    for kind, shape in sorted(OF_KIND.items())
]
FRAME: Final = wire.RelayFrame(N32, b"\x01\x02")
NUMBERS: Final = {
    "RELAY_VERSION": wire.RELAY_VERSION,
    "RELAY_SOCKET": wire.RELAY_SOCKET,
    "RELAY_TEXT": wire.MAX_TEXT,
    "RELAY_WORDS": wire.MAX_WORDS,
    "RELAY_FRAME": wire.MAX_FRAME,
    "RELAY_LINK_CONNECTIONS": wire.LINK_CONNECTIONS,
    "RELAY_COUNTERS": len(wire.COUNTERS),
    "RELAY_VERBS": wire.VERBS,
    "RELAY_LOOPBACK": wire.LOOPBACK,
    "RELAY_TCP": wire.TCP,
    "RELAY_ENCRYPT_NOTHING": wire.ENCRYPT_NOTHING,
    "RELAY_ENCRYPT_MESSAGES": wire.ENCRYPT_MESSAGES,
    "RELAY_ENCRYPT_ALL": wire.ENCRYPT_ALL,
    "RELAY_CONNECTION": wire.CONNECTION,
    "RELAY_QUEUE_PAIR": wire.QUEUE_PAIR,
    "RELAY_MOVING_QUEUE_PAIR": wire.MOVING_QUEUE_PAIR,
    "RELAY_WHOLE": wire.WHOLE,
    "RELAY_BROKEN": wire.BROKEN,
    **{f"R_{kind.name}": kind.value for kind in RelayKind},
    **{f"COUNT_{name.upper()}": number for number, name in enumerate(wire.COUNTERS)},
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a C program that includes the header prints: a number, or a message in hexadecimal, by
    its name.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("header")
    lines = [f'printf("{text}=%llu\\n", (unsigned long long)({text}));' for text in NUMBERS]
    lines += [f'{{ {text}; show("{name}", &m, sizeof m); }}' for name, _, text in EXAMPLES]
    lines.append(
        "{ struct { struct relay_frame f; unsigned char d[2]; } m = "
        f'{{{{{{R_FRAME, 10}}, {N32}}}, {{1, 2}}}}; show("FRAME", &m, 10); }}'
    )
    (folder / "header.c").write_text(
        f'#include <stdio.h>\n#include "{HEADER}"\n'
        "static void show(const char *name, const void *m, size_t size)\n"
        '{ printf("%s=", name); for (size_t i = 0; i < size; i++) printf("%02x", ((const unsigned char *)m)[i]); '
        'puts(""); }\n'
        f"int main(void) {{ {' '.join(lines)} return 0; }}\n"
    )
    program = folder / "header"
    subprocess.run(
        [compiler, "-std=gnu11", "-o", str(program), str(folder / "header.c")], check=True
    )
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return dict(line.rsplit("=", 1) for line in output.splitlines())


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(said: dict[str, str], text: str) -> None:
    """Every number equals the header's."""
    assert int(said[text]) == NUMBERS[text]


@pytest.mark.parametrize(("name", "message", "_"), EXAMPLES, ids=[each[0] for each in EXAMPLES])
def test_messages(said: dict[str, str], name: str, message: wire.Message, _: str) -> None:
    """Each message is packed to the bytes that a C compiler makes of the same message, and read
    from them.
    """
    data = bytes.fromhex(said[name])
    assert wire.pack(message) == data
    assert wire.unpack(data) == message


def test_frames(said: dict[str, str]) -> None:
    """A frame is as long as its bytes."""
    data = bytes.fromhex(said["FRAME"])
    assert wire.pack(FRAME) == data
    assert wire.unpack(data) == FRAME
    longest = wire.RelayFrame(1, b"x" * wire.MAX_FRAME)
    assert wire.unpack(wire.pack(longest)) == longest


def test_no_kind_is_missing() -> None:
    """Each kind of the header is known, and each is tested here."""
    body = re.search(r"enum relay_kind {(.*?)};", HEADER.read_text(), re.DOTALL)
    assert body is not None
    assert set(re.findall(r"R_(\w+) =", body[1])) == set(RelayKind.__members__)
    assert {name for name, *_ in EXAMPLES} | {"FRAME"} == set(RelayKind.__members__)
    counters = re.search(r"enum relay_counter {(.*?)};", HEADER.read_text(), re.DOTALL)
    assert counters is not None
    assert [name.lower() for name in re.findall(r"COUNT_(\w+)", counters[1])] == list(wire.COUNTERS)
    uses = re.search(r"enum relay_usage_value {(.*?)USAGE_VALUES", HEADER.read_text(), re.DOTALL)
    assert uses is not None
    assert [name.lower() for name in re.findall(r"USAGE_(\w+)", uses[1])] == list(wire.USES)


@given(st.binary(max_size=300))
def test_garbage(data: bytes) -> None:
    """Any bytes are either a message or WrongMessage."""
    try:
        message = wire.unpack(data)
    except WrongMessage:
        return
    assert len(wire.pack(message)) == len(data)
