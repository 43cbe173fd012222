"""`freeflow inject`: writes a second compose file that adds the library to services of a stack, or
the options that add it to a container.

    docker stack deploy -c stack.yml -c freeflow.yml mystack

Docker merges the two: volumes by their target, variables by their name (docker/cli,
cli/compose/loader/merge.go). So the stack itself stays as it is. A service gets the library if it
is on a FreeFlow network, or on one whose driver this host doesn't know.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from driver.answers import parse_network
from driver.errors import EngineError, InvalidRequest
from driver.model import NetworkView
from driver.names import is_freeflow
from driver.other_networks import BRIDGE, why_not
from plugin.cli import preload
from plugin.cli.client import Engine
from plugin.cli.image import Start, Verdict, environment, examine_image, split_words, start_of
from plugin.cli.preload import FOLDER
from plugin.cli.stack_file import LONGEST, read_stack
from plugin.cli.user_files import users_root

_IMAGE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,511}", re.ASCII)
_SHOWN: Final = 80
_MOST_BYTES: Final = 4 * LONGEST
"""Of a file: as many characters of UTF-8 as are read."""
_PATIENCE: Final = 60.0
"""Seconds for the examination of images."""
_OLD_FORMATS: Final = ("3", "3.0", "3.1")
"""Compose formats without mounts in long form."""
_LONG: Final = f"""\
      - type: bind
        source: {FOLDER}
        target: {FOLDER}
"""
_SHORT: Final = f"      - {FOLDER}:{FOLDER}\n"
_UNSAFE: Final = re.compile(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
"""Characters that JSON takes in a string and YAML doesn't."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`text` is the second file, `injected` names services, `notes` are lines for the user."""

    text: str
    injected: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Examined:
    """What is known of an image: its configuration, and what kind of program it starts."""

    config: dict[str, Any] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)
    missing: str = ""


@dataclass(frozen=True, slots=True)
class _Addition:
    """What the second file gives a service."""

    mount: bool
    variables: Mapping[str, str]


def inject_file(
    engine: Engine, stack: str, output: str, only: Sequence[str] = (), *, verbs: bool = False
) -> Outcome:
    """From a file to a file, `-` being stdin and stdout. If anything is wrong nothing is written.
    `verbs`: with the libraries of RDMA verbs, too.

    Raises:
        InvalidRequest: the stack can't be used, or the output not be written.
    """
    folder = Path() if stack == "-" else Path(stack).parent

    def read(file: str) -> str:
        with users_root():
            return _read_file(folder / file)

    try:
        if stack == "-":
            text = sys.stdin.buffer.read(_MOST_BYTES + 1).decode()
        else:
            with users_root(), Path(stack).open("rb") as file:
                text = file.read(_MOST_BYTES + 1).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{stack} is no UTF-8 text ({error})", remedy="save it as UTF-8"
        ) from error
    except OSError as error:
        raise InvalidRequest(
            f"{stack} can't be read ({error.strerror})",
            remedy="name the file given to docker stack deploy -c",
        ) from error
    name = "stdin" if stack == "-" else stack
    outcome = inject_stack(text, name, engine, only, read, verbs=verbs)
    try:
        if output == "-":
            sys.stdout.buffer.write(outcome.text.encode())
            sys.stdout.buffer.flush()
        else:
            with users_root():
                _refuse_same(stack, output)
                Path(output).write_bytes(outcome.text.encode())
    except OSError as error:
        raise InvalidRequest(
            f"{output} can't be written ({error.strerror})", remedy="name another file with -o"
        ) from error
    return outcome


def _refuse_same(stack: str, output: str) -> None:
    """The output is a file besides the stack, not in its place."""
    if stack != "-" and Path(output).exists() and Path(output).samefile(stack):
        raise InvalidRequest(
            f"{output} is the stack itself",
            cause="what is written is a second file for docker stack deploy",
            remedy="name another file with -o",
        )


