"""Makes the linker's version script and the stubs of our libibverbs from the table `symbols.txt`.

`python3 symbols.py FOLDER` writes `symbols.map` and `stubs.c`. It needs nothing but Python, as it
runs in each build. A symbol with the word `real` must be a function of this folder; all others
become another name of one of the few functions in `stubs.c`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

TABLE: Final = Path(__file__).with_name("symbols.txt")
PUBLIC: Final = "IBVERBS_1."
PRIVATE: Final = "IBVERBS_PRIVATE_"
REAL: Final = "real"
_STUBS: Final = {
    "pointer": "void *stub_pointer(void)\n{\n        errno = EOPNOTSUPP;\n        return 0;\n}\n",
    "minus": "int stub_minus(void)\n{\n        errno = EOPNOTSUPP;\n        return -1;\n}\n",
    "code": "int stub_code(void)\n{\n        return EOPNOTSUPP;\n}\n",
    "zero": "uint64_t stub_zero(void)\n{\n        return 0;\n}\n",
    "nothing": "void stub_nothing(void)\n{\n}\n",
    "data": "uint64_t stub_data;\n",
}
"""The C text of each kind of stub."""
_LINE: Final = re.compile(r" +(?P<name>[A-Za-z_]\w*\*?) (?P<kind>[a-z]+)(?: (\d+)-(\d*))?")


class Symbol(NamedTuple):
    """A symbol in one of its nodes. `kind` is `real` or that of a stub."""

    node: str
    name: str
    kind: str

    @property
    def is_default(self) -> bool:
        """Whether programs are linked with this one, if several nodes have the name."""
        return self.node.startswith(PUBLIC)


def numbers(text: str) -> Iterator[int]:
    """The numbers of a list such as `15,17,66-80`."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def read_table(text: str) -> tuple[list[str], list[Symbol]]:
    """The nodes in their order, and the symbols of all of them.

    Raises:
        ValueError: a line is neither a comment, a node nor a symbol.
    """
    nodes: list[str] = []
    symbols: list[Symbol] = []
    heads: list[tuple[str, int]] = []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("IBVERBS_"):
            prefix = PRIVATE if line.startswith(PRIVATE) else PUBLIC
            heads = [(f"{prefix}{number}", number) for number in numbers(line[len(prefix) :])]
            nodes += [node for node, _ in heads]
            continue
        match = _LINE.fullmatch(line)
        if match is None or not heads or match["kind"] not in {REAL, *_STUBS}:
            raise ValueError(f"{TABLE.name}: {line!r}")
        first, last = int(match[3] or 0), int(match[4] or 1 << 30)
        symbols += [
            Symbol(node, match["name"].replace("*", str(number)), match["kind"])
            for node, number in heads
            if first <= number <= last
        ]
    return nodes, symbols


def defaults(symbols: list[Symbol]) -> dict[str, Symbol]:
    """The symbol that each name means if no node is named: that of the newest public node."""
    return {symbol.name: symbol for symbol in symbols if symbol.is_default}


def version_script(nodes: list[str], symbols: list[Symbol]) -> str:
    """The linker's version script, with the functions of this folder. `stubs.c` names the nodes of
    all other symbols.
    """
    real = [symbol for symbol in defaults(symbols).values() if symbol.kind == REAL]
    # The linker takes "local: *" for older names of a symbol in that node too.
    empty = next(node for node in nodes if all(symbol.node != node for symbol in symbols))
    lines, before = [], ""
    for node in nodes:
        names = sorted(symbol.name for symbol in real if symbol.node == node)
        lines.append(f"{node} {{")
        lines += ["\tglobal:", *(f"\t\t{name};" for name in names)] if names else []
        lines += ["\tlocal: *;"] if node == empty else []
        lines.append(f"}}{before};")
        before = f" {node}" if node.startswith(PUBLIC) else ""
    return "\n".join(lines) + "\n"


def stubs(symbols: list[Symbol]) -> str:
    """The C file of what is not real, and of functions that are only in private nodes."""
    chosen = defaults(symbols)
    jumps = {symbol.name for symbol in symbols if symbol.kind == REAL} - chosen.keys()
    lines = ["#include <errno.h>", "#include <stdint.h>", ""]
    lines += [f"{text}\n" for text in _STUBS.values()]
    # An assembler gives several nodes only to what is defined in the same file.
    lines += ["#ifdef __aarch64__", '#define JUMP "b "', "#else", '#define JUMP "jmp "', "#endif"]
    lines += [
        f'__asm__(".text\\n.hidden {name}\\n.globl jump_{name}\\n'
        f'.type jump_{name}, %function\\njump_{name}: " JUMP "{name}\\n");'
        for name in sorted(jumps)
    ]
    for symbol in symbols:
        target = f"jump_{symbol.name}" if symbol.kind == REAL else f"stub_{symbol.kind}"
        is_default = chosen.get(symbol.name) is symbol
        if not (is_default and symbol.kind == REAL):
            name = f"{symbol.name}{'@@' if is_default else '@'}{symbol.node}"
            lines.append(f'__asm__(".symver {target}, {name}");')
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write both files into the folder that the command names."""
    folder = Path(sys.argv[1])
    nodes, symbols = read_table(TABLE.read_text())
    (folder / "symbols.map").write_text(version_script(nodes, symbols))
    (folder / "stubs.c").write_text(stubs(symbols))


if __name__ == "__main__":
    main()
