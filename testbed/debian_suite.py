"""Packages of any Debian release, by apt with its own configuration: nothing is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from testbed.process import CommandError, run

_MIRROR: Final = Path(__file__).resolve().parents[1] / "plugin/image/mirror.sh"
_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"


class SuiteAbsentError(Exception):
    """The archive no longer has this release, or a package of it."""


class DebianSuite:
    """A release of Debian, with its current list of packages, or of sources."""

    def __init__(
        self, name: str, work: Path, *, sources: bool = False, architecture: str = ""
    ) -> None:
        """`work` is a folder for apt's lists.

        Raises:
            SuiteAbsentError: the archive doesn't have it.
        """
        self.name = name
        mirror = run([str(_MIRROR)]).strip()
        only = f"arch={architecture} " if architecture else ""
        kind = "deb-src" if sources else "deb"
        (work / "sources.list").write_text(
            f"{kind} [{only}signed-by={_KEYRING}] {mirror} {name} main\n"
        )
        (work / "status").touch()
        settings = {
            "Dir::Etc::SourceList": work / "sources.list",
            "Dir::Etc::SourceParts": "-",
            "Dir::Etc::Preferences": "-",
            "Dir::Etc::PreferencesParts": "-",
            "Dir::State": work / "state",
            "Dir::State::Status": work / "status",
            "Dir::Cache": work / "cache",
            **({"APT::Architecture": architecture} if architecture else {}),
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            # Suites that aren't released yet have a Release file that expires.
            "Acquire::Check-Valid-Until": "false",
        }
        self._options = [
            word for key, value in settings.items() for word in ("-o", f"{key}={value}")
        ]
        (work / "state/lists/partial").mkdir(parents=True)
        (work / "cache/archives/partial").mkdir(parents=True)
        try:
            self.ask("apt-get", "update")
        except CommandError as error:
            if "404" not in error.output:
                raise
            raise SuiteAbsentError(f"the Debian archive serves no {name}: {error}") from error

    def ask(self, tool: str, *words: str, folder: Path | None = None) -> str:
        """What a tool of apt says. Raises CommandError."""
        there = ["env", "-C", str(folder)] if folder else []
        return run([*there, tool, *self._options, "-qq", *words], timeout=None)

    def unpack(self, packages: Sequence[str], target: Path, fetched: Path) -> None:
        """Download packages to `fetched`, if they aren't there, and unpack them."""
        fetched.mkdir(parents=True, exist_ok=True)
        self.ask("apt-get", "download", *packages, folder=fetched)
        target.mkdir(exist_ok=True)
        for package in packages:
            newest = max(fetched.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)
            # Some have files in /lib, which others make a link.
            into = f'tar -x --keep-directory-symlink -C "{target}"'
            run(["sh", "-c", f'dpkg --fsys-tarfile "$0" | {into}', str(newest)], timeout=None)

    def source(self, package: str, target: Path) -> None:
        """Download and unpack the source of a package.

        Raises:
            SuiteAbsentError: the suite does not have it.
        """
        work = target.with_name(f"{target.name}.source")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            self.ask("apt-get", "source", package, folder=work)
        except CommandError as error:
            if "Unable to find a source package" not in error.output:
                raise
            raise SuiteAbsentError(f"{self.name} has no source of {package}: {error}") from error
        found = next(Path(each.path) for each in os.scandir(work) if each.is_dir())
        found.rename(target)
        shutil.rmtree(work)
