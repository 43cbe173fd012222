"""Root file systems from the Debian archive: one per engine version, and one for what runs in containers.

Each is made once and kept in the cache (`FREEFLOW_CACHE`, default /var/cache/freeflow), by the content of its recipe.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.testbed.process import run

TOP: Final = Path(__file__).resolve().parents[2]

_ENGINE_TOOLS: Final = "iptables,iproute2,procps,ca-certificates,kmod,nftables"
ENGINES: Final = {
    "20.10": ("bookworm", f"docker.io,{_ENGINE_TOOLS}"),
    "26.1": ("trixie", f"docker.io,docker-cli,{_ENGINE_TOOLS}"),
    "28.5": ("forky", f"docker.io,docker-cli,{_ENGINE_TOOLS}"),
}
"""Engine version -> Debian suite that has it, and packages."""

WORKLOAD: Final = (
    "bookworm",
    "redis-server,redis-tools,nginx-light,python3-minimal,iperf3,iproute2,iputils-ping,curl,netcat-openbsd,"
    "procps,apache2-utils,postgresql,postgresql-contrib",
)
WORKLOAD_IMAGE: Final = "workload:latest"


def cache() -> Path:
    """Where root file systems are kept."""
    path = Path(os.environ.get("FREEFLOW_CACHE", "/var/cache/freeflow"))
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time makes what is kept under this name."""
    with (cache() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def mmdebstrap(suite: str, packages: str, target: Path) -> None:
    """A root file system from the Debian archive, as a directory or a tar."""
    mirror = run([str(TOP / "plugin/image/mirror.sh")]).strip()
    run(
        [
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            f"--include={packages}",
            # Suites that aren't released yet have a Release file that expires.
            '--aptopt=Acquire::Check-Valid-Until "false"',
            '--aptopt=APT::Install-Recommends "false"',
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            '--customize-hook=rm -rf "$1"/var/lib/apt/lists "$1"/var/cache/apt',
            suite,
            str(target),
            mirror,
        ],
        timeout=900,
    )


def recipe_key(*parts: str) -> str:
    """Names what is made from a recipe."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def engine_root(version: str) -> Path:
    """The root file system of an engine; made if absent (about half a minute)."""
    if version not in ENGINES:
        raise ValueError(f"engine {version} is none of {', '.join(ENGINES)}")
    suite, packages = ENGINES[version]
    target = cache() / f"engine-{version}-{recipe_key(suite, packages)}"
    with locked(f"engine-{version}"):
        if not target.exists():
            temporary = target.with_suffix(".new")
            shutil.rmtree(temporary, ignore_errors=True)
            mmdebstrap(suite, packages, temporary)
            temporary.rename(target)
    return target


def workload_tar() -> Path:
    """The image that scenarios run in containers, as a tar for `docker import`."""
    suite, packages = WORKLOAD
    target = cache() / f"workload-{recipe_key(suite, packages)}.tar"
    with locked("workload"):
        if not target.exists():
            temporary = target.with_name("new-" + target.name)
            temporary.unlink(missing_ok=True)
            mmdebstrap(suite, packages, temporary)
            temporary.rename(target)
    return target
