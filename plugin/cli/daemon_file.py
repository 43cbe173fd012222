"""The engine's own settings, /etc/docker/daemon.json: read, changed, validated and replaced.

Keys and their order stay, as far as they aren't FreeFlow's. A file that can't be read with
certainty is never written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from driver.errors import FreeFlowError, InvalidRequest

DEFAULT: Final = Path("/etc/docker/daemon.json")
BACKUP: Final = ".before-freeflow"
_MOST_BYTES: Final = 1 << 20
_SECONDS: Final = 30.0
"""For the engine's program to validate a file."""
_INDENT: Final = re.compile(r"^\{\s*\n([ \t]+)\"")
_NO_SUCH_OPTION: Final = "unknown flag: --validate"


@dataclass(frozen=True, slots=True)
class DaemonFile:
    """`text` is the file's content, `value` its meaning. Both are empty if there is no file."""

    path: Path
    text: str
    value: dict[str, Any]

    def runtimes(self) -> dict[str, Any]:
        """Raises InvalidRequest."""
        found = self.value.get("runtimes", {})
        if not isinstance(found, dict):
            raise _unusable(self.path, "runtimes is no object")
        return found

    def default_runtime(self) -> str:
        return str(self.value.get("default-runtime") or "runc")


def _unusable(path: Path, cause: str) -> InvalidRequest:
    return InvalidRequest(
        f"{path} can't be changed", cause=cause, remedy="correct the file, then try again"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a name twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def read(path: Path) -> DaemonFile:
    """The file at a path of the user's root. Raises InvalidRequest if it can't be understood."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return DaemonFile(path, "", {})
    except OSError as error:
        raise _unusable(path, str(error.strerror)) from error
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError("it is too large")
        text = content.decode()
        value = (
            json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
            if text.strip()
            else {}
        )
    except (ValueError, RecursionError) as error:
        raise _unusable(path, str(error)) from error
    if not isinstance(value, dict):
        raise _unusable(path, "it is no object")
    return DaemonFile(path, text, value)


def render(value: dict[str, Any], before: str) -> str:
    """The text of a value, with the indentation of the text before."""
    found = _INDENT.match(before)
    return json.dumps(value, indent=found[1] if found else 4, ensure_ascii=False) + "\n"


def replace(before: DaemonFile, value: dict[str, Any], engine_program: str | None) -> None:
    """Write a new value after the engine's program has validated it; the old file is kept beside.

    Raises:
        FreeFlowError: it isn't valid, or can't be written. The old file is still in place.
    """
    path = before.path
    temporary = path.with_name(f".{path.name}.freeflow")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        mode, owner, group = 0o644, os.geteuid(), os.getegid()
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            mode, owner, group = found.st_mode & 0o7777, found.st_uid, found.st_gid
        _write(temporary, render(value, before.text), mode, owner, group)
        try:
            if engine_program is not None:
                validate(temporary, engine_program)
            if before.text:
                _write(path.with_name(path.name + BACKUP), before.text, mode, owner, group)
            # A link stays one: what it leads to is replaced.
            temporary.replace(path.resolve())
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FreeFlowError(
            f"{path} can't be written", cause=str(error), remedy="make its folder writable"
        ) from error


def _write(path: Path, text: str, mode: int, owner: int, group: int) -> None:
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fchown(file.fileno(), owner, group)
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def validate(path: Path, engine_program: str) -> None:
    """Have the engine's program check a file; engines before 23.0 can't. Raises InvalidRequest."""
    try:
        done = subprocess.run(
            [engine_program, "--validate", f"--config-file={path}"],
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InvalidRequest(
            f"{engine_program} can't be called to check the file",
            cause=str(error),
            remedy=f"{engine_program} --validate shows why",
        ) from error
    output = (done.stderr + done.stdout).decode(errors="replace").strip()
    if done.returncode != 0 and _NO_SUCH_OPTION not in output:
        raise InvalidRequest(
            "the engine would not accept the changed file",
            cause=output[-300:],
            remedy="correct daemon.json, then try again; it was not changed",
        )
