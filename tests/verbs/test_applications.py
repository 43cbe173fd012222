"""Applications of packages that find the device by themselves, between two containers."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from testbed.namespace_bed import BedContainer, NamespaceBed, bed
from testbed.patience import patience
from testbed.process import wait_until
from tests.dataplane.places import LIBRARY

pytestmark = pytest.mark.kernel

PRELOADED: Final = ":".join(
    f"/run/freeflow/{name}" for name in (LIBRARY.name, "libibverbs.so.1", "libibverbs.so")
)
NOBODY: Final = shlex.split(
    "setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs --bounding-set=-all"
)
RC_AND_UD: Final = "UCX_TLS=rc_v,ud_v,self UCX_NET_DEVICES=freeflow0:1"
UD: Final = "UCX_TLS=ud_v,self UCX_NET_DEVICES=freeflow0:1"
UCX: Final = "ucx_perftest {} -n 500 -w 50 -t"


@dataclass(frozen=True)
class Application:
    """What is run in the first container, and in the second one for each of some tests; {} is the
    first one's address.
    """

    program: str
    port: int
    client: str
    tests: tuple[str, ...]
    variables: str = ""
    serves_once: bool = True


def ucx(client: str, *tests: str, variables: str = "") -> Application:
    """Tests of UCX."""
    return Application("ucx_perftest", 13337, client, tests, variables)


def libfabric(kind: str, *tests: str, provider: str = "verbs") -> Application:
    """Tests of libfabric, which look at what comes."""
    command = f"fi_pingpong -p {provider} -e {kind} -c"
    return Application(command, 47592, f"{command} {{}}", tests)


APPLICATIONS: Final = {
    "ucp": ucx(
        UCX,
        *("tag_lat", "tag_bw -s 1048576", "tag_sync_lat", "ucp_put_lat", "ucp_put_bw -s 65536"),
        *("ucp_get", "ucp_get -s 1048576", "ucp_fadd", "ucp_cswap", "stream_bw", "ucp_am_lat"),
        variables=RC_AND_UD,
    ),
    "ucp_ud": ucx(UCX, "tag_lat", "tag_bw -s 65536", "ucp_get", variables=UD),
    "uct_rc": ucx(
        f"{UCX.removesuffix('-t')} -d freeflow0:1 -x rc_verbs -t",
        *("am_lat", "am_bw", "put_lat", "get -D bcopy", "get -D zcopy -s 65536", "fadd", "cswap"),
        "add_lat",
    ),
    "uct_ud": ucx(f"{UCX.removesuffix('-t')} -d freeflow0:1 -x ud_verbs -t", "am_lat", "am_bw"),
    "libfabric_msg": libfabric("msg", "-I 50", "-S 1048576 -I 50"),
    "libfabric_rdm": libfabric("rdm", "-I 50", provider="verbs;ofi_rxm"),
    "libfabric_dgram": libfabric("dgram", "-I 50"),
    # By rdma_cm, as on all devices with RoCE: by itself qperf knows no GIDs.
    "qperf": Application(
        "qperf",
        19765,
        "qperf -t 1 -cm 1 {}",
        ("rc_lat", "rc_bi_bw", "rc_rdma_write_poll_lat", "ver_rc_compare_swap"),
        serves_once=False,
    ),
}


@pytest.fixture(scope="module")
def made(library: Path) -> Iterator[NamespaceBed]:
    """Two containers, in which the libraries are where the plugin puts them."""
    if os.geteuid() or not LIBRARY.exists():
        pytest.skip(f"missing: root or {LIBRARY} (make library)")
    with bed("a", "b", library=LIBRARY) as made:
        made.shared.joinpath("router.sock").chmod(0o666)
        for name in (library.name, "libibverbs.so"):
            shutil.copy(library.with_name(name), made.shared)
        yield made


def inside(application: Application, command: str) -> list[str]:
    """A command as an unprivileged user."""
    variables = [f"LD_PRELOAD={PRELOADED}", *application.variables.split()]
    return [*NOBODY, "env", *variables, *shlex.split(command)]


def start(box: BedContainer, command: list[str]) -> subprocess.Popen[str]:
    return box.popen(
        command,
        accelerated=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> str:
    """End a program with its children. Returns what it has said."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