def _read_file(path: Path) -> str:
    """A file that a stack names may be anything: only a plain file of usual size is read.

    Raises:
        OSError: it can't be read, or isn't one.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
            raise OSError(errno.EINVAL, "no plain file, or too large")
        return file.read(_MOST_BYTES).decode()


def inject_stack(
    text: str,
    name: str,
    engine: Engine,
    only: Sequence[str] = (),
    read: Callable[[str], str] | None = None,
    *,
    verbs: bool = False,
) -> Outcome:
    """The second file for a stack's text.

    `name` is the file's, for messages; `only` names services; `read` reads a file beside the stack;
    `verbs`: with the libraries of RDMA verbs, too.

    Raises:
        InvalidRequest: the stack can't be read, or no service is to get the library.
    """
    stack = read_stack(text, name)
    services: dict[str, Any] = stack["services"]
    notes: list[str] = []
    chosen = _choose(stack, name, engine, only, notes)
    additions = {}
    until = time.monotonic() + _PATIENCE
    for service in chosen:
        content = services[service] or {}
        if not isinstance(content, dict):
            raise InvalidRequest(
                f"{name}: service {service} is no mapping",
                remedy="write its image and networks below it",
            )
        if time.monotonic() < until:
            found = _examine(engine, content)
        else:
            found = _Examined(missing="the time for examining images is over")
        addition = additions[service] = _addition(service, content, found, name, verbs)
        notes += _remarks(service, content, found)
        notes += _replaced(service, content, addition, read)
        if verbs:
            notes += _remarks_on_verbs(stack, service, content, found)
    return Outcome(_second_file(stack.get("version"), additions), tuple(chosen), tuple(notes))


def inject_image(engine: Engine, image: str, *, verbs: bool = False) -> Outcome:
    """The options of `docker run` and `docker service create` for containers of an image, in one
    line which a shell can take from a command.

    Raises:
        InvalidRequest: the image's own variables have characters which a shell doesn't take so.
    """
    found = _examine_image(engine, image)
    notes = _remarks(image, {}, found)
    if verbs:
        notes += _remarks_on_verbs({}, image, {}, found)
    words = preload.options(environment(found.config), verbs=verbs, musl=bool(found.verdict.musl))
    for word in words:
        if shlex.quote(word) != word:
            raise InvalidRequest(
                f"{word} can't be an option that a command prints",
                cause=f"image {image} sets this variable to a value that needs quotes",
                remedy="write the options by hand, with the image's own value first",
            )
    return Outcome(f"{' '.join(words)}\n", (image,), tuple(notes))


def _second_file(version: Any, additions: Mapping[str, _Addition]) -> str:
    """Docker merges only files of the same `version`."""
    lines = "# For docker stack deploy, with a second -c after the stack's own.\n"
    if version is not None:
        lines += f"version: {_quoted(str(version))}\n"
    services = ""
    for service, addition in additions.items():
        entry = ""
        if addition.mount:
            entry += "    volumes:\n" + (_SHORT if str(version) in _OLD_FORMATS else _LONG)
        if addition.variables:
            entry += "    environment:\n"
        for variable, value in addition.variables.items():
            entry += f"      {variable}: {_quoted(value)}\n"
        if entry:
            services += f"  {_quoted(service)}:\n{entry}"
    return f"{lines}services:\n{services}" if services else f"{lines}services: {{}}\n"


def _quoted(text: str) -> str:
    """A scalar in double quotes, of which JSON's are a part but for some characters."""
    return _UNSAFE.sub(
        lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False)
    )


def _choose(
    stack: Mapping[str, Any], name: str, engine: Engine, only: Sequence[str], notes: list[str]
) -> list[str]:
    services = stack["services"]
    missing = [service for service in only if service not in services]
    if missing:
        raise InvalidRequest(
            f"{name} has no service {', '.join(missing)}", remedy=f"it has {', '.join(services)}"
        )
    known: dict[str, bool | None] = {}
    chosen = []
    for service, content in services.items():
        if only and service not in only:
            continue
        on = {network: _is_own(stack, network, engine, known) for network in networks_of(content)}
        own = any(on.values())
        doubtful = [network for network, answer in on.items() if answer is None]
        if only or own or doubtful:
            chosen.append(service)
        if not own and doubtful:
            notes.append(
                f"{service}: this host doesn't know the driver of network {', '.join(doubtful)}; the library was "
                "added, and has an effect on a FreeFlow network alone (--service NAME chooses services)"
            )
        elif not own and only:
            notes.append(f"{service}: is on no FreeFlow network, where the library does nothing")
    if not chosen:
        raise InvalidRequest(
            f"{name}: no service is on a FreeFlow network",
            remedy="write driver: freeflow:latest below the network, or choose services with --service NAME",
        )
    return chosen


