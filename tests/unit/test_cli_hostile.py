"""What images, stacks, containers and other hosts put into names and files reaches neither root's
terminal nor much of its time.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import time
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from driver.errors import EngineError, InvalidRequest
from plugin.cli import container_check, image, loaded, show, terminal
from plugin.cli.client import Engine
from plugin.cli.commands import cli
from plugin.cli.inject import inject_stack
from plugin.cli.program import identify
from plugin.cli.stack_file import LONGEST
from plugin.status import Finding
from testbed.patience import within
from tests.unit.statuses import LISTED, finding, status

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u200b\r\n\ud800\x00"
ANYTHING = st.text(st.characters(), max_size=40)
NETWORKS = "networks:\n  n: {driver: freeflow}\n"
SOON = 10.0
"""Seconds of processor time that no hostile input may take; it takes hours without bounds."""


def harmless(text: str) -> bool:
    return all(each == "\n" or each.isprintable() for each in text)


def poisoned(value: Any, text: str) -> Any:
    """The value with `text` in place of each string."""
    if isinstance(value, msgspec.Struct):
        fields = {name: poisoned(getattr(value, name), text) for name in value.__struct_fields__}
        return msgspec.structs.replace(value, **fields)
    if isinstance(value, dict):
        return {poisoned(k, text): poisoned(each, text) for k, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(poisoned(each, text) for each in value)
    return text if isinstance(value, str) else value


# --- the terminal


@given(ANYTHING)
def test_whatever_is_shown_is_harmless(text: str) -> None:
    """Any text is shown on one line without control characters, and printable ones stay."""
    found = terminal.shown(text)
    assert harmless(found)
    assert "\n" not in found
    assert not text.isprintable() or found == text


@pytest.mark.parametrize("text", [ESCAPE, "\x1b[31m", "é\u202e", "\n"])
@pytest.mark.parametrize(
    "page",
    [
        lambda text: show.show_status(poisoned(status(problems=[finding()]), text)),
        lambda text: show.show_peers(poisoned(status(), text)),
        lambda text: show.show_connections(poisoned(LISTED, text)),
        lambda text: show.findings([Finding("error", text, text, text)]),
    ],
    ids=["status", "peers", "connections", "findings"],
)
def test_pages_are_harmless(page: Any, text: str) -> None:
    """No name can bring a control character or a forged line into a printed page."""
    found = page(text)
    assert harmless(terminal.lines(found))
    assert found.count("\n") == page("x").count("\n")


@given(ANYTHING)
def test_json_is_harmless_and_the_same(text: str) -> None:
    """JSON has no such character either, and decodes to the same value."""
    text = text.encode(errors="replace").decode()
    value = {"name": text, text: [text]}
    found = terminal.json_text(value)
    assert harmless(found)
    assert msgspec.json.decode(found) == value


def test_letters_that_the_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that the terminal's encoding lacks become escapes, not a traceback."""
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(click, "get_text_stream", lambda _: stream)
    said: list[str] = []
    monkeypatch.setattr(click, "echo", lambda text, **_: said.append(text))
    terminal.say("é \u20ac")
    assert said == ["\\xe9 \\u20ac"]


def test_a_bug_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug ends a command with two lines, one of them a remedy, and without a traceback."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError(ESCAPE.encode("utf-8", "replace").decode())

    monkeypatch.setattr("plugin.cli.doctor.examine", fail)
    done = CliRunner(mix_stderr=False).invoke(cli, ["doctor"])
    assert done.exit_code == 2
    assert not isinstance(done.exception, ZeroDivisionError)
    assert done.stderr.count("\n") == 2
    assert "    do: " in done.stderr
    assert harmless(done.stderr)


# --- a container's processes


def _process(folder: Path, name: bytes) -> None:
    (folder / "7").mkdir()
    (folder / "7/comm").write_bytes(name + b"\n")
    (folder / "7/environ").write_bytes(b"\xff=\xfe\0LD_PRELOAD=/run/freeflow/libfreeflow.so\0")
    (folder / "7/maps").write_bytes(b"\xff\xfe 1-2\n" * 100)


