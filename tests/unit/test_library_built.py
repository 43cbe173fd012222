"""The built library: what it needs of a C library, and that programs of both kinds load it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from testbed.patience import patience

TOP = Path(__file__).parents[2]
BUILD = TOP / "dataplane/library/build.sh"
ALLOWED = frozenset(
    (
        "__chk_fail",
        "__errno_location",
        "dlsym",
        "environ",
        "memcmp",
        "memcpy",
        "memmove",
        "memset",
        "strcmp",
        "strcspn",
        "strlen",
        "strncmp",
        "strspn",
    )
)
"""Both C libraries have these, without a version; __chk_fail is weak and only glibc's."""
PROGRAM = r"""
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(void)
{
    int pair[2];
    char line[512], got[4];
    int mapped = 0;
    FILE *maps = fopen("/proc/self/maps", "r");

    while (maps && fgets(line, sizeof(line), maps))
        mapped |= strstr(line, "libfreeflow.so") != NULL;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) || write(pair[0], "abc", 4) != 4 ||
        read(pair[1], got, 4) != 4)
        return 2;
    printf("%s %s\n", mapped ? "loaded" : "plain", got);
    return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [tool for tool in ("gcc", "readelf") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing")
    output = tmp_path_factory.mktemp("library") / "libfreeflow.so"
    subprocess.run([BUILD, output], check=True, timeout=patience(120))
    return output


def read(library: Path, *options: str) -> str:
    return subprocess.run(
        ["readelf", "--wide", *options, library],
        check=True,
        capture_output=True,
        text=True,
        timeout=patience(30),
    ).stdout


def build(output: Path, compiler: str) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} missing")
    subprocess.run(
        [BUILD, output], env={**os.environ, "CC": compiler}, check=True, timeout=patience(120)
    )
    return output


@pytest.mark.parametrize("compiler", ["gcc", "aarch64-linux-gnu-gcc"])
def test_needs_little(tmp_path: Path, compiler: str) -> None:
    """It needs only symbols that both C libraries have, without versions, on both architectures."""
    library = build(tmp_path / "libfreeflow.so", compiler)
    undefined = {
        fields[7]
        for fields in map(str.split, read(library, "--dyn-syms").splitlines())
        if len(fields) > 7 and fields[6] == "UND"
    }
    assert {name.partition("@")[0] for name in undefined} <= ALLOWED
    assert not [name for name in undefined if "@" in name]
    assert ".gnu.version_r" not in read(library, "--sections")


def test_needs_one_library(library: Path) -> None:
    """It depends on libdl.so.2 only, a name that musl provides itself."""
    needed = [line for line in read(library, "--dynamic").splitlines() if "(NEEDED)" in line]
    assert len(needed) == 1
    assert "[libdl.so.2]" in needed[0]


def test_hardened(library: Path) -> None:
    """Its stack isn't executable, no page is writable and executable, and it changes no code when
    it is loaded.
    """
    segments = [line.split() for line in read(library, "--segments").splitlines()]
    stack = [fields for fields in segments if fields[:1] == ["GNU_STACK"]]
    assert stack
    assert "E" not in stack[0][6]
    loads = [fields for fields in segments if fields[:1] == ["LOAD"]]
    assert loads
    assert not [fields for fields in loads if "RWE" in "".join(fields[6:-1])]
    assert "TEXTREL" not in read(library, "--dynamic")


def test_thread_locals_need_no_call(library: Path) -> None:
    """Its thread-local variables are in the static block: reaching one allocates nothing, in a
    signal handler neither.
    """
    assert "__tls_get_addr" not in read(library, "--dyn-syms")
    relocations = read(library, "--relocs")
    assert "DTPMOD" not in relocations
    assert "TLSDESC" not in relocations


def test_has_a_build(library: Path) -> None:
    """It has a build ID."""
    assert "Build ID:" in read(library, "--notes")


@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc"])
def test_loads(library: Path, tmp_path: Path, compiler: str) -> None:
    """Programs of both C libraries load it without output, and work as before."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} missing")
    source, program = tmp_path / "program.c", tmp_path / "program"
    source.write_text(PROGRAM)
    subprocess.run([compiler, "-O1", "-o", program, source], check=True, timeout=patience(60))
    for preload, said in (("", "plain abc\n"), (str(library), "loaded abc\n")):
        result = subprocess.run(
            [program],
            env={**os.environ, "LD_PRELOAD": preload, "LD_BIND_NOW": "1"},
            capture_output=True,
            text=True,
            timeout=patience(30),
            check=False,
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, said, "")


@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc"])
def test_static_program(library: Path, tmp_path: Path, compiler: str) -> None:
    """A static program ignores it."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} missing")
    source, program = tmp_path / "program.c", tmp_path / "program"
    source.write_text(PROGRAM)
    subprocess.run(
        [compiler, "-O1", "-static", "-o", program, source], check=True, timeout=patience(60)
    )
    result = subprocess.run(
        [program],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=patience(30),
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "plain abc\n", "")
