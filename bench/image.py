"""The image that bench and demo run: a small Debian with redis, nginx and the load programs, made on this machine.

No registry is asked. The base is made by `make prepare` (testbed/images.py); this adds the programs of `bench/tools`.
The archive is cached under a hash of everything in it, so it is made again exactly when something in it changes.
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
from bench.place import TOOLS
from testbed.images import make_bench_base

IMAGE: Final = "freeflow-bench:latest"


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
