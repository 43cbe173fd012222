"""What the load programs print, read strictly: an unknown or partly failed answer is an error, not a figure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from bench.errors import ProgramError


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """What `pingpong` saw; `cpu_us` is what its own loop used."""

    count: int
    lost: int
    p50_us: float
    p99_us: float
    cpu_us: float


@dataclass(frozen=True, slots=True)
class Moved:
    """What `stream`, `memload` and `processes` did: bytes, requests or processes, in what time, with how much CPU time of their own."""

    count: int
    seconds: float
    cpu_us: float


@dataclass(frozen=True, slots=True)
class Transactions:
    """What pgbench did."""

    count: int
    rate: float


@dataclass(frozen=True, slots=True)
class Paths:
    """What the library counted in a program: TCP connections, and directions of them that went to a ring."""

    connections: int
    directions: int

    def share(self, aside: int = 0) -> float | None:
        """Of the connections, those that were upgraded; a direction counts half.

        `aside` are connections that carry no load: those that a load program makes to look around.
        """
        if not self.connections:
            return None
        return min(1.0, self.directions / (2 * max(1, self.connections - aside)))


@dataclass(frozen=True, slots=True)
class Transfer:
    """What iperf3's receiver saw."""

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
        return Moved(int(count), float(found["seconds"]), float(found["cpu_us"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramError(f"the load program said {text[:200]!r}: {error}") from error


def iperf3(text: str) -> Transfer:
    """The receiver's figures: what the sender put into its buffers hasn't arrived."""
    try:
        found = json.loads(text)
        if "error" in found:
            raise ProgramError(f"iperf3: {found['error']}")
        received = found["end"]["sum_received"]
        return Transfer(float(received["bits_per_second"]), int(received["bytes"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramError(f"iperf3 said {text[:200]!r}: {error!r}") from error


def redis_benchmark(text: str) -> float:
    """Requests/s from `--csv`: a line of the test's name in quotes, then the rate in quotes."""
    for line in text.splitlines():
        cells = [cell.strip().strip('"') for cell in line.split(",")]
        if len(cells) >= 2 and re.fullmatch(r"\d+(\.\d+)?", cells[1]):
            return float(cells[1])
    raise ProgramError(f"redis-benchmark gave no rate: {text[:200]!r}")


def wrk(text: str) -> float:
    """Requests/s; responses other than 2xx and connections that failed make the run worthless."""
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
    """How many requests were answered."""
    found = re.search(r"^\s*(\d+) requests in ", text, re.MULTILINE)
    if not found:
        raise ProgramError(f"wrk gave no count: {text[:200]!r}")
    return int(found[1])


def pgbench(text: str) -> Transactions:
    """Transactions/s without the first connections, or with all if it reconnects; a failed one spoils the run."""
    failed = re.search(r"number of failed transactions: (\d+)", text)
    if failed and int(failed[1]):
        raise ProgramError(f"pgbench: {failed[0]}")
    count = re.search(r"number of transactions actually processed: (\d+)", text)
    rate = re.search(r"^tps = ([\d.]+) \((?:without initial|including reconn)", text, re.MULTILINE)
    if not count or not rate:
        raise ProgramError(f"pgbench gave no rate: {text[:300]!r}")
    return Transactions(int(count[1]), float(rate[1]))


def paths(text: str) -> Paths:
    """The library's counters, a line of JSON for each process."""
    try:
        lines = [json.loads(line) for line in text.splitlines()]
        return Paths(
            sum(int(line["tracked"]) for line in lines),
            sum(int(line["receivers"]) + int(line["senders"]) for line in lines),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramError(f"the library's counters say {text[:200]!r}: {error!r}") from error


def busy_ticks(stat: str) -> int:
    """Ticks that all cores together were busy, from /proc/stat: user to softirq without idle and iowait.

    Time in softirq is in it, wherever it ran: the network's work isn't all in the processes' own accounts.
    """
    first = stat.split("\n", 1)[0].split()
    if first[:1] != ["cpu"] or len(first) < 8:
        raise ProgramError(f"/proc/stat begins with {first!r}, not with the sum of all cores")
    user, nice, system, _idle, _iowait, irq, softirq = (int(n) for n in first[1:8])
    return user + nice + system + irq + softirq
