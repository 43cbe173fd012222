"""Finds which program an image starts, and whether a library can be preloaded into it.

Nothing is started. A container is created and removed, because the engine sends an image's files
only that way. Launchers and shells are followed to the programs that they start, since these
inherit the variable; what a script does is not known.
"""

from __future__ import annotations

import os
import posixpath
import shlex
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from plugin.cli.client import Engine
from plugin.cli.program import HEAD, Program, identify

SHELLS: Final = ("sh", "bash", "dash", "ash", "zsh", "ksh")
_LAUNCHERS: Final = {
    "tini": 0,
    "tini-static": 0,
    "dumb-init": 0,
    "catatonit": 0,
    "docker-init": 0,
    "env": 0,
    "exec": 0,
    "nice": 0,
    "gosu": 1,
    "su-exec": 1,
}
"""Programs that only start another one, and how many arguments precede it."""
_LONGEST_COMMAND: Final = 16384
_FOLDERS: Final = 32
"""Limit of the folders of a PATH that are searched."""
_LINKS: Final = 16
_STEPS: Final = 8


@dataclass(frozen=True, slots=True)
class File:
    """A regular file of an image, or a symbolic link (`link`). `head` is its beginning."""

    mode: int = 0o755
    owner: int = 0
    group: int = 0
    capabilities: bool = False
    link: str = ""
    head: bytes = b""


@dataclass(frozen=True, slots=True)
class Start:
    """What a container runs first. `user` as in an image: empty is root."""

    words: tuple[str, ...]
    path: tuple[str, ...] = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")  # fmt: skip
    folder: str = "/"
    user: str = ""


@dataclass(slots=True)
class Verdict:
    """`hindered`: programs that can't be accelerated, and why. `unknown`: why there is no
    answer. `musl`: whether the program's C library is musl; None: not known.
    """

    hindered: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    musl: bool | None = None


Files = Callable[[str], File | None]


def split_words(text: str) -> list[str]:
    """Split as a shell does. Raises ValueError if that fails, or the text is too long."""
    if len(text) > _LONGEST_COMMAND:
        raise ValueError("too long")
    return shlex.split(text)


def environment(config: dict[str, Any]) -> dict[str, str]:
    """An image's variables."""
    pairs = (str(line).partition("=") for line in config.get("Env") or ())
    return {name: value for name, _, value in pairs}


def start_of(
    config: dict[str, Any],
    entrypoint: Sequence[str] | None = None,
    command: Sequence[str] | None = None,
    user: str = "",
    folder: str = "",
) -> Start:
    """What an image starts, with the service's own words in place of the image's.

    As in Docker, a service's entrypoint also replaces the image's command.
    """
    words = list(entrypoint if entrypoint is not None else config.get("Entrypoint") or ())
    if command is not None:
        words += command
    elif entrypoint is None:
        words += config.get("Cmd") or ()
    path = environment(config).get("PATH", "")
    start = Start(
        tuple(words), folder=folder or config.get("WorkingDir") or "/", user=user or config.get("User") or ""
    )  # fmt: skip
    folders = tuple(path.split(":", _FOLDERS)[:_FOLDERS])
    return Start(start.words, folders, start.folder, start.user) if path else start


def follow(files: Files, path: str) -> tuple[str, File] | None:
    """The file at `path`, through symbolic links; None if there is none."""
    for _ in range(_LINKS):
        found = files(path)
        if found is None or not found.link:
            return (path, found) if found else None
        path = posixpath.normpath(posixpath.join(posixpath.dirname(path), found.link))
    return None


def _find(files: Files, word: str, start: Start) -> tuple[str, File] | None:
    if "/" in word:
        return follow(files, posixpath.normpath(posixpath.join(start.folder, word)))
    for folder in start.path:
        found = follow(files, posixpath.join(start.folder, folder, word))
        if found is not None:
            return found
    return None


def _after_launcher(name: str, words: Sequence[str]) -> list[str]:
    rest = list(words[1:])
    while rest and (rest[0].startswith("-") or (name == "env" and "=" in rest[0])):
        rest.pop(0)
    return rest[_LAUNCHERS[name] :]


