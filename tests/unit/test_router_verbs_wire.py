"""The router's messages of verbs are those of the C header."""

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
from dataplane.router import verbs_wire as wire
from dataplane.router.library_wire import MessageKind
from dataplane.router.verbs_wire import SlotKind, Step, VerbsKind

HEADER: Final = Path(__file__).parents[2] / "dataplane/library/verbs_protocol.h"
A, B = IPv4Address("10.0.4.7"), IPv6Address("fd00::9")
A_GID, B_GID = "{{[10] = 255, 255, 10, 0, 4, 7}}", "{{0xfd, [15] = 9}}"

EXAMPLES: Final[list[tuple[wire.VerbsMessage, str]]] = [
    (wire.VerbsOpen(1, 2), "struct v_open m = {{V_OPEN, sizeof m}, 1, 2}"),
    (
        wire.VerbsDevice(1, 2, 3, 4, 5, 6, True, 8, 9, A),
        f"struct v_device m = {{{{V_DEVICE, sizeof m}}, 1, 2, 3, 4, 5, 6, 1, 8, 9, {A_GID}}}",
    ),
    (
        wire.VerbsQueuePair(1, 2, 3, 4, 5, True, B),
        f"struct v_queue_pair m = {{{{V_QUEUE_PAIR, sizeof m}}, 1, 2, 3, 4, 5, 1, {B_GID}}}",
    ),
    (
        wire.VerbsGrant(1, 2, 3, SlotKind.DATAGRAMS, 4, 5, 6, 7, 8, 9, A, 11, 12),
        "struct v_grant m = "
        f"{{{{V_GRANT, sizeof m}}, 1, 2, 3, V_SLOT_DATAGRAMS, 4, 5, 6, 7, 8, 9, {A_GID}, 11, 12}}",
    ),
    (wire.VerbsRefuse(34, 2, 3, 4), "struct v_refuse m = {{V_REFUSE, sizeof m}, 34, 2, 3, 4}"),
    (
        wire.VerbsEnd(VerbsKind.QUEUE_PAIR_END, 1),
        "struct v_end m = {{V_QUEUE_PAIR_END, sizeof m}, 1}",
    ),
    (wire.VerbsEnd(VerbsKind.LISTEN_END, 1), "struct v_end m = {{V_LISTEN_END, sizeof m}, 1}"),
    (
        wire.VerbsDatagrams(VerbsKind.DATAGRAMS, 0, 1, 2, 0, True, 0, None),
        "struct v_datagrams m = {{V_DATAGRAMS, sizeof m}, 0, 1, 2, 0, 1}",
    ),
    (
        wire.VerbsDatagrams(VerbsKind.DATAGRAM_PEER, 9, 1, 2, 3, False, 0, A),
        f"struct v_datagrams m = {{{{V_DATAGRAM_PEER, sizeof m}}, 9, 1, 2, 3, 0, 0, {A_GID}}}",
    ),
    (
        wire.VerbsDatagrams(VerbsKind.GROUP, 0, 1, 2, 0, True, 7, B),
        f"struct v_datagrams m = {{{{V_GROUP, sizeof m}}, 0, 1, 2, 0, 1, 7, {B_GID}}}",
    ),
    (
        wire.VerbsListen(VerbsKind.LISTEN, 1, 2, 3, 4, True, None),
        "struct v_listen m = {{V_LISTEN, sizeof m}, 1, 2, 3, 4, 1}",
    ),
    (
        wire.VerbsListen(VerbsKind.LISTENING, 1, 2, 3, 4, False, B),
        f"struct v_listen m = {{{{V_LISTENING, sizeof m}}, 1, 2, 3, 4, 0, {B_GID}}}",
    ),
    (
        wire.VerbsConnection(
            Step.REJECT,
            id=2,
            connection=3,
            gid_index=4,
            space=5,
            port=6,
            from_port=18,
            qpn=7,
            type=8,
            psn=9,
            qkey=10,
            reject=11,
            responder_resources=12,
            initiator_depth=13,
            flow_control=14,
            retry=15,
            rnr_retry=16,
            srq=17,
            private_size=3,
            peer_gid=A,
            private=b"abc".ljust(wire.PRIVATE, b"\0"),
        ),
        "struct v_connection m = {{V_CONNECTION, sizeof m}, V_STEP_REJECT, 2, 3, 4, 5, 6, 18, 7, 8, 9, "
        f'10, 11, 12, 13, 14, 15, 16, 17, 3, {A_GID}, "abc"}}',
    ),
    *(
        (
            wire.VerbsMemory(kind, 1, 2, True, 4, 5, 6),
            f"struct v_memory m = {{{{V_{kind.name}, sizeof m}}, 1, 2, 1, 4, 5, 6}}",
        )
        for kind in VerbsKind
        if VerbsKind.MEMORY <= kind <= VerbsKind.REACHED
    ),
    *(
        (
            wire.VerbsStatus(1, 2, 3, 4, moved),
            f"struct v_status m = {{{{V_STATUS, sizeof m}}, 1, 2, {int(moved)}, 3, 4}}",
        )
        for moved in (False, True)
    ),
]
"""A message, and the C that makes the same."""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The bytes of each example, as a C compiler makes them, and its numbers."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing")
    folder = tmp_path_factory.mktemp("wire")
    lines = ["#include <stdio.h>", f'#include "{HEADER}"', "int main(void) {"]
    for _, made in EXAMPLES:
        lines.append(
            f"{{ {made}; const unsigned char *p = (void *)&m; "
            'for (size_t i = 0; i < sizeof m; i++) printf("%02x", p[i]); puts(""); }'
        )
    lines += ['printf("%d\\n%d\\n", VERBS_VERSION, VERBS_PRIVATE);', "return 0; }"]
    source = folder / "wire.c"
    source.write_text("\n".join(lines))
    subprocess.run(["gcc", "-o", folder / "wire", source], check=True)
    return subprocess.run(
        [folder / "wire"], check=True, capture_output=True, text=True
    ).stdout.split()