@pytest.mark.parametrize("name", [b"\xff", b"\x1b]0;HI\x07", b"a\nerror: b", b"\xe2\x80\xae"])
def test_names_of_processes(tmp_path: Path, name: bytes) -> None:
    """A process may have any name: doctor inspects it, and shows the name escaped."""
    _process(tmp_path, name)
    found = loaded.inspect_process(7, tmp_path)
    assert found is not None
    assert found.preloads
    (said,) = container_check.check_processes("box", [found], (1, 1))
    page = show.findings([said])
    assert harmless(page)
    assert len(page.splitlines()) == 3


# --- images


def _elf(count: int, size: int, length: int) -> bytes:
    head = bytearray(1 << 20)
    head[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<H", head, 18, 62)
    struct.pack_into("<Q", head, 32, 64)
    struct.pack_into("<HH", head, 54, size, count)
    for number in range(1 if size == 0 else min(count, 100)):
        at = 64 + number * size
        struct.pack_into("<I", head, at, 4)
        struct.pack_into("<Q", head, at + 8, 8192)
        struct.pack_into("<Q", head, at + 32, length)
    return bytes(head)


@pytest.mark.parametrize("size", [0, 1, 56])
def test_headers_without_end(size: int) -> None:
    """A program that claims 65,535 headers of a MiB of notes each is examined quickly."""
    begin = time.process_time()
    assert identify(_elf(65535, size, 1 << 20)) is not None
    assert time.process_time() - begin < SOON


@pytest.mark.parametrize(
    "line", ["#!/usr/bin/env -S 'x", "#!/bin/sh 'x", "#!" + "x" * 300, "#!\x00"]
)
def test_scripts(line: str) -> None:
    """A script may begin with anything."""
    files = {"/run.sh": image.File(head=line.encode() + b"\n")}
    image.judge(files.get, image.Start(("/run.sh", "'")), "x86_64")


# --- stacks


class Images:
    """An engine that has every image; `asked` are its URLs."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.asked: list[str] = []

    def find(self, url: str) -> Any:
        self.asked.append(url)
        return self.config

    def created(self, name: str) -> Any:
        raise EngineError(f"no container of {name}", remedy="try again")


def injected(text: str) -> Any:
    return inject_stack(text, "stack.yml", Engine(Path("/nonexistent")))


def bomb(levels: int, width: int = 9) -> str:
    lines = [f"x-a0: &a0 [{','.join('x' * width)}]\n"]
    lines += [f"x-a{n}: &a{n} [{','.join([f'*a{n - 1}'] * width)}]\n" for n in range(1, levels)]
    return "".join(lines) + f"services:\n  web:\n    image: x\n    networks: [n]\n{NETWORKS}"


REFUSED = {
    "bomb": (bomb(12), "more than 100000 values"),
    "itself": (f"services:\n  web: &w\n    image: x\n    networks: [n]\n    x: *w\n{NETWORKS}", "contains itself"),
    "merged itself": (f"services:\n  web: &w\n    <<: *w\n    image: x\n{NETWORKS}", "contains itself"),
    "deep": (f"services: {'[' * 5000}", "deep in each other"),
    "deep block": ("".join(f"{' ' * n}a:\n" for n in range(500)), "deep in each other"),
    "long": (f"# {'x' * LONGEST}", "more than 1 MiB"),
    "text": ("services:\n  web: text\nnetworks:\n  default: {driver: freeflow}\n", "is no mapping"),
    "network": ("services:\n  web: {networks: [n]}\nnetworks:\n  n: text\n", "no service is on"),
    "networks": ("services:\n  web: {networks: [n]}\nnetworks: text\n", "no service is on"),
    "key": ("services: {[a]: b}\n", "a key is no text"),
    "twice": ("services: {a: 1, a: 2}\n", "twice"),
    "merge": ("services: {<<: text}\n", "<< takes a mapping"),
    "control": ("services:\n  a: \x1b[31m\n", "is no YAML"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_stacks_without_end(text: str, message: str) -> None:
    """A stack that is too large or invalid is refused quickly, with the line and a remedy."""
    begin = time.process_time()
    with pytest.raises(InvalidRequest, match=message):
        injected(text)
    assert time.process_time() - begin < SOON


def test_many_aliases_are_no_bomb() -> None:
    """A stack with aliases of aliases, with some thousand values, is accepted."""
    assert "/run/freeflow" in injected(bomb(4)).text


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from(["n", "x", "$A", "a:b", "../x", "'"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["n", "type", "source", "target", "driver", "external", "name"]), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip
KEYS = ["image", "networks", "environment", "volumes", "command", "entrypoint", "env_file", "user"]
STACKS = st.fixed_dictionaries(
    {
        "services": st.one_of(
            VALUES,
            st.dictionaries(
                st.sampled_from(["a", "b"]),
                st.one_of(VALUES, st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8)),
                max_size=2,
            ),
        )
    },
    optional={
        "networks": st.one_of(VALUES, st.just({"n": {"driver": "freeflow"}})),
        "version": VALUES,
        "x-a": VALUES,
    },
)


@settings(max_examples=200, deadline=None)
@given(STACKS, VALUES)
def test_any_value_in_any_place(stack: Any, config: Any) -> None:
    """Any values in a stack and in the engine's answers give a second file or an error."""
    writer, stream = YAML(typ="safe", pure=True), io.StringIO()
    writer.dump(stack, stream)
    engine: Any = Images({"Config": config} if isinstance(config, list) else config)
    with contextlib.suppress(InvalidRequest):
        inject_stack(stream.getvalue(), "stack.yml", engine, read=lambda _: "")


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("services:web image-n[]{},&*!|>'\"#%@\t\n \\?~<é\x1b"), max_size=80))
def test_any_text(text: str) -> None:
    """Any text is a stack, or is refused with a remedy."""
    with pytest.raises(InvalidRequest, match="; "):
        injected(f"{text}\nservices: text\n")


