"""The image of probes that is made from the plugin's own files: Python and what it needs.

It has the files of the modules that the probe imports, and the shared objects that they map, as a
process tells that imports them; and parts of the C library that FreeFlow's libraries need. Nothing
is downloaded.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final
from urllib.parse import quote

from driver.errors import EngineError
from plugin.cli.client import Engine
from plugin.network_test.plan import TestPlan
from plugin.version import VERSION

NAME: Final = "freeflow-probe"
REPOSITORY: Final = f"freeflow.invalid/{NAME}"
"""No registry has this name (RFC 6761). Engines try to pull an image of a service though they have
it: a plain name is asked for at Docker Hub or its mirrors, and theirs would be started."""
IMAGE: Final = f"{REPOSITORY}:{VERSION}"

_MODULES: Final = (
    *("argparse", "base64", "codecs", "contextlib", "ctypes", "encodings.ascii"),
    *("encodings.idna", "encodings.latin_1", "encodings.utf_8", "errno", "fcntl", "hashlib"),
    *(
        "hmac",
        "http.client",
        "ipaddress",
        "json",
        "os",
        "pathlib",
        "random",
        "selectors",
        "signal",
        "socket",
    ),
    *("stringprep", "struct", "subprocess", "sys", "threading", "time", "traceback", "types"),
    *("typing", "zlib"),
)
_LIST: Final = """
import ctypes, importlib, sys
for name in ("libdl.so.2", "libpthread.so.0", "librt.so.1"):
    try:
        ctypes.CDLL(name)
    except OSError:
        pass
for name in sys.argv[1:]:
    importlib.import_module(name)
for module in list(sys.modules.values()):
    if getattr(module, "__file__", None):
        print(module.__file__)
for line in open("/proc/self/maps"):
    path = line.split(None, 5)[5:]
    if path and path[0].startswith("/"):
        print(path[0].strip())
"""
_FOLDERS: Final = ("/bin", "/lib", "/lib64", "/usr/lib64")
"""Links of Debian's merged /usr, where there are any."""
_LOADERS: Final = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")
_NAMES: Final = ("/usr/bin/python3",)


def used_files() -> list[Path]:
    """All regular files of the image, and the symbolic links that lead to them."""
    command = [sys.executable, "-I", "-c", _LIST, *_MODULES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found = {Path(line) for line in done.stdout.splitlines() if Path(line).is_file()}
    real = {Path(os.path.realpath(path)) for path in found}
    links = {Path(name) for name in _NAMES if Path(name).is_symlink()}
    for folder in {path.parent for path in real if ".so" in path.name}:
        links |= _links_to(folder, real)
    for folder in {Path(os.path.realpath(name)) for name in _LOADERS}:
        if folder.is_dir():
            links |= {link for link in _links_to(folder, real) if link.name.startswith("ld-")}
    links |= {Path(name) for name in _FOLDERS if Path(name).is_symlink()}
    return sorted(real | links)


def _links_to(folder: Path, files: set[Path]) -> set[Path]:
    return {
        link
        for link in folder.iterdir()
        if link.is_symlink() and Path(os.path.realpath(link)) in files
    }


def write_archive(file: io.BufferedIOBase, files: Iterable[Path]) -> None:
    """A root file system with these files as a tar archive; the same ones make the same archive."""
    with tarfile.open(fileobj=file, mode="w") as archive:
        for folder in ("tmp", "run", "etc", "proc", "sys", "dev"):
            made = tarfile.TarInfo(folder)
            made.type, made.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(made)
        for path in files:
            member = archive.gettarinfo(path, str(path).lstrip("/"))
            member.mtime = 0
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            if member.issym() or member.islnk():
                archive.addfile(member)
                continue
            with path.open("rb") as content:
                archive.addfile(member, content)


def has_image(engine: Engine, image: str) -> bool:
    """Whether this host has an image. Raises EngineError."""
    return engine.find(f"/images/{quote(image, safe='/:@')}/json") is not None


def pull_image(engine: Engine, image: str) -> None:
    """Pull an image to this host, unless it has it. Raises EngineError."""
    if not has_image(engine, image):
        last = image.rpartition("/")[2]
        tagged = ":" in last or "@" in last
        name = image if tagged else f"{image}:latest"
        engine.work(f"/images/create?fromImage={quote(name, safe='')}")


def make_image(engine: Engine) -> None:
    """Make the image on this host, unless it has it. Raises EngineError."""
    if has_image(engine, IMAGE):
        return
    with tempfile.TemporaryFile() as file:
        try:
            write_archive(file, used_files())
        except (OSError, subprocess.SubprocessError) as error:
            raise EngineError(
                "the image of the probes can't be made",
                cause=str(error),
                remedy="freeflow test --image IMAGE, with any image that has python3",
            ) from error
        length = file.tell()
        file.seek(0)
        engine.work(f"/images/create?fromSrc=-&repo={REPOSITORY}&tag={VERSION}", file, length)


def push_image(engine: Engine, registry: str) -> str:
    """Push the image to a registry that asks for no password; its name there, with its digest:
    others can push to it, too, and hosts are to start this image or none.

    Raises EngineError.
    """
    repository = f"{registry.rstrip('/')}/{NAME}"
    engine.change(
        "POST",
        f"/images/{quote(IMAGE, safe=':')}/tag?repo={quote(repository, safe='')}&tag={VERSION}",
    )
    engine.work(f"/images/{quote(repository, safe='/:')}/push?tag={VERSION}")
    found = engine.get(f"/images/{quote(f'{repository}:{VERSION}', safe='/:')}/json")
    for name in found.get("RepoDigests") or ():
        if str(name).startswith(f"{repository}@"):
            return str(name)
    raise EngineError(
        f"image {repository}:{VERSION}",
        cause="the engine does not say its digest in the registry",
        remedy="freeflow test --image IMAGE, with any image that has python3",
    )


def chosen_image(engine: Engine, plan: TestPlan) -> str:
    """The image that the user wants, which this host has then. Raises EngineError."""
    if plan.image:
        pull_image(engine, plan.image)
        return plan.image
    make_image(engine)
    return push_image(engine, plan.registry) if plan.registry else IMAGE
