"""Whatever the files hold, the real runtime is called with unchanged arguments, and memory stays
intact: freeflow-runc with sanitizers.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runtime.world import ID, NETWORK, RuntimeWorld, go_json

FEW = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.fixture
def checked(checked_program: Path, tmp_path: Path) -> RuntimeWorld:
    return RuntimeWorld(checked_program, tmp_path)


def clean(world: RuntimeWorld, command: str, *more: str) -> None:
    """Call the program: no sanitizer reports anything, and the runtime gets the same arguments."""
    arguments = world.arguments(command, *more)
    done = world.call(arguments)
    assert done.stderr == b""
    assert world.passed() == arguments


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a value."""
    found = [path] if path else []
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


@FEW
@given(data=st.data())
def test_wrong_types(checked: RuntimeWorld, data: st.DataObject) -> None:
    """Any value in a configuration may be replaced by any other. Either it stays as it is, or only
    the mount and the variable are added.
    """
    config = checked.config()
    path = data.draw(st.sampled_from(places(config)))
    config = replaced(config, path, data.draw(JSON))
    before = checked.put(config)
    clean(checked, "create")
    after = checked.result()
    if after != before:
        found, wanted = json.loads(after), json.loads(before)
        wanted["mounts"].append(found["mounts"][-1])
        assert found["mounts"][-1]["destination"] == "/run/freeflow"
        wanted["process"]["env"] = found["process"]["env"]
        assert found == wanted


@FEW
@given(data=st.data())
def test_wrong_types_in_dockers_files(checked: RuntimeWorld, data: st.DataObject) -> None:
    """So may any value in Docker's description and in the plugin's list."""
    path = checked.describe({"front": NETWORK}, {"freeflow.accelerate": "on"})
    if data.draw(st.booleans()):
        path = checked.top / "run/freeflow-admin/networks.json"
    original = path.read_bytes()
    value = json.loads(original)
    where = data.draw(st.sampled_from(places(value)))
    path.write_bytes(go_json(replaced(value, where, data.draw(JSON))))
    checked.put(checked.config())
    clean(checked, "create")
    path.write_bytes(original)


@FEW
@given(seed=st.integers(0, 1 << 32), cuts=st.integers(1, 8))
def test_broken_bytes(checked: RuntimeWorld, seed: int, cuts: int) -> None:
    """Bytes may be lost, changed or inserted anywhere; what is no JSON any more stays as it is."""
    chance = random.Random(seed)
    content = bytearray(go_json(checked.config()))
    for _ in range(cuts):
        at = chance.randrange(len(content) or 1)
        kind = chance.randrange(4)
        if kind == 0:
            del content[at : at + chance.randrange(1, 40)]
        elif kind == 1:
            content[at : at + 1] = chance.randbytes(1)
        elif kind == 2:
            content[at:at] = chance.choice([b"\0", b'"', b"\\", b"[", b"}", b"\xff", b"\\ud800"])
        else:
            del content[at:]
            content += b" "
    before = checked.put(bytes(content))
    clean(checked, "create")
    try:
        json.loads(before)
    except ValueError:
        assert checked.result() == before


def duplicated(config: bytes) -> bytes:
    return config.replace(b'"hostname":', b'"root":{"path":"/"},"hostname":', 1)


ODD: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda config: b"",
    "blank": lambda config: b" \n",
    "NUL": lambda config: config + b"\0",
    "NUL in a name": lambda config: config.replace(b'"hostname"', b'"host\\u0000name"'),
    "two values": lambda config: config + b"{}",
    "comment": lambda config: b"/* */" + config,
    "single quotes": lambda config: config.replace(b'"/proc"', b"'/proc'"),
    "trailing comma": lambda config: config.replace(
        b'"ociVersion":"1.2.0",', b'"ociVersion":"1.2.0",,'
    ),
    "names twice": duplicated,
    "number past 64 bits": lambda config: config.replace(b"18446744073709551615", b"1" + b"8" * 30),
    "number below 64 bits": lambda config: config.replace(b'"quota":-1', b'"quota":-' + b"9" * 30),
    "minus zero": lambda config: config.replace(b'"quota":-1', b'"quota":-0'),
    "NaN": lambda config: config.replace(b'"quota":-1', b'"quota":NaN'),
    "deep": lambda config: config.replace(b'"quota":-1', b'"quota":' + b"[" * 9000 + b"]" * 9000),
    "deep and open": lambda config: b"[" * 100_000,
    "huge": lambda config: config + b" " * (3 << 20),
    "many values": lambda config: b"[" + b"[]," * 600_000 + b"[]]",
    "invalid UTF-8": lambda config: config.replace(b'"cwd":"/"', b'"cwd":"/\xff"'),
    "array": lambda config: b"[]",
    "text": lambda config: b'"config"',
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_configurations(checked: RuntimeWorld, kind: str) -> None:
    """What isn't exactly one value, or what json-c would change, stays as it is, byte by byte."""
    before = checked.put(ODD[kind](go_json(checked.config())))
    clean(checked, "create")
    assert checked.result() == before