def _after_shell(words: Sequence[str]) -> list[str]:
    """What `sh -c` starts, if its text is one plain command; otherwise nothing."""
    if len(words) < 3 or words[1] not in ("-c", "-ec", "-ce", "-xc"):
        return []
    text = words[2]
    if any(character in text for character in "|&;<>()$`\n"):
        return []
    try:
        rest = split_words(text)
    except ValueError:
        return []
    while rest and ("=" in rest[0] or rest[0] == "exec"):
        rest.pop(0)
    return rest


def _privileged(file: File, user: str) -> bool:
    """Whether the loader ignores LD_PRELOAD: the program gets more rights than its user has."""
    root = user.partition(":")[0] in ("", "0", "root")
    if file.mode & 0o4000 and not (root and file.owner == 0):
        return str(file.owner) != user.partition(":")[0]
    if file.mode & 0o2000 and not (root and file.group == 0):
        return True
    return file.capabilities and not root


def _hindrance(path: str, file: File, program: Program, user: str, machine: str) -> str | None:
    """Why no library can be preloaded into a program, None if one can."""
    if program.machine != machine:
        return f"{path} is for {program.machine}, this host is {machine}"
    if program.go:
        return f"{path} is a Go program, which doesn't make system calls through the C library"
    if not program.dynamic:
        return f"{path} is statically linked, so no library can be preloaded"
    if _privileged(file, user):
        return (
            f"{path} gets more rights than its user has (setuid, setgid or capabilities), so that its loader "
            "ignores LD_PRELOAD"
        )
    return None


def judge(files: Files, start: Start, machine: str) -> Verdict:
    """Follow what a container starts to the program that will use the network.

    `machine` is the host's architecture.
    """
    verdict = Verdict()
    words: list[str] = list(start.words)
    origin = ""
    for _ in range(_STEPS):
        if not words:
            verdict.unknown.append(_not_followed(origin) if origin else "it names no program")
            return verdict
        name = posixpath.basename(words[0])
        if name == "exec":
            words = words[1:]
            continue
        found = _find(files, words[0], start)
        if found is None:
            missing = f"it has no program {words[0]}"
            verdict.unknown.append(_not_followed(origin) if origin else missing)
            return verdict
        path, file = found
        program = identify(file.head)
        if program is None:
            verdict.unknown.append(f"{path} is neither an ELF program nor a script")
            return verdict
        if program.words:
            by = posixpath.basename(program.words[0])
            rest = list(program.words)
            if by == "env":
                try:
                    rest = _after_launcher("env", [by, *split_words(" ".join(rest[1:]))])
                except ValueError:
                    rest = []
                by = posixpath.basename(rest[0]) if rest else ""
            # A shell script that comes first usually ends by starting its arguments: exec "$@".
            words, origin = (words[1:] if by in SHELLS else rest), path
            continue
        if name in _LAUNCHERS:
            words, origin = _after_launcher(name, words), path
            continue
        if name in SHELLS:
            words, origin = _after_shell(words), path
            continue
        verdict.musl = program.musl
        why = _hindrance(path, file, program, start.user, machine)
        if why is not None:
            verdict.hindered.append(why)
        return verdict
    verdict.unknown.append(_not_followed(origin))
    return verdict


def _not_followed(origin: str) -> str:
    return f"the program that {origin} starts is unknown"


def _read(engine: Engine, container: str, path: str) -> File | None:
    with engine.archive(container, path) as stream:
        if stream is None:
            return None
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                member = archive.next()
                if member is None or not (member.isreg() or member.issym()):
                    return None
                content = archive.extractfile(member) if member.isreg() else None
                head = content.read(HEAD) if content is not None else b""
        except tarfile.TarError:
            return None
    return File(
        mode=member.mode,
        owner=member.uid,
        group=member.gid,
        capabilities="SCHILY.xattr.security.capability" in member.pax_headers,
        link=member.linkname if member.issym() else "",
        head=head,
    )


def examine_image(engine: Engine, image: str, start: Start) -> Verdict:
    """Examine an image of this host. Raises EngineError."""
    with engine.created(image) as container:
        return judge(lambda path: _read(engine, container, path), start, os.uname().machine)
