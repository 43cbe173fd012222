"""The image that bench and demo run: a small Debian with redis, nginx and the load programs, made on this machine.

No registry is asked. The archive is kept in the test bed's cache under a name made of all that goes into it, so it is
made again exactly when something of that changes.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Final

from bench import compiled, load
from bench.place import TOOLS, run
from testbed.images import bootstrap, locked

IMAGE: Final = "freeflow-bench:latest"
PACKAGES: Final = (
    *("ca-certificates", "curl", "iperf3", "iproute2", "iputils-ping"),
    *("memcached", "nginx-light", "postgresql", "redis-server", "redis-tools", "wrk"),
)
NEEDED: Final = {"mmdebstrap": ("mmdebstrap",), "gcc": ("gcc", "libc6-dev")}
"""Program -> Debian packages that bring it."""


def need_programs() -> None:
    """Install what is missing to make the image."""
    missing = [
        package
        for program, packages in NEEDED.items()
        if shutil.which(program) is None
        for package in packages
    ]
    if missing:
        run(["apt-get", "update", "-q"], 300)
        run(["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing], 900)


def suite() -> str:
    """The machine's own Debian, so that what is compiled here runs there."""
    system = platform.freedesktop_os_release()
    return system.get("VERSION_CODENAME", "bookworm") if system["ID"] == "debian" else "bookworm"


def base(cache: Path) -> Path:
    """The file system of `PACKAGES` as a tar archive; made if absent (about half a minute)."""
    name = hashlib.sha256(" ".join((suite(), *PACKAGES)).encode()).hexdigest()[:12]
    target = cache / f"bench-base-{name}.tar"
    with locked("bench-base"):
        if not target.exists():
            need_programs()
            bootstrap(suite(), ",".join(PACKAGES), target)
    return target


def add_files(archive: Path, files: Mapping[str, tuple[bytes, int]]) -> None:
    """Append files, path -> content and mode, to a tar archive; their directories with them."""
    with tarfile.open(archive, "a") as tar:
        directories = {str(parent) for path in files for parent in Path(path).parents}
        for directory in sorted(directories - {".", "/"}):
            entry = tarfile.TarInfo(directory)
            entry.type = tarfile.DIRTYPE
            entry.mode = 0o755
            tar.addfile(entry)
        for path, (content, mode) in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            entry.mode = mode
            tar.addfile(entry, BytesIO(content))


def archive(cache: Path, core: int) -> Path:
    """The image's file system; `core` is where both ends of a round trip run."""
    need_programs()
    tools = TOOLS.lstrip("/")
    files = {
        **{f"{tools}/{name}": (data, 0o755) for name, data in compiled.contents().items()},
        f"{tools}/servers": (load.servers_script(core).encode(), 0o755),
        f"{tools}/nginx.conf": (load.NGINX_CONF.encode(), 0o644),
        f"{tools}/www/index.html": (b"0123456789abcdef" * 64, 0o644),
    }
    found = base(cache)
    content = hashlib.sha256(found.name.encode())
    for path, (data, mode) in sorted(files.items()):
        content.update(f"{path} {mode} {len(data)}\n".encode() + data)
    made = cache / f"bench-image-{content.hexdigest()[:12]}.tar"
    if not made.exists():
        for old in cache.glob("bench-image-*.tar"):
            old.unlink()
        partial = made.with_suffix(".part")
        shutil.copyfile(found, partial)
        add_files(partial, files)
        partial.rename(made)
    return made
