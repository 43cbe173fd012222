"""`python -m bench relay`: the cost of the relay itself: two links of one relay over shared memory.

One program is both processes, in one thread on one core; the relay has another core. The processor
copies the bytes that an RDMA device would write, so bytes per second are a lower bound that depends
on this machine's memory. Counters per message and per megabyte are the relay's own. They hold for
verbs, too, except `copied`, which is 0 there; see docs/rdma-model.md.

valgrind counts instructions. Under it the relay never spins, so each message costs one more sleep.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from bench import machine
from bench.errors import BenchError
from bench.report import columns, number
from bench.stats import FREEFLOW, Case, Row, row
from testbed import relays as client

ROOT: Final = Path(__file__).parents[1]
TOOL: Final = Path(__file__).with_name("tools") / "relayload.c"
MEGABYTE: Final = 1_000_000
RING: Final = 256 << 10
SETTLE: Final = 0.05
SPIN: Final = 10_000_000
"""Microseconds: longer than a run takes."""
COMPILE: Final = (
    "gcc",
    "-O2",
    "-std=gnu11",
    "-D_GNU_SOURCE",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Werror",
    "-pthread",
)
MESSAGES: Final = (64, 1024, 16384, 65536)
TOLD: Final = ("delay_64b", "stream_65536b")
"""Cases whose counters are rows of `cross-host`."""
COUNTED: Final = ("writes", "posts", "polls", "completions", "calls", "sleeps", "bells")


@dataclass(frozen=True, slots=True)
class Run:
    """One run: the load's figures, the relay's counters, and its CPU time in seconds."""

    figures: tuple[float, ...]
    counts: dict[str, int]
    cpu: float


def _cpu(pid: int) -> float:
    """Seconds of CPU time, with the kernel's resolution."""
    return time.clock_gettime(_clock_of(pid))


def _clock_of(pid: int) -> int:
    """The ID of a process's CPU-time clock, as clock_getcpuclockid(3) makes it."""
    return ~pid << 3 | 2


@contextlib.contextmanager
def _pair(binary: Path, *, spin: int) -> Iterator[tuple[client.Relay, client.End, client.End]]:
    with client.relay(binary) as relay:
        answer = relay.open(spin=spin)
        if answer.error:
            raise BenchError(f"the relay does not open the loopback transport: {answer.text}")
        client.link(relay, relay, 1, 2)
        one, two = client.connect(relay, relay, ring=RING, link=1, peer_link=2)
        for end in (one, two):
            end.write(1, 72, 1, 4)
            assert end.rings_relay is not None
            # Mark all slots as dirty, so that the relay scans them at once.
            os.pwrite(end.memory, b"\1" + bytes(7), 64 + 2112 + 64)
            end.rings_relay.send(b"x")
        time.sleep(SETTLE)
        yield relay, one, two


def _pin(pid: int, core: int) -> None:
    with contextlib.suppress(OSError):
        os.sched_setaffinity(pid, {core})


def _load(
    tool: Path,
    mode: str,
    message: int,
    seconds: float,
    touch: bool,
    one: client.End,
    two: client.End,
) -> tuple[float, ...]:
    assert one.rings_relay is not None
    assert two.rings_relay is not None
    passed = (one.memory, one.rings_relay.fileno(), two.memory, two.rings_relay.fileno())
    given = [str(word) for word in (tool, mode, message, seconds, int(touch), *passed)]
    said = subprocess.run(
        given,
        pass_fds=passed,
        preexec_fn=lambda: _pin(0, 0),
        capture_output=True,
        text=True,
        timeout=60 + seconds,
    )
    if said.returncode:
        raise BenchError(f"relayload {mode} failed: {said.stderr}; run it by hand")
    return tuple(float(word) for word in said.stdout.split())


