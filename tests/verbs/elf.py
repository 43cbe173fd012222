"""The dynamic symbols of an ELF file, as `objdump` lists them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

_SYMBOL: Final = re.compile(
    r"^[0-9a-f]+ .{7} (?P<section>\S+)\t[0-9a-f]+ +(?:\(?(?P<node>[\w.]+)\)?)? +(?P<name>\S+)$",
    re.MULTILINE,
)
_NODE: Final = re.compile(r"^\d+ 0x[0-9a-f]+ 0x[0-9a-f]+ (\S+)", re.MULTILINE)


def _objdump(option: str, path: Path) -> str:
    return subprocess.run(
        ["objdump", option, path], check=True, capture_output=True, text=True
    ).stdout


def _symbols(path: Path, defined: bool) -> set[tuple[str, str]]:
    return {
        (match["node"] or "", match["name"])
        for match in _SYMBOL.finditer(_objdump("-T", path))
        if (match["section"] != "*UND*") == defined and match["node"] != match["name"]
    }


def exported(path: Path) -> set[tuple[str, str]]:
    """Version node and name of each symbol that a library exports."""
    return _symbols(path, True)


def needed(path: Path) -> set[tuple[str, str]]:
    """Version node, "Base" or "" for none, and name of each symbol that a file needs."""
    return _symbols(path, False)


def nodes(path: Path) -> set[str]:
    """The version nodes that a library defines, and its own name, which is one too."""
    text = _objdump("-p", path).partition("Version definitions:")[2]
    return set(_NODE.findall(text.partition("\n\n")[0]))


def dynamic(path: Path, tag: str) -> list[str]:
    """The values of a tag of the dynamic section, such as NEEDED."""
    return re.findall(rf"^  {tag} +(\S+)$", _objdump("-p", path), re.MULTILINE)