def test_blanks_are_allowed(checked: RuntimeWorld) -> None:
    """A configuration with line ends and blanks is understood."""
    checked.put(json.dumps(checked.config(), indent=4).encode() + b"\n\n")
    clean(checked, "create")
    assert "/run/freeflow" in {
        mount["destination"] for mount in json.loads(checked.result())["mounts"]
    }


@pytest.mark.parametrize("kind", ["missing", "link", "FIFO", "folder", "unreadable", "no bundle"])
def test_odd_files(checked: RuntimeWorld, kind: str) -> None:
    """What is no plain file is left to the runtime; nothing waits or is followed."""
    path = checked.bundle / "config.json"
    outside = checked.write("tmp/config.json", go_json(checked.config()))
    before = outside.read_bytes()
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "unreadable":
        checked.put(checked.config(), 0o000)
    elif kind == "no bundle":
        arguments = ["create", "--bundle", "/does/not/exist", ID]
        checked.call(arguments)
        assert checked.passed() == arguments
        return
    clean(checked, "create")
    assert outside.read_bytes() == before
    assert not [file for file in checked.bundle.iterdir() if ".freeflow" in file.name]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_no_room_for_the_new_file(checked: RuntimeWorld) -> None:
    """On a full disk the old configuration stays, and no part of a new one."""
    small = checked.top / "small"
    small.mkdir()
    os.system(f"mount -t tmpfs -o size=16k,nr_inodes=8 none {small}")
    try:
        shutil.rmtree(checked.bundle)
        (small / ID).mkdir()
        checked.bundle = small / ID
        before = checked.put(checked.config())
        (small / "rest").write_bytes(b"x" * 4096)
        with (small / "rest").open("ab") as rest:
            try:
                while True:
                    rest.write(b"x" * 4096)
                    rest.flush()
            except OSError:
                pass
    except OSError:
        pass
    try:
        clean(checked, "create")
        assert checked.result() == before
        assert sorted(path.name for path in (small / ID).iterdir()) == ["config.json"]
    finally:
        os.system(f"umount -l {small}")


@FEW
@given(data=st.data())
def test_odd_programs_of_exec(checked: RuntimeWorld, data: st.DataObject) -> None:
    """The description of a program of `docker exec` may be anything, too."""
    process: dict[str, Any] = {"args": ["a"], "env": ["A=b", "LD_PRELOAD=/x"], "cwd": "/"}
    checked.put(checked.config())
    checked.call(checked.arguments("create"))
    where = data.draw(st.sampled_from(places(process)))
    content = go_json(replaced(process, where, data.draw(JSON)))
    file = checked.write("tmp/process", content[: data.draw(st.integers(1, len(content)))])
    clean(checked, "exec", "--process", str(file))
    assert [path.name for path in file.parent.iterdir()] == ["process"]


WORDS = st.lists(
    st.one_of(
        st.sampled_from(
            ["--root", "--log", "--log-format=json", "create", "exec", "--bundle", "-b", "--process",
             "--process=", "-", "--", "---b", ID, "", "checkpoint", "--log=", "-p", "--systemd-cgroup"]
        ),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12),
    ),
    max_size=8,
)  # fmt: skip


@FEW
@given(words=WORDS)
def test_odd_arguments(checked: RuntimeWorld, words: list[str]) -> None:
    """Any arguments get to the runtime as they are."""
    checked.put(checked.config())
    done = checked.call(words)
    assert done.stderr == b""
    assert checked.passed() == words


def test_a_crash_changes_nothing(world: RuntimeWorld) -> None:
    """If the work crashes, here for lack of memory, the container starts as it is."""
    before = world.put(world.config())
    arguments = world.arguments("create")
    import resource
    import subprocess

    def starve() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 14, 1 << 14))

    world.runtime.unlink()
    world.runtime.symlink_to(shutil.which("true") or "/bin/true")
    done = subprocess.run(
        [world.program, *arguments],
        env={"PATH": "/bin", "FREEFLOW_TEST_ROOT": str(world.top), "FREEFLOW_TEST_PATIENCE": "100"},
        preexec_fn=starve,
        capture_output=True,
        check=False,
    )
    assert b"freeflow" not in done.stderr
    assert world.result() == before