def _run(binary: Path, tool: Path, mode: str, message: int, seconds: float, touch: bool) -> Run:
    with _pair(binary, spin=SPIN) as (relay, one, two):
        _pin(relay.process.pid, (os.cpu_count() or 1) - 1)
        before, spent = relay.counts(), _cpu(relay.process.pid)
        figures = _load(tool, mode, message, seconds, touch, one, two)
        spent = _cpu(relay.process.pid) - spent
        after = relay.counts()
    return Run(figures, {name: after[name] - before[name] for name in after}, spent)


def _annotated(out: Path) -> tuple[int, int]:
    """Instructions of a run under callgrind: all, and those that copy bytes."""
    said = subprocess.run(
        ["callgrind_annotate", "--threshold=100", str(out)],
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    rows = re.findall(r"^\s*([\d,]+) \([\s\d.]+%\)\s+(.*)$", said, re.MULTILINE)
    if not rows:
        raise BenchError("callgrind_annotate prints no rows; run it by hand")
    counted = [(int(count.replace(",", "")), what) for count, what in rows]
    total = next(count for count, what in counted if "PROGRAM TOTALS" in what)
    return total, sum(count for count, what in counted if "memcpy" in what or "memmove" in what)


def _under_valgrind(
    binary: Path, end: Path, options: tuple[list[str], list[str]]
) -> tuple[int, int]:
    """Instructions of a relay between two ends with these options."""
    with tempfile.TemporaryDirectory() as folder:
        wrapper, out = Path(folder, "relay"), Path(folder, "out")
        valgrind = f"valgrind --tool=callgrind --log-file=/dev/null --callgrind-out-file={out}"
        wrapper.write_text(f'#!/bin/sh\nexec {valgrind} "{binary}"\n')
        wrapper.chmod(0o755)
        with client.relay(wrapper) as relay:
            relay.open(spin=0)
            client.link(relay, relay, 1, 2)
            ends = client.connect(relay, relay, ring=RING, link=1, peer_link=2)
            started = [
                one.popen(end, "check=0", *more) for one, more in zip(ends, options, strict=True)
            ]
            for process in started:
                if process.communicate(timeout=300) and process.returncode:
                    raise BenchError(
                        f"the load on a relay under valgrind failed: {process.returncode}"
                    )
        return _annotated(out)


def instructions(binary: Path, end: Path) -> dict[str, float]:
    """Instructions of both relays, without copying: per message of 64 bytes, and per megabyte."""
    few, many = 200, 1200
    trips = [
        _under_valgrind(
            binary,
            end,
            ([f"rounds={n}", "message=64"], [f"rounds={n}", "message=64", "server=1"]),
        )
        for n in (few, many)
    ]
    streams = [
        _under_valgrind(binary, end, ([f"send={n * MEGABYTE}", "message=65536"], ["message=65536"]))
        for n in (4, 24)
    ]
    return {
        "message_64b": _without_copies(trips, 2 * (many - few)),
        "megabyte": _without_copies(streams, 20),
    }


def _without_copies(some: list[tuple[int, int]], units: int) -> float:
    (total, copies), (more, more_copies) = some
    return ((more - more_copies) - (total - copies)) / units


def _per_message(one: Run, units: float) -> dict[str, float]:
    return {name: one.counts[name] / units for name in COUNTED}


def _median(values: list[float]) -> float:
    return statistics.median(values)


def measure(binary: Path, tool: Path, rounds: int, seconds: float, say: Any) -> dict[str, Any]:
    """Medians of each case. `best` is the least disturbed run: lowest delay, or most per core."""
    runs: dict[str, list[Run]] = {}
    cases = [
        *((f"delay_{size}b", "delay", size, True) for size in MESSAGES),
        *((f"stream_{size}b", "stream", size, False) for size in MESSAGES),
        *((f"stream_{size}b_touched", "stream", size, True) for size in MESSAGES[-1:]),
    ]
    for number_of in range(rounds):
        for name, mode, size, touch in cases:
            runs.setdefault(name, []).append(_run(binary, tool, mode, size, seconds, touch))
            say(f"round {number_of + 1}/{rounds}  {name} {runs[name][-1].figures}")
    rows: dict[str, Any] = {}
    for name, mode, size, _ in cases:
        some = runs[name]
        if mode == "delay":
            rows[name] = {
                "unit": "us",
                "value": _median([one.figures[1] / 1000 for one in some]),
                "best": min(one.figures[1] / 1000 for one in some),
                "p99": _median([one.figures[2] / 1000 for one in some]),
                "per_message": _per_message(some[-1], some[-1].figures[0]),
            }
            continue
        rows[name] = {
            "unit": "Gbit/s",
            "value": _median([one.figures[0] * 8 / one.figures[1] / 1e9 for one in some]),
            "best": max(one.figures[0] * 8 / one.cpu / 1e9 for one in some),
            "per_core": _median([one.figures[0] * 8 / one.cpu / 1e9 for one in some]),
            "per_message": _per_message(some[-1], some[-1].figures[0] / size),
            "per_megabyte": _per_message(some[-1], some[-1].figures[0] / MEGABYTE),
        }
    return rows


@contextlib.contextmanager
def _built() -> Iterator[tuple[Path, Path, Path]]:
    """Paths of the relay, its load, and the test's program for one end."""
    with tempfile.TemporaryDirectory() as folder:
        binary, tool, end = (Path(folder, name) for name in ("freeflow-relay", "relayload", "end"))
        subprocess.run([ROOT / "dataplane" / "relay" / "build.sh", "--memory", binary], check=True)
        for source, to in ((TOOL, tool), (ROOT / "tests" / "relay" / "end.c", end)):
            subprocess.run([*COMPILE, str(source), "-o", str(to)], check=True)
        yield binary, tool, end


def suite(rounds: int, seconds: float, say: Any) -> dict[str, Row]:
    """Rows for `cross-host`: the relay's delay, and the throughput of one core, without ratios.

    Raises:
        BenchError: the relay or its load failed.
    """
    with _built() as (binary, tool, _):
        found = measure(binary, tool, rounds, seconds, say)
    rows = {}
    for name, one in found.items():
        about = "the relay over shared memory in a device's namespaces"
        if name.startswith("delay"):
            case, value = Case(f"relay_{name}", "us", False, f"{about}: one way"), one["value"]
        else:
            case = Case(f"relay_{name}_per_core", "Gbit/s", True, f"{about}: per second of its CPU")
            value = one["per_core"]
        rows[case.name] = row(case, {FREEFLOW: [value]})
        for counter, count in one["per_message"].items() if name in TOLD else ():
            of = Case(f"{case.name}_{counter}", "per message", False, f"{about}: counted by it")
            rows[of.name] = row(of, {FREEFLOW: [count]})
    return rows


def table(rows: dict[str, Any]) -> str:
    """The table: figures, then the relay's counters."""
    header = ("case", "unit", "value", "p99 / per core", "best", *COUNTED)
    lines: list[tuple[str, ...]] = []
    for name, one in rows.items():
        other = one.get("p99", one.get("per_core"))
        counts = (number(one["per_message"][counter]) for counter in COUNTED)
        lines.append(
            (name, one["unit"], number(one["value"]), number(other), number(one["best"]), *counts)
        )
    return columns(header, lines)


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="Length of a run.")
@click.option(
    "--valgrind/--no-valgrind", default=True, help="Count instructions, which takes a minute."
)
def main(as_json: bool, rounds: int, seconds: float, valgrind: bool) -> None:
    start = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"{time.monotonic() - start:6.1f} s  {text}", err=True)

    with _built() as (binary, tool, end):
        try:
            rows = measure(binary, tool, rounds, seconds, say)
            counted = instructions(binary, end) if valgrind and shutil.which("valgrind") else None
        except BenchError as error:
            raise click.ClickException(str(error)) from error
    found: dict[str, Any] = {
        "machine": machine.describe([], "none", rounds, seconds),
        "results": rows,
    }
    found["instructions"] = counted
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(table(rows))
    if counted is not None:
        click.echo(
            f"instructions, both relays, without copies: {number(counted['message_64b'])} for a message of 64 bytes, "
            f"{number(counted['megabyte'])} for a megabyte in messages of 64 KiB"
        )
