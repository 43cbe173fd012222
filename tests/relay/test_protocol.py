"""`relay_protocol.h` and its Python copies describe the same bytes."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

from dataplane.router.relay_wire import COUNTERS, USES
from testbed import relays as client
from testbed.relays import relays
from tests.dataplane.places import ROOT, compile_c

HEADER = ROOT / "dataplane" / "relay" / "relay_protocol.h"
STRUCTS: dict[str, tuple[struct.Struct, str]] = {
    "relay_message": (client.HEADER, "kind size"),
    "relay_open": (client.OPEN, "message device port version gid_index transport spin encryption"),
    "relay_opened": (client.OPENED, "message error text mtu"),
    "relay_number": (client.NUMBER, "message number state"),
    "relay_outcome": (client.OUTCOME, "message number error text received"),
    "relay_offer": (client.OFFER, "message number error text size unused words"),
    "relay_accept": (client.ACCEPT, "message number peer size unused words"),
    "relay_arena": (client.ARENA, "message value arena owner"),
    "relay_slot": (client.SLOT, "message connection link slot user arena incarnation"),
    "relay_file": (client.FILE, "message writable file token owner"),
    "relay_frame": (client.FRAME, "message link"),
    "relay_counts": (client.COUNTS, "message unused counters"),
    "relay_usage": (client.USAGE, "message link arena values"),
}


def offsets(packing: struct.Struct) -> list[int]:
    """The offset of each field; the header's two fields count as one."""
    fields = re.findall(r"(\d*)([A-Za-z])", packing.format.lstrip("="))
    sizes: list[int] = []
    for count, code in fields:
        whole = code == "s" or count
        sizes += [struct.calcsize(f"={count}{code}")] if whole else [struct.calcsize(f"={code}")]
    sizes = [2, 2] if len(sizes) == 1 or fields == [("", "H"), ("", "H")] else [4, *sizes[2:]]
    return [sum(sizes[:number]) for number in range(len(sizes))]


def test_both_sides_mean_the_same_bytes(folder: Path) -> None:
    """Sizes, offsets, kinds and counters equal those that the compiler takes from the header."""
    lines = ["#include <stdio.h>", f'#include "{HEADER}"', "int main(void) {"]
    expected = []
    for name, (packing, fields) in STRUCTS.items():
        lines.append(f'printf("%zu\\n", sizeof(struct {name}));')
        expected.append(packing.size)
        for field, offset in zip(fields.split(), offsets(packing), strict=True):
            lines.append(f'printf("%zu\\n", offsetof(struct {name}, {field}));')
            expected.append(offset)
    for kind, number in client.KINDS.items():
        lines.append(f'printf("%d\\n", R_{kind});')
        expected.append(number)
    for number, counter in enumerate(COUNTERS):
        lines.append(f'printf("%d\\n", COUNT_{counter.upper()});')
        expected.append(number)
    for number, use in enumerate(USES):
        lines.append(f'printf("%d\\n", USAGE_{use.upper()});')
        expected.append(number)
    source = folder / "protocol.c"
    source.write_text("\n".join([*lines, "return 0; }"]))
    said = subprocess.run([compile_c(source, folder / "protocol")], capture_output=True, check=True)
    assert [int(line) for line in said.stdout.split()] == expected


def test_a_router_of_another_version_is_told_so(binary: Path) -> None:
    """A relay refuses a router of another version, also if its message has another size, and opens
    nothing.
    """
    size = client.OPEN.size
    with relays(binary, count=1) as (a,):
        for length in (size, size - 4, size + 4, client.HEADER.size):
            packed = client.OPEN.pack(client.KINDS["OPEN"], length, b"", 1, 9, 0, 2, 0, 0)
            a.raw(packed.ljust(length, b"\0")[:length])
            assert "version" in a.expect("OPENED").text


def test_a_relay_without_a_device_says_so(binary: Path) -> None:
    """A relay that finds no device reports it, and stays usable."""
    with client.relay(binary) as a:
        answer = a.open("nowhere0", transport=client.VERBS)
        assert answer.error
        assert answer.text
        a.number("LINK", 1)
        assert a.expect("LINKED").text == "no device is open"
