"""Identifies the program in a file by its first bytes; nothing is run, and no length is trusted.

A library can be preloaded only if a dynamic loader starts the program (PT_INTERP), and it sees only
calls that go through the C library. Go programs make system calls themselves, even dynamic ones.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

HEAD: Final = 1 << 20
"""Bytes of a file that are read: headers and notes are at its beginning."""
_HEADERS: Final = 64
"""Limit of the program headers that are read; linkers make about ten."""
_NOTES: Final = 4096
"""Limit of the bytes of notes, and of a loader's name, that are read."""
_INTERPRETER: Final = 3
_NOTE: Final = 4
_GO_BUILD_ID: Final = 4
_MACHINES: Final = {
    3: "i386",
    21: "ppc64le",
    22: "s390x",
    40: "arm",
    62: "x86_64",
    183: "aarch64",
    243: "riscv64",
}


@dataclass(frozen=True, slots=True)
class Program:
    """`machine` is as in `uname -m`; `words` is the first line of a script, without `#!`; `musl`:
    the loader is musl's.
    """

    machine: str = ""
    dynamic: bool = False
    go: bool = False
    musl: bool = False
    words: tuple[str, ...] = ()


def identify(head: bytes) -> Program | None:
    """None: neither an ELF file nor a script."""
    if head.startswith(b"#!"):
        line = head[2:256].partition(b"\n")[0].decode(errors="replace")
        return Program(words=tuple(line.split(None, 1))) if line.strip() else None
    if not head.startswith(b"\x7fELF"):
        return None
    try:
        return _elf(head)
    except (struct.error, IndexError, OverflowError):
        return None


def _elf(head: bytes) -> Program:
    wide, order = head[4] == 2, "<" if head[5] == 1 else ">"
    (machine,) = struct.unpack_from(order + "H", head, 18)
    if wide:
        (table,) = struct.unpack_from(order + "Q", head, 32)
        size, count = struct.unpack_from(order + "HH", head, 54)
    else:
        (table,) = struct.unpack_from(order + "I", head, 28)
        size, count = struct.unpack_from(order + "HH", head, 42)
    if size < (56 if wide else 32):
        # The kernel starts no program with other sizes.
        count = 0
    dynamic = go = musl = False
    for number in range(min(count, _HEADERS)):
        at = table + number * size
        (kind,) = struct.unpack_from(order + "I", head, at)
        if kind not in (_INTERPRETER, _NOTE):
            continue
        if wide:
            (start,) = struct.unpack_from(order + "Q", head, at + 8)
            (length,) = struct.unpack_from(order + "Q", head, at + 32)
        else:
            (start,) = struct.unpack_from(order + "I", head, at + 4)
            (length,) = struct.unpack_from(order + "I", head, at + 16)
        content = head[start : start + min(length, _NOTES)]
        if kind == _INTERPRETER:
            dynamic, musl = True, b"/ld-musl-" in content
        else:
            go = go or _has_go_note(content, order)
    name = _MACHINES.get(machine, f"machine {machine}")
    return Program(machine=name, dynamic=dynamic, go=go, musl=musl)


def _has_go_note(notes: bytes, order: str) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name, content, kind = struct.unpack_from(order + "III", notes, at)
        if kind == _GO_BUILD_ID and notes[at + 12 : at + 12 + name] == b"Go\0\0":
            return True
        at += 12 + (name + 3) // 4 * 4 + (content + 3) // 4 * 4
    return False