def test_messages(said: list[str]) -> None:
    """Each message is packed to the bytes that a C compiler makes of the same message, and read
    from them.
    """
    for (message, _), text in zip(EXAMPLES, said, strict=False):
        data = bytes.fromhex(text)
        assert wire.pack(message) == data, message
        assert wire.unpack(data) == message
    assert max(len(text) // 2 for text in said) == wire.MAX_MESSAGE
    assert said[len(EXAMPLES) :] == [str(wire.VERBS_VERSION), str(wire.PRIVATE)]


@pytest.mark.parametrize(
    ("name", "prefix", "members"),
    [
        ("verbs_kind", "V_", VerbsKind),
        ("verbs_slot", "V_SLOT_", SlotKind),
        ("verbs_step", "V_STEP_", Step),
    ],
)
def test_numbers(name: str, prefix: str, members: type[VerbsKind | SlotKind | Step]) -> None:
    """Enumerations have the header's numbers, and share none with other messages."""
    body = re.search(rf"enum {name} {{(.*?)}};", HEADER.read_text(), re.DOTALL)
    assert body is not None
    found = {key: int(value) for key, value in re.findall(r"(V_\w+) = (\d+)", body[1])}
    assert found == {f"{prefix}{member.name}": member.value for member in members}
    assert not set(VerbsKind) & {kind.value for kind in MessageKind}


def test_each_kind_has_an_example() -> None:
    """Each kind of message is tested here."""
    kinds = {int.from_bytes(wire.pack(message)[:2], "little") for message, _ in EXAMPLES}
    assert kinds == {kind.value for kind in VerbsKind}


@given(st.binary(max_size=wire.MAX_MESSAGE + 8))
def test_garbage(data: bytes) -> None:
    """Any bytes are either a message or WrongMessage."""
    try:
        message = wire.unpack(data)
    except WrongMessage:
        return
    assert len(wire.pack(message)) == len(data)


@given(
    st.sampled_from(EXAMPLES),
    st.lists(st.tuples(st.integers(0, 331), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_messages(
    example: tuple[wire.VerbsMessage, str], damage: list[tuple[int, int]]
) -> None:
    """A damaged message is another message, which can be packed again, or WrongMessage."""
    data = bytearray(wire.pack(example[0]))
    for place, value in damage:
        data[place % len(data)] = value
    try:
        message = wire.unpack(bytes(data))
    except WrongMessage:
        return
    assert len(wire.pack(message)) == len(data)


def test_too_much_private_data() -> None:
    """A connection can't have more private data than there is room for."""
    message = next(m for m, _ in EXAMPLES if isinstance(m, wire.VerbsConnection))
    data = bytearray(wire.pack(message))
    place = data.index((3).to_bytes(2, "little"), 54)
    data[place : place + 2] = (wire.PRIVATE + 1).to_bytes(2, "little")
    with pytest.raises(WrongMessage, match="257 bytes of private data"):
        wire.unpack(bytes(data))
