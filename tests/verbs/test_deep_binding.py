"""A module that binds to its own libraries first (RTLD_DEEPBIND) finds the device."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from testbed.patience import patience
from tests.dataplane.places import LIBRARY, compile_c
from tests.verbs.router import router

LIBRDMACM = sorted(Path("/usr/lib").glob("*/librdmacm.so.1"))
MODULE = r"""
void *rdma_create_event_channel(void);

int works(void);
int works(void)
{
        return rdma_create_event_channel() != 0;
}
"""
PROGRAM = r"""
#include <dlfcn.h>
#include <stdio.h>

int main(int count, char **arguments)
{
        void *module = dlopen(arguments[count - 1], RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
        int (*works)(void) = module ? (int (*)(void))dlsym(module, "works") : NULL;

        puts(!works ? dlerror() : works() ? "works" : "no device");
        return 0;
}
"""


def test_module(library: Path, tmp_path: Path) -> None:
    """The module's librdmacm opens the device, though nobody has asked for devices before."""
    if not LIBRDMACM or not LIBRARY.exists():
        pytest.skip(f"missing: librdmacm1, {LIBRARY} (make setup library)")
    (tmp_path / "module.c").write_text(MODULE)
    (tmp_path / "program.c").write_text(PROGRAM)
    module = compile_c(
        tmp_path / "module.c",
        tmp_path / "module.so",
        *("-shared", "-fPIC", "-Wl,--no-as-needed", str(LIBRDMACM[0])),
    )
    program = compile_c(tmp_path / "program.c", tmp_path / "program")
    companion = library.with_name("libibverbs.so")
    with router(tmp_path) as made:
        done = subprocess.run(
            [program, module],
            env={
                "LD_PRELOAD": f"{LIBRARY}:{library}:{companion}",
                "FREEFLOW_ROUTER": str(made.socket),
            },
            capture_output=True,
            text=True,
            timeout=patience(30),
            check=False,
        )
    assert (done.stdout, done.stderr) == ("works\n", "")
