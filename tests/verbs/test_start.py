"""Programs of Debian start with our libibverbs preloaded, whatever the image has of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from testbed.patience import patience
from tests.dataplane.places import compile_c
from tests.verbs.test_symbols import INSTALLED

NO_DEVICE = {
    "ibv_devices": (0, "node GUID"),
    "ibv_devinfo": (255, "No IB devices found"),
    "ibv_rc_pingpong": (1, "No IB devices found"),
    "ib_send_lat": (1, "Did not detect devices"),
    "ib_send_bw": (1, "Did not detect devices"),
    "ib_write_lat": (1, "Did not detect devices"),
    "ib_write_bw": (1, "Did not detect devices"),
    "ib_read_bw": (7, "Did not detect devices"),
    "ib_atomic_lat": (1, "Did not detect devices"),
}
"""What a program answers on a host without a device: its exit code, and words of its output."""
COMPLAINTS = ("symbol lookup error", "version", "cannot", "ERROR: ld.so")
LOADS = r"""
#include <dlfcn.h>
#include <stdio.h>

/* The file that a symbol of a library comes from. */
static void tell(const char *library, const char *name, const char *node)
{
        void *handle = dlopen(library, RTLD_NOW);
        void *symbol = handle ? dlvsym(handle, name, node) : NULL;
        Dl_info info = {0};

        if (symbol)
                dladdr(symbol, &info);
        puts(info.dli_fname ? info.dli_fname : "none");
}

int main(void)
{
        tell("libibverbs.so", "ibv_get_device_list", "IBVERBS_1.1");
        tell("libibverbs.so.1", "ibv_reg_dmabuf_mr", "IBVERBS_1.12");
        tell("libibverbs.so.1", "ibv_no_such_call", "IBVERBS_1.1");
        return 0;
}
"""

MAPPED = r"""
#include <stdio.h>
#include <string.h>

/* How often our library is mapped from its first byte on, and its companion. */
int main(void)
{
        FILE *maps = fopen("/proc/self/maps", "r");
        int library = 0, companion = 0;
        char line[512];

        while (maps && fgets(line, sizeof line, maps))
                if (strstr(line, " 00000000 ")) {
                        library += strstr(line, "/libibverbs.so.1\n") != NULL;
                        companion += strstr(line, "/libibverbs.so\n") != NULL;
                }
        printf("%d %d\n", library, companion);
        return 0;
}
"""


def preloaded(library: Path, **more: str) -> dict[str, str]:
    """An environment with the library and its companion; each symbol is looked up at the start."""
    both = f"{library}:{library.with_name('libibverbs.so')}"
    return {**os.environ, "LD_PRELOAD": both, "LD_BIND_NOW": "1", **more}


def run(command: list[str | Path], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patience(30),
        check=False,
    )


@pytest.mark.parametrize("name", NO_DEVICE)
def test_starts(library: Path, name: str) -> None:
    """The program starts, finds each symbol, and says that there is no device."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"missing: {name} (make setup)")
    done = run([program], preloaded(library))
    code, words = NO_DEVICE[name]
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert words in said
    assert not [complaint for complaint in COMPLAINTS if complaint in done.stderr]


@pytest.mark.parametrize("name", ["ibv_devices", "ib_send_lat"])
def test_images_own_is_not_loaded(library: Path, name: str) -> None:
    """ld.so takes our library for the image's own, which it doesn't open."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"missing: {name} (make setup)")
    done = run([program], preloaded(library, LD_DEBUG="files"))
    assert f"file={library}" in done.stderr
    assert not [path for path in INSTALLED if f"{path} [" in done.stderr]


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["ibv_devices", "ib_send_lat"])
def test_image_without_libibverbs(library: Path, name: str) -> None:
    """The program starts where the image's own library is missing."""
    program = shutil.which(name)
    if program is None or os.geteuid() or not INSTALLED:
        pytest.skip(f"missing: {name}, libibverbs1 or root")
    hide = "".join(f"mount --bind /dev/null {path.resolve()} && " for path in INSTALLED)
    command = ["unshare", "--mount", "sh", "-c"]
    alone = run([*command, f'{hide}exec "$0"', program], {**os.environ})
    assert alone.returncode == 127
    environment = preloaded(library)
    preload = environment.pop("LD_PRELOAD")
    done = run([*command, f'{hide}LD_PRELOAD={preload} exec "$0"', program], environment)
    assert done.returncode == NO_DEVICE[name][0], done.stderr
    assert NO_DEVICE[name][1] in done.stdout + done.stderr


def test_loaded_by_name(library: Path, tmp_path: Path) -> None:
    """A program that loads libibverbs by either name, with versions, gets ours."""
    source = tmp_path / "loads.c"
    source.write_text(LOADS)
    program = compile_c(source, tmp_path / "loads", "-ldl")
    done = run([program], preloaded(library))
    assert done.stdout.split() == [str(library), str(library), "none"]
    assert not done.stderr


@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc"])
def test_programs_of_both_c_libraries(library: Path, tmp_path: Path, compiler: str) -> None:
    """A program that doesn't use verbs starts without a word, with each file loaded once."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} missing")
    source = tmp_path / "mapped.c"
    source.write_text(MAPPED)
    program = compile_c(source, tmp_path / "mapped", compiler=compiler)
    done = run([program], preloaded(library))
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 1\n", "")
