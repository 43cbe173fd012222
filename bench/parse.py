"""Strict parsers of the load programs' output: unknown output or a failed request is an error."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from itertools import pairwise

from bench.errors import ProgramError
from bench.latency import Latency


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """The output of `pingpong`; `cpu_us` is the CPU time of its loop."""

    count: int
    lost: int
    p50_us: float
    p99_us: float
    cpu_us: float


@dataclass(frozen=True, slots=True)
class Moved:
    """The output of `stream`, `memload` and `processes`.

    `count` is of bytes, requests or processes, done in `seconds`; `cpu_us` is the program's CPU
    time.
    """

    count: int
    seconds: float
    cpu_us: float
    latency: Latency | None = None


@dataclass(frozen=True, slots=True)
class Transactions:
    """The output of pgbench."""

    count: int
    rate: float


@dataclass(frozen=True, slots=True)
class Paths:
    """The library's counters: TCP connections, and directions of them that were upgraded."""

    connections: int
    directions: int

    def share(self, aside: int = 0) -> float | None:
        """The share of upgraded connections; a direction counts half.

        `aside` connections carry no load and are left out.
        """
        if not self.connections:
            return None
        return min(1.0, self.directions / (2 * max(1, self.connections - aside)))


@dataclass(frozen=True, slots=True)
class Transfer:
    """The receiver's figures of iperf3."""

    bits_per_second: float
    bytes: int


def pingpong(text: str) -> RoundTrips:
    try:
        found = json.loads(text)
        return RoundTrips(
            int(found["count"]),
            int(found["lost"]),
            float(found["p50_us"]),
            float(found["p99_us"]),
            float(found["cpu_us"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramError(f"pingpong said {text[:200]!r}: {error}") from error


def moved(text: str) -> Moved:
    """The output of `stream`, `memload` or `processes`."""
    try:
        found = json.loads(text)
        count = found["bytes"] if "bytes" in found else found["count"]
        requests = "p50_us" in found
        latency = Latency(float(found["p50_us"]), float(found["p99_us"])) if requests else None
        return Moved(int(count), float(found["seconds"]), float(found["cpu_us"]), latency)
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramError(f"the load program said {text[:200]!r}: {error}") from error


def iperf3(text: str) -> Transfer:
    """The receiver's figures: the sender's include bytes that are still in buffers."""
    try:
        found = json.loads(text)
        if "error" in found:
            raise ProgramError(f"iperf3: {found['error']}")
        received = found["end"]["sum_received"]
        return Transfer(float(received["bits_per_second"]), int(received["bytes"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramError(f"iperf3 said {text[:200]!r}: {error!r}") from error


def redis_benchmark(text: str) -> float:
    """Requests/s from `--csv`: a line with the test's name and the rate, both in quotes."""
    for line in text.splitlines():
        cells = [cell.strip().strip('"') for cell in line.split(",")]
        if len(cells) >= 2 and re.fullmatch(r"\d+(\.\d+)?", cells[1]):
            return float(cells[1])
    raise ProgramError(f"redis-benchmark gave no rate: {text[:200]!r}")


def redis_latency(text: str) -> Latency | None:
    """Latencies from `--csv`, which older versions of redis-benchmark don't print."""
    rows = list(csv.reader(text.splitlines()))
    for head, values in pairwise(rows):
        if {"p50_latency_ms", "p99_latency_ms"} <= set(head) and len(values) == len(head):
            found = dict(zip(head, values, strict=True))
            try:
                p50, p99 = float(found["p50_latency_ms"]), float(found["p99_latency_ms"])
            except ValueError as error:
                raise ProgramError(f"redis-benchmark's latencies: {text[:200]!r}") from error
            return Latency(p50 * 1000, p99 * 1000)
    return None


def wrk(text: str) -> float:
    """Requests/s. Responses other than 2xx and failed connections are errors."""
    bad = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    if bad:
        raise ProgramError(f"wrk: {bad[1]} responses other than 2xx: is it our server?")
    errors = re.search(
        r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text
    )
    if errors and any(int(n) for n in errors.groups()):
        raise ProgramError(f"wrk: {errors[0]}")
    rate = re.search(r"Requests/sec:\s*([\d.]+)", text)
    if not rate:
        raise ProgramError(f"wrk gave no rate: {text[:200]!r}")
    return float(rate[1])


def wrk_requests(text: str) -> int:
    """The number of answered requests."""
    found = re.search(r"^\s*(\d+) requests in ", text, re.MULTILINE)
    if not found:
        raise ProgramError(f"wrk gave no count: {text[:200]!r}")
    return int(found[1])


def wrk_latency(text: str) -> Latency:
    """Latencies from `--latency`. Raises `ProgramError` if there are none."""
    found = []
    for percent in (50, 99):
        line = re.search(rf"^\s+{percent}%\s+([\d.]+)(us|ms|s|m)$", text, re.MULTILINE)
        if not line:
            raise ProgramError(f"wrk gave no latency: {text[:300]!r}")
        found.append(float(line[1]) * {"us": 1, "ms": 1e3, "s": 1e6, "m": 6e7}[line[2]])
    return Latency(*found)


def pgbench(text: str) -> Transactions:
    """Transactions/s, without the time of connecting unless pgbench reconnects.

    Raises:
        ProgramError: a transaction failed, or the output is unknown.
    """
    failed = re.search(r"number of failed transactions: (\d+)", text)
    if failed and int(failed[1]):
        raise ProgramError(f"pgbench: {failed[0]}")
    count = re.search(r"number of transactions actually processed: (\d+)", text)
    rate = re.search(r"^tps = ([\d.]+) \((?:without initial|including reconn)", text, re.MULTILINE)
    if not count or not rate:
        raise ProgramError(f"pgbench gave no rate: {text[:300]!r}")
    return Transactions(int(count[1]), float(rate[1]))


def paths(text: str) -> Paths:
    """Parse the library's counters: one line of JSON per process."""
    try:
        lines = [json.loads(line) for line in text.splitlines()]
        return Paths(
            sum(int(line["tracked"]) for line in lines),
            sum(int(line["receivers"]) + int(line["senders"]) for line in lines),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramError(f"the library's counters say {text[:200]!r}: {error!r}") from error


def busy_ticks(stat: str) -> int:
    """Busy ticks of all cores from /proc/stat: user to softirq, without idle and iowait.

    Softirq time counts, since processes are not charged for all of the network's work.
    """
    user, nice, system, _idle, _iowait, irq, softirq, _stolen = _all_cores(stat)
    return user + nice + system + irq + softirq


def stolen_ticks(stat: str) -> int:
    """Ticks of all cores that the hypervisor gave to other virtual machines, from /proc/stat."""
    return _all_cores(stat)[-1]


def _all_cores(stat: str) -> list[int]:
    """The first eight counters of /proc/stat, in the order of proc(5), summed over all cores."""
    first = stat.split("\n", 1)[0].split()
    if first[:1] != ["cpu"] or len(first) < 9:
        raise ProgramError(f"/proc/stat begins with {first!r}, not with the sum of all cores")
    return [int(number) for number in first[1:9]]