def networks_of(service: Any) -> list[str]:
    """The names of a service's networks in the file; `default` if it has none."""
    found = service.get("networks") if isinstance(service, dict) else None
    return (
        [str(name) for name in found] if isinstance(found, list | dict) and found else ["default"]
    )


def _is_own(
    stack: Mapping[str, Any], name: str, engine: Engine, known: dict[str, bool | None]
) -> bool | None:
    """None: not known."""
    if name in known:
        return known[name]
    content = _mapping(_mapping(stack.get("networks")).get(name))
    answer: bool | None
    external = content.get("external")
    if external:
        real = external.get("name") if isinstance(external, dict) else content.get("name")
        answer = _driver_of(engine, str(real or name))
    else:
        # Without a driver it is a bridge for docker compose, and an overlay for a stack.
        view = NetworkView(
            id="",
            name=name,
            driver=str(content.get("driver") or BRIDGE),
            labels=_texts(content.get("labels")),
            options=_texts(content.get("driver_opts")),
        )
        answer = None if "$" in view.driver else _is_accelerated(view)
    known[name] = answer
    return answer


def _mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def _driver_of(engine: Engine, network: str) -> bool | None:
    if "$" in network or "/" in network:
        return None
    try:
        found = engine.find(f"/networks/{quote(network, safe='')}")
    except EngineError:
        return None
    if found is None:
        return None
    return _is_accelerated(parse_network(_mapping(found)))


def _texts(value: Any) -> dict[str, str]:
    return {key: text or "" for key, text in pairs(value).items()}


def _is_accelerated(view: NetworkView) -> bool:
    return is_freeflow(view.driver) or why_not(view, on=False) is None


def _words(value: Any) -> list[str] | None:
    """An entrypoint or a command as words, None without it. Docker splits a string like a shell."""
    if value is None:
        return None
    if isinstance(value, list):
        return [str(word) for word in value]
    try:
        return split_words(str(value))
    except ValueError:
        return [str(value)]


def _examine(engine: Engine, service: Mapping[str, Any]) -> _Examined:
    image = str(service.get("image") or "")
    if not image:
        return _Examined(missing="it names no image")
    if "$" in image:
        return _Examined(missing=f"the name of its image, {image}, has a variable")
    return _examine_image(
        engine,
        image,
        _words(service.get("entrypoint")),
        _words(service.get("command")),
        str(service.get("user") or ""),
        str(service.get("working_dir") or ""),
    )


def _examine_image(engine: Engine, image: str, *start_with: Any) -> _Examined:
    """`start_with`: what `start_of` takes after the configuration."""
    if not _IMAGE.fullmatch(image) or "//" in image or ".." in image:
        return _Examined(missing=f"{image[:_SHOWN]} is no name of an image")
    try:
        found = engine.find(f"/images/{quote(image, safe='/:@')}/json")
    except EngineError as error:
        return _Examined(missing=error.reason)
    if found is None:
        return _Examined(missing=f"{image} isn't on this host (docker pull {image} brings it)")
    config = dict(_mapping(_mapping(found).get("Config")))
    start = start_of(config, *start_with)
    try:
        return _Examined(config, _with_variables(start) or examine_image(engine, image, start))
    except EngineError as error:
        return _Examined(config, missing=error.reason)


def _with_variables(start: Start) -> Verdict | None:
    if start.words and "$" in start.words[0]:
        return Verdict(unknown=[f"the value of {start.words[0]} is unknown"])
    return None


