"""`freeflow inject`: what is found out about an image's programs, and files as the user sees
them.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.errors import InvalidRequest
from plugin.cli.client import Engine
from plugin.cli.image import File, Start, judge, start_of
from plugin.cli.inject import inject_image, inject_stack
from plugin.cli.program import Program, identify
from plugin.cli.user_files import VARIABLE
from testbed.patience import patience
from tests.unit.sockets import served

MACHINE = os.uname().machine


def elf(
    *,
    dynamic: bool = True,
    go: bool = False,
    machine: int = 62,
    wide: bool = True,
    loader: bytes = b"",
) -> bytes:
    """An ELF file's head with the segments that matter; `loader` takes the place of Go's note."""
    note = loader or struct.pack("<III4s8s", 4, 8, 4, b"Go\0\0", b"build-id")
    size, header = (56, 64) if wide else (32, 52)
    kinds = [1, *([3] if dynamic else []), *([4] if go else [])]
    at = header + size * len(kinds)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    if wide:
        head = ident + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, len(kinds), 0, 0, 0)  # fmt: skip
        table = b"".join(struct.pack("<IIQQQQQQ", kind, 4, at, 0, 0, len(note), 0, 4) for kind in kinds)  # fmt: skip
    else:
        head = ident + struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, 0, 52, 0, 0, 52, 32, len(kinds), 0, 0, 0)  # fmt: skip
        table = b"".join(struct.pack("<IIIIIIII", kind, at, 0, 0, len(note), 0, 4, 4) for kind in kinds)  # fmt: skip
    return head + table + note


GOOD = elf()


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("go", [True, False])
def test_elf(wide: bool, dynamic: bool, go: bool) -> None:
    """Loader and Go's note are found in 32 and 64 bits."""
    assert identify(elf(dynamic=dynamic, go=go, wide=wide, machine=183)) == Program("aarch64", dynamic, go)  # fmt: skip


def test_own_python() -> None:
    """A real program of this machine is identified."""
    found = identify(Path(sys.executable).read_bytes()[: 1 << 20])
    assert found is not None
    assert (found.machine, found.go) == (MACHINE, False)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize(
    ("flag", "dynamic"), [("-static", False), ("-static-pie", False), ("-pie", True)]
)
def test_compiled(tmp_path: Path, flag: str, dynamic: bool) -> None:
    """Statically linked programs have no loader, position-independent or not."""
    source, program = tmp_path / "a.c", tmp_path / "a"
    source.write_text("int main(void) { return 0; }\n")
    subprocess.run(["gcc", flag, "-o", program, source], check=True, timeout=patience(60))
    found = identify(program.read_bytes())
    assert found is not None
    assert (found.dynamic, found.musl) == (dynamic, False)
    # Debian's musl-gcc knows no -static-pie.
    if shutil.which("musl-gcc") is not None and flag != "-static-pie":
        subprocess.run(["musl-gcc", flag, "-o", program, source], check=True, timeout=patience(60))
        found = identify(program.read_bytes())
        assert found is not None
        assert (found.dynamic, found.musl) == (dynamic, dynamic)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes(noise: bytes, at: int) -> None:
    """Any content of a file is identified as a program or as none."""
    head = bytearray(elf(go=True))
    head[at : at + len(noise)] = noise
    assert isinstance(identify(bytes(head)), Program | None)
    assert isinstance(identify(noise), Program | None)


FILES = {
    "/usr/bin/good": File(head=GOOD),
    "/usr/bin/static": File(head=elf(dynamic=False)),
    "/usr/bin/go": File(head=elf(go=True)),
    "/usr/bin/arm": File(head=elf(machine=183)),
    "/usr/bin/su": File(mode=0o4755, head=GOOD),
    "/usr/bin/mail": File(mode=0o2755, group=8, head=GOOD),
    "/usr/bin/ping": File(capabilities=True, head=GOOD),
    "/usr/bin/sh": File(link="dash"),
    "/usr/bin/dash": File(head=GOOD),
    "/usr/bin/env": File(head=GOOD),
    "/usr/bin/tini": File(head=elf(dynamic=False)),
    "/usr/bin/gosu": File(head=elf(go=True, dynamic=False)),
    "/usr/bin/tool": File(head=b"#!/usr/bin/env -S python3 -u\n"),
    "/usr/bin/python3": File(link="../lib/python"),
    "/usr/lib/python": File(head=GOOD),
    "/usr/bin/loop": File(link="loop"),
    "/usr/bin/data": File(head=b"\x89PNG"),
    "/entry.sh": File(head=b'#!/bin/sh\nexec "$@"\n'),
    "/bin/sh": File(link="/usr/bin/dash"),
}


def verdict(*words: str, user: str = "", folder: str = "/") -> tuple[str, str]:
    found = judge(FILES.get, Start(words, folder=folder, user=user), "x86_64")
    return "".join(found.hindered), "".join(found.unknown)


