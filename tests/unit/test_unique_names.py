"""One name means one thing: no two files, and no two classes, of the product and its tools share a
name without a reason.

Tests are not covered: a test file may have the name of what it tests, and its helpers are local.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tools.files import FOLDERS, TOP, source_files

CLASSES: Final = {
    "LinkSockets": "the interface in `link_table.py`, and its implementation in `link_sockets.py`",
}
"""Class names that are used twice on purpose, each with the reason."""
FILES: Final = {
    "__init__.py": "Python's name for a package",
    "__main__.py": "Python's name for the program of a package",
    "build.sh": "builds what the folder contains",
    "errors.py": "the exceptions of a package",
    "main.c": "the entry point of a C program or library",
}
"""File names that are used twice on purpose, each with the reason."""


def sources() -> Iterator[Path]:
    """The source files, relative to the repository."""
    for folder in FOLDERS:
        yield from source_files(folder)


def repeated(named: Iterator[tuple[str, Path]]) -> dict[str, list[str]]:
    """Names that belong to more than one file, with the files."""
    files: dict[str, set[str]] = defaultdict(set)
    for name, path in named:
        files[name].add(str(path))
    return {name: sorted(found) for name, found in files.items() if len(found) > 1}


def classes(path: Path) -> list[str]:
    tree = ast.parse((TOP / path).read_text())
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def test_no_two_classes_have_one_name() -> None:
    """A class name that is used in two files is listed in `CLASSES` with its reason."""
    found = repeated(
        (name, path) for path in sources() if path.suffix == ".py" for name in classes(path)
    )
    assert {name: files for name, files in found.items() if name not in CLASSES} == {}
    assert set(CLASSES) == set(found), "an entry without a second use"


def test_no_two_files_have_one_name() -> None:
    """A file name that is used in two folders is listed in `FILES` with its reason."""
    found = repeated((path.name, path) for path in sources())
    assert {name: files for name, files in found.items() if name not in FILES} == {}
    assert set(FILES) == set(found), "an entry without a second use"


def test_a_name_in_two_files_is_found() -> None:
    """Two files with one name are reported together, one file with two uses is not."""
    one, two = Path("a/x.py"), Path("b/x.py")
    named = iter([("Twice", one), ("Twice", two), ("Once", one), ("Once", one)])
    assert repeated(named) == {"Twice": ["a/x.py", "b/x.py"]}
