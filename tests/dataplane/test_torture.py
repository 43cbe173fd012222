"""Every byte of many connections is right, however programs wait for it, share it and die: see
`torture.c`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from testbed.patience import patience
from tests.dataplane.places import Places, compile_c, places

SOURCE = Path(__file__).with_name("torture.c")
BUILD = Path(__file__).parents[2] / "dataplane/library/build.sh"
SECONDS = int(os.environ.get("TORTURE_SECONDS", "20"))
LOOPS = int(os.environ.get("TORTURE_SECONDS", "8"))
SANITIZED = int(os.environ.get("TORTURE_SECONDS", "8"))
SEED = os.environ.get("TORTURE_SEED", "")


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def checked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A sanitizer, and a library that was built with it."""
    library = tmp_path_factory.mktemp("checked") / "libfreeflow.so"
    subprocess.run(["sh", str(BUILD), str(library), request.param], check=True)
    return request.param, library


def torture(
    both: Places, options: Sequence[str], seconds: int, seed: str, **environment: str
) -> str:
    """Run both ends until they end. Returns the client's output."""
    port = 7000
    program = str(compile_c(SOURCE, both.folder / "torture", *options))
    server = both.server.popen(
        [program, "server", both.address, str(port)],
        env=both.environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    client = both.client.popen(
        [program, "client", both.address, str(port), str(seconds), seed, "16", "4"],
        env=both.environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: dict[str, str] = {}
    try:
        said["client"] = client.communicate(timeout=seconds + 60)[0]
        said["server"] = server.communicate(timeout=patience(20))[0]
    except subprocess.TimeoutExpired:
        said["late"] = "not over in time"
    finally:
        for role, end in (("client", client), ("server", server)):
            if end.poll() is None:
                end.kill()
                said[role] = end.communicate()[0]
    assert (client.returncode, server.returncode) == (0, 0), "\n".join(said.values())
    return said["client"]


@pytest.mark.timeout(SECONDS + 120)
def test_torture(everywhere: Places) -> None:
    """No byte is wrong and nothing stalls, with many threads on one connection, forks, signals and
    kills.
    """
    everywhere.forget()
    # Plain TCP only shows that the program itself is right.
    seconds = SECONDS if everywhere.accelerated else min(SECONDS, 5)
    said = torture(everywhere, (), seconds, SEED or str(int.from_bytes(os.urandom(4), "big")))
    assert "operations" in said
    everywhere.upgraded(20)


@pytest.mark.timeout(LOOPS + 120)
def test_torture_of_loops(everywhere: Places) -> None:
    """No wake-up is lost among several threads in one epoll instance while connections move to
    rings.
    """
    everywhere.forget()
    seconds = LOOPS if everywhere.accelerated else 5
    said = torture(
        everywhere,
        (),
        seconds,
        SEED or str(int.from_bytes(os.urandom(4), "big")),
        TORTURE_LOOPS="1",
        # Small rings are full, and empty, all the time.
        FREEFLOW_RING_LIMIT="65536",
    )
    assert "operations" in said
    everywhere.upgraded(20)


@pytest.mark.timeout(LOOPS + 120)
@pytest.mark.parametrize("everywhere", ["accelerated"], indirect=True)
@pytest.mark.parametrize("loops", [False, True])
def test_torture_of_returns(everywhere: Places, loops: bool) -> None:
    """No byte is wrong and no wake-up is lost while both ends fall back to TCP at random, and move
    to rings again.
    """
    everywhere.forget()
    options = {"TORTURE_LOOPS": "1", "FREEFLOW_RING_LIMIT": "65536"} if loops else {}
    said = torture(
        everywhere,
        (),
        LOOPS,
        SEED or str(int.from_bytes(os.urandom(4), "big")),
        FREEFLOW_RESTLESS="1",
        **options,
    )
    assert "operations" in said
    everywhere.upgraded(20)
    assert everywhere.counted()["returned"] >= 20


@pytest.mark.timeout(240)
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_torture_itself(tmp_path: Path, sanitizer: str) -> None:
    """No sanitizer finds an error in the torture program itself."""
    with places(accelerated=False, folder=tmp_path, programs=tmp_path) as plain:
        torture(plain, (f"-fsanitize={sanitizer}",), 5, "7")


@pytest.mark.timeout(SANITIZED + 120)
@pytest.mark.parametrize("restless", [False, True])
def test_torture_of_the_library(tmp_path: Path, checked: tuple[str, Path], restless: bool) -> None:
    """No sanitizer finds an error in the library during the torture test, whether connections stay
    on rings or leave them all the time.
    """
    sanitizer, library = checked
    found = f"log_path={tmp_path}/found"
    with places(True, tmp_path, tmp_path, library=library) as both:
        torture(
            both,
            (f"-fsanitize={sanitizer}",),
            SANITIZED,
            SEED or str(int.from_bytes(os.urandom(4), "big")),
            # The library is loaded before the sanitizer. Workers are killed, so leaks mean nothing.
            ASAN_OPTIONS=f"{found}:verify_asan_link_order=0:detect_leaks=0",
            UBSAN_OPTIONS=f"{found}:print_stacktrace=1",
            TSAN_OPTIONS=f"{found}:history_size=4:report_signal_unsafe=0",
            **({"FREEFLOW_RESTLESS": "1"} if restless else {}),
        )
        assert both.counted()["senders"] >= 5
        assert both.counted()["returned"] >= 5 or not restless
    assert not [file.read_text() for file in tmp_path.glob("found*")]
