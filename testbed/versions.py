"""This version and the last one, each with what a host of it runs, for tests of upgrades and of
hosts with different versions.

`make prepare` builds the last version from the repository's history, with its own build scripts. A
checkout without that history (a shallow clone) gets the commit from its origin. Where that fails,
as in an archive of the source, there is no last version, and tests that need it are skipped.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from testbed.images import NotPreparedError, locked
from testbed.process import CommandError, run

TOP: Final = Path(__file__).resolve().parents[1]
LAST: Final = "73618b5809060c4fab76add2b6145fe586f3ca88"
"""The commit of the last version: the last one before the path `relay`."""
_CODE: Final = ("plugin", "driver", "dataplane", "config.json")
_PARTS: Final = {
    "library": "libfreeflow.so",
    "relay": "freeflow-relay",
    "ebpf": "overlay.bpf.o",
}
"""Folder in `dataplane/` to the file that is built from it, in `build/`."""
_INSTALLED: Final = "rootfs/usr/lib/freeflow"


class VersionAbsentError(Exception):
    """Neither this checkout nor its origin has the last version's commit."""


@dataclass(frozen=True)
class Version:
    """A checkout of a version, and what was built from it."""

    top: Path
    library: Path
    relay: Path
    """One that can also use memory instead of an RDMA device, for test beds."""
    has_relay_path: bool = True
    """Whether its router knows TCP between relays, and `--open-relay`."""


THIS: Final = Version(TOP, TOP / "build/libfreeflow.so", TOP / "build/freeflow-relay-memory")


def _target() -> Path:
    return TOP / "build" / f"version-{LAST[:12]}"


def last() -> Version:
    """The last version.

    Raises:
        NotPreparedError: it wasn't made.
    """
    target = _target()
    if not target.exists():
        raise NotPreparedError(f"the last version (commit {LAST[:7]})", target)
    built = target / "build"
    return Version(target, built / _PARTS["library"], built / _PARTS["relay"], has_relay_path=False)


def make_last() -> Path:
    """Build the last version, if it is absent (some seconds).

    Raises:
        VersionAbsentError: its commit can't be had.
        CommandError: it can't be built.
    """
    target = _target()
    with locked(target.name):
        if not target.exists():
            fetch()
            target.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as work:
                made = Path(work) / target.name
                _build(made)
                made.rename(target)
    return target


def fetch() -> None:
    """Get the last version's commit from the origin, if this checkout lacks it.

    Raises:
        VersionAbsentError: it can't be had.
    """
    try:
        if _has_commit():
            return
        # Without a terminal, so that it does not wait for a password.
        run(["env", "GIT_TERMINAL_PROMPT=0", *_git("fetch", "--depth=1", "origin", LAST)])
    except (CommandError, FileNotFoundError) as error:
        raise VersionAbsentError(
            f"no history back to {LAST[:7]}, and git can't fetch it: {str(error).strip()[-300:]}"
        ) from error


def _has_commit() -> bool:
    try:
        run(_git("cat-file", "-e", f"{LAST}^{{tree}}"))
    except CommandError:
        return False
    return True


def _git(*words: str) -> list[str]:
    return ["git", "-C", str(TOP), *words]


def _build(folder: Path) -> None:
    folder.mkdir()
    archive = folder / "code.tar"
    run(_git("archive", f"--output={archive}", LAST, *_CODE))
    run(["tar", "-x", "-C", str(folder), "-f", str(archive)])
    archive.unlink()
    for part, name in _PARTS.items():
        run([str(folder / "dataplane" / part / "build.sh"), str(folder / "build" / name)])


def make_last_plugin(plugin: Path, target: Path) -> None:
    """Make the last version's plugin in `target`, from a built plugin of this version.

    It has the base system of that one, which has all packages that the service of the last version
    needs, and the code, library, relay and eBPF programs of the last version.

    Raises:
        NotPreparedError: the last version wasn't made.
    """
    version = last()
    run(["cp", "-a", str(plugin), str(target)])
    install = version.top / "plugin/image/install-code.sh"
    run([str(install), str(version.top), str(target / "rootfs")])
    for name in _PARTS.values():
        shutil.copy(version.top / "build" / name, target / _INSTALLED / name)
    shutil.copy(version.top / "config.json", target / "config.json")