def listens(box: BedContainer, port: int) -> bool:
    return f":{port} " in box.run(["ss", "-Hltn"], accelerated=False).stdout


def finish(process: subprocess.Popen[str]) -> str:
    """What a program says that has to succeed."""
    try:
        said, _ = process.communicate(timeout=patience(60))
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it doesn't end: {end(process)}") from None
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize(
    ("name", "test"),
    [(name, test) for name, each in APPLICATIONS.items() for test in each.tests],
)
def test_applications(made: NamespaceBed, name: str, test: str) -> None:
    """Each test of an application succeeds, and says nothing of errors."""
    a, b = made.containers.values()
    exchange(a, b, APPLICATIONS[name], test)


def exchange(a: BedContainer, b: BedContainer, application: Application, test: str) -> None:
    """Run a test of an application whose server is in the first container."""
    program = application.program.split()[0]
    if shutil.which(program) is None:
        pytest.skip(f"missing: {program} (make setup)")
    wait_until("nobody to listen", lambda: not listens(a, application.port))
    same = test if program == "fi_pingpong" else ""
    server = start(a, inside(application, f"{application.program} {same}"))
    wait_until("the server to listen", lambda: listens(a, application.port))
    client = start(b, inside(application, f"{application.client.format(a.ipv4)} {test}"))
    try:
        said = finish(client)
    except AssertionError:
        print("server:", end(server))
        raise
    said += finish(server) if application.serves_once else end(server)
    assert not re.search("ERROR|WARN", said), said


AGENT: Final = """#!/bin/sh
host=$1
shift
. {folder}/$host
export shared
exec nsenter --net="$namespace" unshare --mount sh -c '{mounts}' sh "$*"
"""
MOUNTS: Final = (
    'mount -t tmpfs tmpfs /run && mkdir -p /run/freeflow && mount --bind "$shared" /run/freeflow && '
    'exec sh -c "$1"'
)


@pytest.mark.parametrize("ranks", [2, 4])
def test_mpi(made: NamespaceBed, tmp_path: Path, ranks: int) -> None:
    """Programs of Open MPI exchange messages of all sizes over UCX, each byte as it was sent."""
    a, b = made.containers.values()
    exchange_mpi(a, b, tmp_path, ranks)


def exchange_mpi(a: BedContainer, b: BedContainer, folder: Path, ranks: int) -> None:
    """Run a program of Open MPI with half of its ranks in each container."""
    for program in ("mpicc", "mpirun"):
        if shutil.which(program) is None:
            pytest.skip(f"missing: {program} (make setup)")
    source = Path(__file__).with_name("mpi.c")
    subprocess.run(["mpicc", "-O2", "-o", folder / "mpi", source], check=True)
    for box in (a, b):
        (folder / str(box.ipv4)).write_text(f"namespace={box.path} shared={box.shared}\n")
    agent = folder / "agent"
    agent.write_text(AGENT.format(folder=folder, mounts=MOUNTS))
    agent.chmod(0o755)
    exported = [f"LD_PRELOAD={PRELOADED}", "UCX_TLS=rc_v,ud_v,self", "UCX_NET_DEVICES=freeflow0:1"]
    command = [
        *("env", "OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1", "HOME=/tmp"),
        *("mpirun", "-n", str(ranks), "--host", f"{a.ipv4}:{ranks // 2},{b.ipv4}:{ranks // 2}"),
        *("--map-by", "node", "--mca", "plm_rsh_agent", str(agent), "--mca", "pml", "ucx"),
        *("--mca", "btl", "^openib", "--mca", "osc", "ucx"),
        *(word for each in exported for word in ("-x", each)),
        str(folder / "mpi"),
    ]
    said = finish(start(a, command))
    assert f"{ranks} ranks" in said, said