def _remarks(service: str, content: Mapping[str, Any], found: _Examined) -> list[str]:
    notes = [
        f"{service}: can't be accelerated: {obstacle}; it runs as before"
        for obstacle in found.verdict.hindered
    ]
    notes += [
        f"{service}: it is not known whether it can be accelerated: {question}; freeflow doctor CONTAINER tells once it runs"
        for question in found.verdict.unknown
    ]
    if found.missing:
        notes.append(
            f"{service}: its image was not examined: {found.missing}; static and Go programs can't be accelerated"
        )
    if pairs(content.get("environment")).get("FREEFLOW") == "off":
        notes.append(f"{service}: is not accelerated, because it sets FREEFLOW=off")
    return notes


def _replaced(
    service: str,
    content: Mapping[str, Any],
    addition: _Addition,
    read: Callable[[str], str] | None,
) -> list[str]:
    """The variables of files that the second file's take the place of."""
    before = pairs(content.get("environment"))
    files = content.get("env_file")
    return [
        f"{service}: {name} in {file} is replaced; write it under environment, before the library's path"
        for file in (
            [files] if isinstance(files, str) else files if isinstance(files, list) else ()
        )
        for name in addition.variables
        if name not in before and _sets(name, str(file), read)
    ]


def _remarks_on_verbs(
    stack: Mapping[str, Any], service: str, content: Mapping[str, Any], found: _Examined
) -> list[str]:
    networks = _mapping(stack.get("networks"))
    off = [
        name
        for name in networks_of(content)
        if str(_mapping(_mapping(networks.get(name)).get("driver_opts")).get("verbs")) == "off"
    ]
    notes = []
    if off:
        notes.append(f"{service}: has no device of verbs on network {', '.join(off)}: verbs is off")
    if found.verdict.musl is None:
        notes.append(
            f"{service}: it is not known whether its C library is musl; if it is, add {preload.VERBS_FOLDER} to "
            "LD_LIBRARY_PATH"
        )
    return notes


def _sets(name: str, file: str, read: Callable[[str], str] | None) -> bool:
    try:
        text = read(file) if read is not None else ""
    except (OSError, UnicodeDecodeError):
        return False
    return any(line.strip().startswith(f"{name}=") for line in text.splitlines())


def pairs(value: Any) -> dict[str, str | None]:
    """Variables by name, from a list or a mapping.

    None: the value comes from the environment of `docker stack deploy`.
    """
    if isinstance(value, dict):
        return {str(name): None if entry is None else str(entry) for name, entry in value.items()}
    found: dict[str, str | None] = {}
    for entry in value if isinstance(value, list) else ():
        name, given, content = str(entry).partition("=")
        found[name] = content if given else None
    return found


def _addition(
    service: str, content: Mapping[str, Any], found: _Examined, name: str, verbs: bool
) -> _Addition:
    """What the service lacks. Raises InvalidRequest."""
    volumes, variables = content.get("volumes"), content.get("environment")
    if not isinstance(volumes, list | None):
        raise InvalidRequest(
            f"{name}: volumes of service {service} is no list",
            remedy="write each mount on a line of its own, with a dash",
        )
    if not isinstance(variables, list | dict | None):
        raise InvalidRequest(
            f"{name}: environment of service {service} is neither a mapping nor a list",
            remedy="write NAME: VALUE lines",
        )
    mount = True
    for source, target in map(_ends, volumes or ()):
        if target.rstrip("/") == FOLDER:
            if source.rstrip("/") != FOLDER:
                raise InvalidRequest(
                    f"{name}: service {service} has {source or 'a volume'} at {FOLDER}, where the library must be",
                    remedy="mount that elsewhere, or leave the service out with --service",
                )
            mount = False
    return _Addition(
        mount,
        preload.variables(
            pairs(variables),
            environment(found.config),
            verbs=verbs,
            musl=bool(found.verdict.musl),
        ),
    )


def _ends(mount: Any) -> tuple[str, str]:
    if isinstance(mount, dict):
        return str(mount.get("source", "")), str(mount.get("target", ""))
    source, separator, rest = str(mount).partition(":")
    return (source, rest.partition(":")[0]) if separator else ("", source)
