"""What the load programs print, read strictly: an unknown or partly failed answer is an error, not a figure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from bench.errors import ProgramError


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """What `pingpong` saw."""

    count: int
    lost: int
    p50_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """What iperf3's receiver saw."""

    bits_per_second: float
    bytes: int


def pingpong(text: str) -> RoundTrips:
    try:
        found = json.loads(text)
        return RoundTrips(
            int(found["count"]), int(found["lost"]), float(found["p50_us"]), float(found["p99_us"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramError(f"pingpong said {text[:200]!r}: {error}") from error


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


def busy_ticks(stat: str) -> int:
    """Ticks that all cores together were busy, from /proc/stat: user to softirq without idle and iowait.

    Time in softirq is in it, wherever it ran: the network's work isn't all in the processes' own accounts.
    """
    first = stat.split("\n", 1)[0].split()
    if first[:1] != ["cpu"] or len(first) < 8:
        raise ProgramError(f"/proc/stat begins with {first!r}, not with the sum of all cores")
    user, nice, system, _idle, _iowait, irq, softirq = (int(n) for n in first[1:8])
    return user + nice + system + irq + softirq