def test_names_of_images() -> None:
    """An image's name can't change the path of a request to the engine."""
    hostile = [
        "x/../../containers/json?all=1#",
        "a b",
        "../x",
        "x//y",
        "x?y",
        "\\e[31m",
        "x#",
        "%2e",
    ]
    services = "".join(
        f'  s{n}:\n    image: "{each}"\n    networks: [n]\n' for n, each in enumerate(hostile)
    )
    engine: Any = Images(None)
    outcome = inject_stack(f"services:\n{services}{NETWORKS}", "stack.yml", engine)
    assert engine.asked == []
    assert sum("is no name of an image" in note for note in outcome.notes) == len(hostile)
    good = "registry.example:5000/team/app:1.2@sha256:" + "0" * 64
    inject_stack(f"services:\n  a:\n    image: {good}\n    networks: [n]\n{NETWORKS}", "s", engine)
    assert engine.asked == [f"/images/{good}/json"]


def run(*arguments: str) -> Result:
    where = ["--engine", "/nonexistent/docker.sock"]
    return CliRunner(mix_stderr=False).invoke(cli, [*where, "inject", *arguments])


def test_files_that_a_stack_names(tmp_path: Path) -> None:
    """Devices, pipes and huge files that a stack names are neither read nor waited for."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "huge").touch()
    with (tmp_path / "huge").open("r+b") as huge:
        huge.truncate(1 << 40)
    files = ", ".join(("/dev/zero", "/dev/stdin", str(pipe), "huge", "/", "none"))
    stack = tmp_path / "stack.yml"
    stack.write_text(
        f"services:\n  a:\n    image: x\n    networks: [n]\n    env_file: [{files}]\n{NETWORKS}"
    )
    begin = time.monotonic()
    assert run(str(stack)).exit_code == 0
    assert time.monotonic() - begin < within(30)


def test_stack_that_never_ends() -> None:
    """A device without end is refused as a stack."""
    done = run("/dev/zero")
    assert done.exit_code == 2
    assert "    do: " in done.stderr


def test_names_in_a_stack(tmp_path: Path) -> None:
    """Names in a stack are escaped for the terminal, and can't forge a line."""
    stack = tmp_path / "stack.yml"
    stack.write_text(
        'services:\n  "web\\e]0;owned\\a\\e[2J\\nfreeflow: all is well":\n    image: "x\\e[31m"\n    networks: [n]\n'
        + NETWORKS
    )
    done = run(str(stack))
    assert done.exit_code == 0
    assert harmless(done.stderr)
    assert "freeflow: all is well" not in done.stderr.splitlines()
    assert "web\\x1b]0;owned" in done.stderr