@pytest.mark.parametrize(
    "words",
    [
        ("good",),
        ("/usr/bin/good", "-x"),
        ("/entry.sh", "good", "-x"),
        ("tini", "--", "/entry.sh", "good"),
        ("gosu", "redis", "good"),
        ("env", "A=1", "good"),
        ("sh", "-c", "A=1 exec good -x"),
        ("tool",),
        ("python3", "-m", "server"),
    ],
)
def test_programs_that_can(words: tuple[str, ...]) -> None:
    """A program is found behind launchers, scripts, shells and links; a suitable one gives no
    note.
    """
    assert verdict(*words) == ("", "")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("static",), "/usr/bin/static is static"),
        (("/entry.sh", "static"), "/usr/bin/static is static"),
        (("go",), "/usr/bin/go is a Go program"),
        (("tini", "--", "go"), "/usr/bin/go is a Go program"),
        (("sh", "-c", "go serve"), "/usr/bin/go is a Go program"),
        (("arm",), "/usr/bin/arm is for aarch64, this host is x86_64"),
        (("mail",), "more rights than its user"),
    ],
)
def test_programs_that_cannot(words: tuple[str, ...], why: str) -> None:
    """Static, Go, foreign and privileged programs are named, each with its reason."""
    assert why in verdict(*words)[0]


@pytest.mark.parametrize("program", ["su", "ping"])
def test_rights_that_are_more(program: str) -> None:
    """Capabilities of a file don't matter for root, which has them."""
    assert verdict(program) == ("", "")
    assert "more rights than its user" in verdict(program, user="1000:1000")[0]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((), "it names no program"),
        (("none",), "no program none"),
        (("/entry.sh",), "the program that /entry.sh starts"),
        (("/entry.sh", "--option"), "the program that /entry.sh starts"),
        (("sh", "-c", "a && b"), "the program that /usr/bin/dash starts"),
        (("sh",), "the program that /usr/bin/dash starts"),
        (("loop",), "no program loop"),
        (("data",), "/usr/bin/data is neither"),
    ],
)
def test_what_is_not_known(words: tuple[str, ...], what: str) -> None:
    """An unknown program is reported as unknown."""
    hindered, unknown = verdict(*words)
    assert (hindered, what in unknown) == ("", True)


def test_what_a_service_says_instead() -> None:
    """As in Docker, a command replaces the image's, and an entrypoint drops it."""
    config = {"Entrypoint": ["/e"], "Cmd": ["c"], "Env": ["PATH=/x:/y"], "User": "u", "WorkingDir": "/w"}  # fmt: skip
    assert start_of(config) == Start(("/e", "c"), ("/x", "/y"), "/w", "u")
    assert start_of(config, command=["d"]).words == ("/e", "d")
    assert start_of(config, entrypoint=["f"]).words == ("f",)
    assert start_of(config, ["f"], ["d"], "v", "/v") == Start(("f", "d"), ("/x", "/y"), "/v", "v")


class Docker:
    """An engine with one image, which serves its files and records its containers."""

    def __init__(self, config: dict[str, Any], files: dict[str, File]) -> None:
        self.config, self.files = config, files
        self.containers: set[str] = set()
        self.made = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        status, body = 404, b""
        if path == "/images/mine/json":
            status, body = 200, msgspec.json.encode({"Config": self.config})
        elif (method, path) == ("POST", "/containers/create"):
            assert environ["CONTENT_TYPE"] == "application/json"
            # Who answers before it has all been sent breaks the pipe of the one who sends.
            environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            self.made += 1
            self.containers.add("c1")
            status, body = 201, b'{"Id": "c1"}'
        elif (method, path) == ("DELETE", "/containers/c1"):
            self.containers.discard("c1")
            status = 204
        elif path == "/containers/c1/archive" and "c1" in self.containers:
            wanted = parse_qs(environ["QUERY_STRING"])["path"][0]
            if wanted in self.files:
                status, body = 200, _tar(wanted, self.files[wanted])
        start_response(f"{status} -", [])
        return [body]


def _tar(path: str, file: File) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo(Path(path).name)
        member.mode, member.size = file.mode, len(file.head)
        if file.link:
            member.type, member.linkname = tarfile.SYMTYPE, file.link
        if file.capabilities:
            member.pax_headers = {"SCHILY.xattr.security.capability": "x"}
        archive.addfile(member, io.BytesIO(file.head))
    return stream.getvalue()


def _stack(docker: Docker, tmp_path: Path, more: str = "") -> tuple[str, str]:
    text = f"services:\n  a:\n    image: mine\n    networks: [n]\n{more}networks: {{n: {{driver: freeflow}}}}\n"
    with served(docker, tmp_path / "docker.sock") as path:
        outcome = inject_stack(text, "s.yml", Engine(path))
    path.unlink()
    assert not docker.containers
    return outcome.text, "\n".join(outcome.notes)


