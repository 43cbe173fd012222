"""Writes docs/files.md, a list of the source files: `python -m tools.files`.

The sentence beside each file is the first one of its docstring or of its first comment, so the list
cannot disagree with the files. A test compares the stored list with a new one.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

TOP: Final = Path(__file__).parents[1]
LIST: Final = TOP / "docs/files.md"
FOLDERS: Final = ("plugin", "driver", "dataplane", "testbed", "bench", "tools")
SUFFIXES: Final = (".py", ".c", ".h", ".sh", ".js")
HEAD: Final = """\
# Source files

`python -m tools.files` makes this list from the first sentence of each file. Start reading with
[Architecture](../ARCHITECTURE.md).
"""


def source_files(folder: str) -> list[Path]:
    """The source files below a top-level folder, by folder and name; relative to the repository."""
    found = [path.relative_to(TOP) for path in (TOP / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted(found, key=lambda path: (path.parent, path.name))


def _comment(text: str, suffix: str) -> str:
    """The first comment of a C file or a shell script, without its markers."""
    if suffix == ".sh":
        lines = [line for line in text.splitlines() if not line.startswith("#!")]
        block = []
        for line in lines:
            if not line.startswith("#"):
                break
            block.append(line.lstrip("# "))
        return "\n".join(block)
    match = re.match(r"\s*/\*(.*?)\*/", text, re.DOTALL)
    return re.sub(r"(?m)^\s*\* ?", "", match[1]).strip() if match else ""


def first_sentence(path: Path) -> str:
    """The first sentence of a file's docstring or comment, on one line; empty if it has none."""
    text = (TOP / path).read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = _comment(text, path.suffix)
    if not text and path.suffix == ".c" and (TOP / path).with_suffix(".h").exists():
        return f"The implementation of `{path.stem}.h`."
    paragraph = " ".join(text.split("\n\n", maxsplit=1)[0].split())
    match = re.match(r"(.*?[.?])(?= [A-Z`]|$)", paragraph)
    return (match[1] if match else paragraph).replace("|", "\\|")


def make_list() -> str:
    """The whole of docs/files.md."""
    parts = [HEAD]
    for folder in FOLDERS:
        parent = None
        for path in source_files(folder):
            if path.name == "__init__.py" and not first_sentence(path):
                continue
            if path.parent != parent:
                parent = path.parent
                parts.append(f"\n## {parent}/\n\n| file | contents |\n| --- | --- |\n")
            parts.append(f"| `{path.name}` | {first_sentence(path)} |\n")
    return "".join(parts)


if __name__ == "__main__":
    LIST.write_text(make_list())
