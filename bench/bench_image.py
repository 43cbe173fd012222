"""The image of benchmarks and demo: a small Debian with redis, nginx and the load programs.

It is made on this machine, without a registry. `make prepare` makes the base (testbed/images.py);
this module adds the programs of `bench/tools`. The archive is cached under a hash of its contents,
so it is made again exactly when they change.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Final

from bench import compiled, load
from bench.namespaces import TOOLS
from testbed.images import make_bench_base

IMAGE: Final = "freeflow-bench:latest"


def add_files(archive: Path, files: Mapping[str, tuple[bytes, int]]) -> None:
    """Append files (path to content and mode) and their directories to a tar archive."""
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
    """The image's file system as a tar. `core` is the one that both ends of a round trip run on."""
    tools = TOOLS.lstrip("/")
    files = {
        **{f"{tools}/{name}": (data, 0o755) for name, data in compiled.contents().items()},
        f"{tools}/servers": (load.servers_script(core).encode(), 0o755),
        f"{tools}/nginx.conf": (load.NGINX_CONF.encode(), 0o644),
        f"{tools}/www/index.html": (b"0123456789abcdef" * 64, 0o644),
    }
    base = make_bench_base()
    content = hashlib.sha256(base.name.encode())
    for path, (data, mode) in sorted(files.items()):
        content.update(f"{path} {mode} {len(data)}\n".encode() + data)
    made = cache / f"bench-image-{content.hexdigest()[:12]}.tar"
    if not made.exists():
        for old in cache.glob("bench-image-*.tar"):
            old.unlink()
        partial = made.with_suffix(".part")
        shutil.copyfile(base, partial)
        add_files(partial, files)
        partial.rename(made)
    return made
