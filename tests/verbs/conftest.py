"""Our libibverbs, built once, and programs that have parts of it inside them."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import pytest

from testbed.patience import patience
from tests.dataplane.places import compile_c

HERE: Final = Path(__file__).parent
BUILD: Final = HERE.parents[1] / "dataplane" / "verbs" / "build.sh"
HEADER: Final = Path("/usr/include/infiniband/verbs.h")
SECONDS: Final = os.environ.get("TORTURE_SECONDS", "1")
"""How long a torture lasts."""
SANITIZERS: Final = ("", "address,undefined", "thread")
_WITH_ROUTER: Final = ("agent.c", "client.c", "cm_", "datagram_slots.c", "direct_files.c", "pair.c")
"""How the names of sources begin that need a router."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built library; its companion lies beside it."""
    missing = [tool for tool in ("gcc", "objdump") if shutil.which(tool) is None]
    missing += [] if HEADER.exists() else [str(HEADER)]
    if missing:
        pytest.skip(f"missing: {', '.join(missing)}")
    output = tmp_path_factory.mktemp("verbs") / "libibverbs.so.1"
    subprocess.run([BUILD, output], check=True, timeout=patience(120))
    return output


def sources(*more: str) -> list[str]:
    """The sources that need no router, and more of them by name."""
    found = sorted(BUILD.parent.glob("*.c"))
    return [
        str(path) for path in found if path.name in more or not path.name.startswith(_WITH_ROUTER)
    ]


@cache
def _folder() -> TemporaryDirectory[str]:
    """For objects, until the end of the tests."""
    return TemporaryDirectory(prefix="freeflow-verbs-")


@cache
def _object(source: str, sanitizer: str) -> Future[Path]:
    """A source of the library, compiled once for all programs that have it inside them."""
    target = Path(_folder().name) / f"{Path(source).stem}-{sanitizer}.o"
    return _compilers().submit(compile_c, Path(source), target, "-c", *_flags(sanitizer))


@cache
def _compilers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def _flags(sanitizer: str) -> list[str]:
    return (
        [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-Wno-tsan"] if sanitizer else []
    )


def compile_test(name: str, folder: Path, sanitizer: str, *options: str) -> Path:
    """The program `name.c` beside this file, with a sanitizer or without ("").

    `options` are sources of the library, and the linker's.
    """
    if shutil.which("gcc") is None or not HEADER.exists():
        pytest.skip(f"missing: gcc, {HEADER}")
    started = [_object(word, sanitizer) if word.endswith(".c") else word for word in options]
    more = [str(word.result()) if isinstance(word, Future) else word for word in started]
    return compile_c(HERE / f"{name}.c", folder / name, *_flags(sanitizer), *more)


def run_test(program: Path, *arguments: str) -> None:
    """Run such a program, which has to succeed."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)


def some_seed() -> int:
    """A number for `run_test`, which prints it if the program fails."""
    return int.from_bytes(os.urandom(4), "big")


def run_rules_and_race(program: Path) -> None:
    """Run the two parts of a program: one case after the other, and threads against each other."""
    run_test(program, "rules")
    run_test(program, "race", SECONDS, str(some_seed()))