def test_image_is_looked_into(tmp_path: Path) -> None:
    """The image's program is read from a container that is removed again, and its obstacle is
    noted.
    """
    native = {"x86_64": 62, "aarch64": 183}.get(MACHINE, 0)
    files = {"/bin/go": File(head=elf(go=True, machine=native)), "/bin/link": File(link="go")}
    docker = Docker({"Cmd": ["link"], "Env": ["PATH=/bin"]}, files)
    assert "a: can't be accelerated: /bin/go is a Go program" in _stack(docker, tmp_path)[1]
    assert docker.made == 1
    good = Docker({"Cmd": ["good"], "Env": ["PATH=/bin"]}, {"/bin/good": File(head=elf(machine=native))})  # fmt: skip
    assert _stack(good, tmp_path)[1] == ""
    assert "the value of $P is unknown" in _stack(good, tmp_path, "    entrypoint: ['$P']\n")[1]
    capable = {"/bin/good": File(capabilities=True, head=elf(machine=native))}
    user = Docker({"Cmd": ["good"], "Env": ["PATH=/bin"], "User": "7"}, capable)
    assert "more rights than its user" in _stack(user, tmp_path)[1]


def test_what_the_image_preloads_stays(tmp_path: Path) -> None:
    """An image's own LD_PRELOAD comes first, since a service's variable replaces it."""
    docker = Docker({"Env": ["LD_PRELOAD=/a$b.so"]}, {})
    assert '"/a$$b.so:/run/freeflow/libfreeflow.so"' in _stack(docker, tmp_path)[0]


def test_musl(tmp_path: Path) -> None:
    """With --verbs a service whose program's loader is musl's also gets a LD_LIBRARY_PATH, after
    its image's own; one with glibc gets none, and neither without --verbs.
    """
    native = {"x86_64": 62, "aarch64": 183}.get(MACHINE, 0)
    for loader, musl in ((b"/lib/ld-musl-x.so.1", True), (b"/lib64/ld-linux.so.2", False)):
        head = elf(machine=native, loader=loader)
        config = {"Cmd": ["/p"], "Env": ["LD_LIBRARY_PATH=/cuda", "LD_PRELOAD=/a.so /b.so"]}
        docker = Docker(config, {"/p": File(head=head)})
        for verbs in (True, False):
            with served(docker, tmp_path / "docker.sock") as path:
                stack = "services: {a: {image: mine, networks: [n]}}\nnetworks: {n: {driver: freeflow}}\n"
                outcome = inject_stack(stack, "s.yml", Engine(path), verbs=verbs)
                options = inject_image(Engine(path), "mine", verbs=verbs).text
            path.unlink()
            assert outcome.notes == ()
            wanted = musl and verbs
            assert ('LD_LIBRARY_PATH: "/cuda:/run/freeflow/verbs"' in outcome.text) == wanted
            assert ("--env LD_LIBRARY_PATH=/cuda:/run/freeflow/verbs\n" in options) == wanted
            assert "--env LD_PRELOAD=/a.so:/b.so:/run/freeflow/libfreeflow.so" in options


@pytest.mark.parametrize("value", ["/a b", "$HOME/x", "/a;rm", "\x1b[2J"])
def test_options_that_need_quotes(tmp_path: Path, value: str) -> None:
    """A variable of an image that a shell would take apart is refused, not printed."""
    native = {"x86_64": 62, "aarch64": 183}.get(MACHINE, 0)
    files = {"/p": File(head=elf(machine=native, loader=b"/lib/ld-musl-x.so.1"))}
    docker = Docker({"Cmd": ["/p"], "Env": [f"LD_LIBRARY_PATH={value}"]}, files)
    with (
        served(docker, tmp_path / "docker.sock") as path,
        pytest.raises(InvalidRequest, match="needs quotes"),
    ):
        inject_image(Engine(path), "mine", verbs=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for chroot")
@pytest.mark.kernel
def test_the_users_root(tmp_path: Path) -> None:
    """Within users_root() paths, links included, are the user's; afterwards they are the
    plugin's.
    """
    (tmp_path / "host/home").mkdir(parents=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "host/real").write_text("host")
    (tmp_path / "host/home/link").symlink_to("/real")
    (tmp_path / "own/real").write_text("own")
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from plugin.cli.user_files import users_root\n"
        "host, own = sys.argv[1:]\n"
        "os.chdir(host + '/home')\n"
        "there, root = os.open('.', 0), os.open(host, 0)\n"
        "os.chroot(own)\n"
        "os.chdir('/')\n"
        f"with users_root({{'{VARIABLE}': f'{{there}}:{{root}}'}}):\n"
        "    found = [Path(p).read_text() for p in ('link', '../real', '/real')]\n"
        "    try:\n"
        "        open('missing')\n"
        "    except FileNotFoundError:\n"
        "        found.append('none')\n"
        "print(*found, Path('/real').read_text(), os.getcwd())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "host", tmp_path / "own"],
        capture_output=True,
        text=True,
        check=True,
        timeout=patience(30),
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split() == ["host", "host", "host", "none", "own", "/"]
