"""Connections to another host: rings whose other side is a relay.

TCP's events may arrive first, and the path may be lost. The relays are those of `relay.c`: they
keep the order that real relays promise, and no better. All other tests of rings are repeated over
them, with every message late.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from testbed.kernel_hosts import missing_tools
from tests.dataplane.places import LIBRARY, SOURCES, Places, places, relayed
from tests.dataplane.test_torture import torture

SECONDS: Final = int(os.environ.get("TORTURE_SECONDS", "8"))
SEED: Final = os.environ.get("TORTURE_SEED", "")
MEANS: Final = ("poll", "select", "level", "edge", "once", "nested", "nested_poll")
LATE: Final = (
    *("delay", "2000", "jitter", "1", "end", "20000", "over", "20000", "stopped", "5000"),
    *("start", "3000", "ring", "65536", "spin", "0"),
)
"""A slow path and small rings; the end of a ring arrives last."""


def scenarios(program: str, *without: str) -> list[tuple[str, str]]:
    text = (SOURCES / f"{program}.c").read_text()
    names = re.findall(r'^\s+\{"(\w+)", ', text, re.MULTILINE)
    assert names
    return [(program, name) for name in names if name not in without]


@pytest.fixture(scope="module")
def tools() -> None:
    if missing := missing_tools():
        pytest.skip(f"missing: {missing}")
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")


@pytest.fixture(scope="module")
def far(tools: None, tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Iterator[Places]:
    """Two hosts."""
    with relayed(tmp_path_factory.mktemp("far"), programs) as made:
        yield made


@pytest.fixture(scope="module")
def late(tools: None, tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Iterator[Places]:
    """Two hosts with a slow path."""
    with relayed(tmp_path_factory.mktemp("late"), programs, *LATE) as made:
        yield made


@pytest.fixture
def remote(far: Places, ports: Iterator[int]) -> Iterator[Places]:
    far.forget()
    far.ports = ports
    yield far
    far.order("go")


@pytest.mark.parametrize(
    ("program", "scenario"),
    [
        *scenarios("ends"),
        *scenarios("bytes"),
        *scenarios("processes"),
        # It needs 100,000 descriptors; another test covers that.
        *scenarios("waiting", "high_descriptor"),
        # "begins" measures time.
        *scenarios("cork", "begins"),
    ],
)
def test_as_on_this_host(late: Places, ports: Iterator[int], program: str, scenario: str) -> None:
    """Whatever holds for rings within a host holds between hosts, however late every message is."""
    late.forget()
    late.ports = ports
    late.play(program, scenario, STATIC_CAT=str(late.programs / "static-cat"))
    assert late.counted()["remote"] >= 1


@pytest.mark.parametrize("means", MEANS)
@pytest.mark.parametrize("scenario", ["overtaken", "overtaken_twice"])
def test_end_comes_first(remote: Places, scenario: str, means: str) -> None:
    """A FIN that has overtaken the ring isn't reported, and costs no CPU time, until the ring has
    ended.
    """
    remote.play("remote", scenario, MEANS=means)


@pytest.mark.parametrize("scenario", ["held", "held_half"])
def test_end_comes_first_to_a_reader(remote: Places, scenario: str) -> None:
    """A reader gets the bytes from before the FIN, then the end, and can still send."""
    remote.play("remote", scenario)


def test_bytes_of_tcp_come_first(remote: Places) -> None:
    """Bytes sent over TCP after the ring are read after the ring's."""
    remote.play("remote", "urgent")


def test_ring_that_nobody_used(
    tools: None, tmp_path: Path, programs: Path, ports: Iterator[int]
) -> None:
    """A program does not wait for the end of a ring that was made and never used."""
    with relayed(tmp_path, programs, "start", "300000") as made:
        made.ports = ports
        made.play("remote", "unused")
        counted = made.counted()
        assert (counted["remote"], counted["senders"]) == (2, 0)


@pytest.mark.parametrize("means", MEANS)
def test_reset_comes_at_once(remote: Places, means: str) -> None:
    """A reset is reported as soon as the kernel reports it."""
    remote.play("remote", "reset", MEANS=means)


@pytest.mark.parametrize("means", MEANS)
@pytest.mark.parametrize("loss", ["break", "sever"])
def test_loss_wakes(remote: Places, loss: str, means: str) -> None:
    """When the relays fail, or the router reports that its relay has died, waiting calls end by a
    reset.
    """
    remote.play("remote", "lost", MEANS=means, LOSS=loss)
    remote.play("remote", "lost_writer", MEANS=means, LOSS=loss)
    if means != "select":
        remote.play("remote", "lost_alone", MEANS=means, LOSS=loss)
    counted = remote.counted()
    assert counted["broken"] >= 2
    assert counted["corrupt"] == 0


@pytest.mark.parametrize("scenario", ["lost_in_read", "lost_in_write", "lost_behind"])
def test_loss_ends_calls(remote: Places, scenario: str) -> None:
    """Blocking calls end by a reset, after the bytes that had arrived."""
    remote.play("remote", scenario, LOSS="break")


@pytest.mark.parametrize(
    ("scenario", "means"),
    [
        ("lost", "poll"),
        ("lost", "edge"),
        ("lost", "nested"),
        ("lost_writer", "level"),
        ("lost_in_read", ""),
        ("lost_in_write", ""),
    ],
)
def test_death_wakes(
    tools: None, tmp_path: Path, programs: Path, ports: Iterator[int], scenario: str, means: str
) -> None:
    """Connections end correctly if relay and router die together without a message."""
    with relayed(tmp_path, programs, dies=True) as made:
        made.ports = ports
        made.play("remote", scenario, MEANS=means, LOSS="die")


@pytest.mark.parametrize("settings", [("lies", "1"), ("lies", "2"), ("ring", "32768")])
def test_wrong_arena(
    tools: None, tmp_path: Path, programs: Path, ports: Iterator[int], settings: tuple[str, ...]
) -> None:
    """An arena whose header and size do not agree is not used: the connection stays on TCP."""
    with relayed(tmp_path, programs, *settings) as made:
        made.ports = ports
        made.accelerated = False  # No upgrade is wanted, but counters are.
        made.play("ends", "half_close")
        counted = made.counted()
        assert counted["refused"] == 2
        assert (counted["remote"], counted["senders"]) == (0, 0)


def test_nonsense(remote: Places) -> None:
    """Whatever the rings' headers contain, a program gets errors at worst."""
    remote.play("remote", "spoiled")


@pytest.mark.timeout(SECONDS + 120)
def test_torture(tools: None, tmp_path: Path, programs: Path) -> None:
    """No byte is wrong and nothing hangs, with many threads on one connection, forks, signals and
    kills.
    """
    with relayed(tmp_path, programs, *LATE) as made:
        seed = SEED or str(int.from_bytes(os.urandom(4), "big"))
        assert "operations" in torture(made, (), SECONDS, seed)
        made.upgraded(5)


def test_no_relay(tools: None, tmp_path: Path, programs: Path) -> None:
    """Within a host none of this is used."""
    with places(True, tmp_path, programs) as made:
        made.play("ends", "half_close")
        made.upgraded()
        assert made.counted()["remote"] == 0
