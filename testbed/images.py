"""Root file systems from the Debian archive: one per engine version, and one for containers.

`python -m testbed.prepare` makes each of them once. The cache (`FREEFLOW_CACHE`, default
/var/cache/freeflow) keeps them, named by the content of their recipe. Tests only check that they
exist, because making one takes longer than a test may.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from testbed.process import CommandError

TOP: Final = Path(__file__).resolve().parents[1]

_ENGINE_TOOLS: Final = "iptables,iproute2,procps,ca-certificates,kmod,nftables"
SYSTEMD: Final = "+systemd"
"""Behind an engine's version: systemd is the host's process 1, and makes control groups for the
engine. Later versions of it than bookworm's know only control groups of version 2."""
ENGINES: Final = {
    "20.10": ("bookworm", f"docker.io,systemd,{_ENGINE_TOOLS}"),
    "26.1": ("trixie", f"docker.io,docker-cli,{_ENGINE_TOOLS}"),
    "28.5": ("forky", f"docker.io,docker-cli,{_ENGINE_TOOLS}"),
}
"""Engine version to the Debian suite that has it, and its packages."""

WORKLOAD: Final = (
    "bookworm",
    "redis-server,redis-tools,nginx-light,python3-minimal,iperf3,iproute2,iputils-ping,curl,netcat-openbsd,"
    "procps,apache2-utils,postgresql,postgresql-contrib,ibverbs-utils,perftest",
)
WORKLOAD_IMAGE: Final = "workload:latest"
BENCH: Final = (
    *("ca-certificates", "curl", "iperf3", "iproute2", "iputils-ping"),
    *("memcached", "netpipe-openmpi", "nginx-light", "openmpi-bin", "openssh-client"),
    *("openssh-server", "perftest", "postgresql", "rdmacm-utils", "redis-server", "redis-tools"),
    *("ucx-utils", "wrk"),
)
"""Debian packages of the image that benchmarks and the demo run."""


def cache() -> Path:
    """The directory in which root file systems are kept."""
    path = Path(os.environ.get("FREEFLOW_CACHE", "/var/cache/freeflow"))
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock with which only one process at a time makes something of this name."""
    with (cache() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def workshop(target: Path) -> Iterator[Path]:
    """A folder to make something in, for one process at a time.

    A folder that a killed process has left behind is used again.
    """
    with locked(target.name):
        folder = cache() / f"new-{target.name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def forget_others(keep: Path, pattern: str) -> None:
    """Remove results of other recipes that are older than a day, because they are large."""
    for old in cache().glob(pattern):
        if old != keep and time.time() - old.stat().st_mtime > 86400:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


def bootstrap(suite: str, packages: str, target: Path) -> None:
    """Make a root file system from the Debian archive, as a directory or a tar; print the progress.

    There is no time-out: a slow machine needs long. Downloaded packages are kept when it is
    interrupted.

    Raises:
        CommandError: it failed; what it said is on standard error.
    """
    command = [str(TOP / "plugin/image/bootstrap.sh"), suite, packages, str(target)]
    environment = {**os.environ, "FREEFLOW_CACHE": str(cache())}
    done = subprocess.run(command, stdout=sys.stderr, env=environment, check=False)
    if done.returncode:
        raise CommandError(command, done.returncode, "its words are above; `make prepare` goes on")


class NotPreparedError(Exception):
    """The cache lacks something that only `make prepare` makes."""

    def __init__(self, what: str, path: Path) -> None:
        super().__init__(f"{what} isn't there ({path}); run `make prepare`")


def recipe_key(*parts: str) -> str:
    """The name of what is made from a recipe: a hash of its parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _engine_path(version: str) -> Path:
    if version not in ENGINES:
        raise ValueError(f"engine {version} is none of {', '.join(ENGINES)}")
    return cache() / f"engine-{version}-{recipe_key(*ENGINES[version])}"


def engine_root(version: str) -> Path:
    """The root file system of an engine, or of a host with this engine and `SYSTEMD`.

    Raises:
        NotPreparedError: it does not exist.
    """
    version = version.removesuffix(SYSTEMD)
    target = _engine_path(version)
    if not target.exists():
        raise NotPreparedError(f"the root file system of engine {version}", target)
    return target


def make_engine(version: str) -> Path:
    """The root file system of an engine; makes it if it is absent (about half a minute)."""
    target = _engine_path(version)
    with locked(f"engine-{version}"):
        if not target.exists():
            bootstrap(*ENGINES[version], target)
    return target


def _workload_path() -> Path:
    return cache() / f"workload-{recipe_key(*WORKLOAD)}.tar"


def workload_tar() -> Path:
    """The image of the tests' containers, as a tar for `docker import`.

    Raises:
        NotPreparedError: it does not exist.
    """
    target = _workload_path()
    if not target.exists():
        raise NotPreparedError("the image that containers run", target)
    return target


def make_workload() -> Path:
    """The image of the tests' containers; makes it if it is absent (about half a minute)."""
    target = _workload_path()
    with locked("workload"):
        if not target.exists():
            bootstrap(*WORKLOAD, target)
    return target


def _bench_suite() -> str:
    """The machine's own Debian, so that programs compiled here run in the image."""
    system = platform.freedesktop_os_release()
    return system.get("VERSION_CODENAME", "bookworm") if system["ID"] == "debian" else "bookworm"


def make_bench_base() -> Path:
    """The base of the benchmarks' image as a tar; made if absent (about half a minute)."""
    suite = _bench_suite()
    name = hashlib.sha256(" ".join((suite, *BENCH)).encode()).hexdigest()[:12]
    target = cache() / f"bench-base-{name}.tar"
    with locked("bench-base"):
        if not target.exists():
            bootstrap(suite, ",".join(BENCH), target)
    return target
