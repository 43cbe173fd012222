"""No function, class or file grows without anybody noticing: the limits of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Final

import pytest

TOP: Final = Path(__file__).resolve().parents[2]
PYTHON: Final = ("plugin", "driver", "dataplane", "bench", "testbed", "tools")
CLASS: Final = 400
"""Lines of a class, and of a function: docstrings and comments count."""
FUNCTION: Final = 60
C_FUNCTION: Final = 80
"""Lines of a function in C. Programs for the kernel (`*.bpf.c`) may be longer: they run straight
through a packet, and the verifier of older kernels refuses calls in them."""


@pytest.mark.parametrize("folder", PYTHON)
def test_python(folder: str) -> None:
    """Classes have at most 400 lines, functions 60."""
    too_long = []
    for file in (TOP / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > (CLASS if isinstance(node, ast.ClassDef) else FUNCTION):
                    too_long.append(f"{file.relative_to(TOP)}: {node.name} has {lines} lines")
    assert too_long == []


def test_c() -> None:
    """Functions have at most 80 lines. clang-format puts their braces at the beginning of lines."""
    too_long = []
    for file in itertools.chain((TOP / "dataplane").rglob("*.c"), (TOP / "dataplane").rglob("*.h")):
        if file.name.endswith(".bpf.c"):
            continue
        begin = None
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if line == "{":
                begin = number
            elif line == "}" and begin is not None:
                if number - begin + 1 > C_FUNCTION:
                    too_long.append(f"{file.relative_to(TOP)}:{begin} has {number - begin + 1}")
                begin = None
    assert too_long == []
