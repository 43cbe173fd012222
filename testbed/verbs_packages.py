"""Programs of verbs that this machine's Debian has not: those of rdma-core in other releases, and
Valkey with its RDMA module.

`make prepare` makes them in the cache. Where the archive has them no more, it says so, and who
needs them is told the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from testbed.debian_suite import DebianSuite, SuiteAbsentError
from testbed.images import NotPreparedError, cache, forget_others, recipe_key, workshop
from testbed.process import run

_USUAL: Final = (
    *("libc6", "libgcc-s1", "libnl-3-200", "libnl-route-3-200"),
    *("libibverbs1", "ibverbs-utils", "rdmacm-utils"),
)
RDMA_CORE: Final = {
    "bullseye": (*_USUAL, "librdmacm1"),
    "trixie": (*_USUAL, "librdmacm1t64"),
    "forky": (*_USUAL, "librdmacm1t64"),
}
"""Suite to the packages that rdma-core's programs need: versions 33, 56 and 65 when this was
written.
"""
_VALKEY_SUITE: Final = "forky"
"""The first one whose `valkey-cli` and `valkey-benchmark` speak RDMA (9.0)."""
_BUILD: Final = ("BUILD_RDMA=module", "BUILD_LUA=no", "MALLOC=libc", "OPTIMIZATION=-O0", "DEBUG=")
VALKEY: Final = ("valkey-server", "valkey-cli", "valkey-benchmark", "valkey-rdma.so")
"""What is kept of it."""


def _rdma_core_path(suite: str) -> Path:
    return cache() / f"rdma-core-{suite}-{recipe_key(*RDMA_CORE[suite])}"


def _valkey_path() -> Path:
    return cache() / f"valkey-{recipe_key(_VALKEY_SUITE, *_BUILD, *VALKEY)}"


def rdma_core(suite: str) -> Path:
    """A root file system with rdma-core's programs of a suite, and little else.

    Raises:
        SuiteAbsentError: the archive had no such suite when it was to be made.
        NotPreparedError: it wasn't made.
    """
    return _prepared(_rdma_core_path(suite), f"rdma-core of {suite}")


def valkey() -> Path:
    """The folder with Valkey's programs. Raises the same."""
    return _prepared(_valkey_path(), "Valkey with RDMA")


def make_rdma_core(suite: str) -> Path:
    """rdma-core's programs of a suite; made if they are absent (some seconds).

    Raises:
        SuiteAbsentError: the archive has no such suite (any more).
    """
    target = _rdma_core_path(suite)

    def make(work: Path, to: Path) -> None:
        # For releases that have these as links, and for those whose packages still use them.
        for name in ("bin", "lib", "lib64", "sbin"):
            (to / "usr" / name).mkdir(parents=True)
            (to / name).symlink_to(f"usr/{name}")
        for name in ("dev", "proc", "run/freeflow", "tmp"):
            (to / name).mkdir(parents=True)
        fetched = cache() / "downloads" / target.name
        DebianSuite(suite, work).unpack(RDMA_CORE[suite], to, fetched)
        shutil.rmtree(fetched)

    return _make(target, f"rdma-core-{suite}-*", make)


def make_valkey() -> Path:
    """Valkey's programs; built from Debian's source if they are absent (about a minute).

    Raises:
        SuiteAbsentError: the archive has no such source (any more).
    """

    def make(work: Path, to: Path) -> None:
        source = work / "valkey"
        DebianSuite(_VALKEY_SUITE, work, sources=True).source("valkey", source)
        jobs = f"-j{os.cpu_count() or 1}"
        run(["make", "-C", str(source / "src"), jobs, *_BUILD, *VALKEY], timeout=None)
        for name in VALKEY:
            shutil.copy(source / "src" / name, to)

    return _make(_valkey_path(), "valkey-*", make)


def _absence(target: Path) -> Path:
    """The file with the reason why the archive does not have something."""
    return target.with_name(f"{target.name}.absent")


def _prepared(target: Path, what: str) -> Path:
    if target.exists():
        return target
    if _absence(target).exists():
        raise SuiteAbsentError(_absence(target).read_text())
    raise NotPreparedError(what, target)


def _make(target: Path, pattern: str, make: Callable[[Path, Path], None]) -> Path:
    """Let `make` fill a folder, given one to work in, unless the target exists."""
    with workshop(target) as work:
        if not target.exists():
            made = work / "made"
            made.mkdir()
            _absence(target).unlink(missing_ok=True)
            try:
                make(work, made)
            except SuiteAbsentError as error:
                _absence(target).write_text(str(error))
                raise
            made.rename(target)
        forget_others(target, pattern)
    return target
