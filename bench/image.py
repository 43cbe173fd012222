"""The image that bench and demo run: a small Debian with redis, nginx and the load programs, made on this machine.

No registry is asked. The archive is kept in `build/bench` under a name made of all that goes into it, so it is made
again exactly when something of that changes.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Final

from bench import load
from bench.errors import BenchError
from bench.place import run

IMAGE: Final = "freeflow-bench:latest"
PACKAGES: Final = (
    *("ca-certificates", "curl", "iperf3", "iproute2", "iputils-ping"),
    *("nginx-light", "redis-server", "redis-tools", "wrk"),
)
SOURCE: Final = Path(__file__).with_name("pingpong.c")
CFLAGS: Final = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Werror")
NEEDED: Final = {"mmdebstrap": ("mmdebstrap",), "gcc": ("gcc", "libc6-dev")}
"""Program -> Debian packages that bring it."""

UNUSED: Final = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")


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


def compile_pingpong(to: Path) -> None:
    run(["gcc", *CFLAGS, "-o", str(to), str(SOURCE)], 120)


def make_base(to: Path) -> None:
    """The file system of `PACKAGES` as a tar archive."""
    partial = to.with_suffix(".part")
    command = [
        *("mmdebstrap", "--variant=minbase", "--format=tar", "--quiet"),
        f"--include={','.join(PACKAGES)}",
        *(f"--dpkgopt=path-exclude={path}" for path in UNUSED),
        *(suite(), str(partial)),
    ]
    run(command, 900)
    partial.rename(to)


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


def archive(build: Path, core: int) -> Path:
    """The image's file system; `core` is where both ends of a round trip run."""
    need_programs()
    build.mkdir(parents=True, exist_ok=True)
    pingpong = build / "pingpong"
    compile_pingpong(pingpong)
    tools = load.TOOLS.lstrip("/")
    files = {
        f"{tools}/pingpong": (pingpong.read_bytes(), 0o755),
        f"{tools}/servers": (load.servers_script(core).encode(), 0o755),
        f"{tools}/nginx.conf": (load.NGINX_CONF.encode(), 0o644),
        f"{tools}/www/index.html": (b"0123456789abcdef" * 64, 0o644),
    }
    base_name = hashlib.sha256(" ".join((suite(), *PACKAGES, *UNUSED)).encode()).hexdigest()[:12]
    base = build / f"base-{base_name}.tar"
    if not base.exists():
        make_base(base)
    content = hashlib.sha256(base_name.encode())
    for path, (data, mode) in sorted(files.items()):
        content.update(f"{path} {mode} {len(data)}\n".encode() + data)
    made = build / f"image-{content.hexdigest()[:12]}.tar"
    if not made.exists():
        for old in build.glob("image-*.tar"):
            old.unlink()
        partial = made.with_suffix(".part")
        shutil.copyfile(base, partial)
        add_files(partial, files)
        partial.rename(made)
    return made


def import_into(docker: list[str], made: Path, name: str = IMAGE) -> None:
    """`docker` is the beginning of a command line that reaches the engine."""
    with made.open("rb") as data:
        done = subprocess.run(
            [*docker, "import", "-", name], stdin=data, capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise BenchError(f"docker import of {made.name}: {done.stderr.strip()}")
