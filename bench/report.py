"""Output as JSON and as a table, with the same rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Final, TypedDict, TypeGuard

from bench.machine import Machine
from bench.stats import FREEFLOW, OVERLAY, CrossRow, LocalRow, Row, VerbsRow

HEADER = ("case", "unit", "freeflow", "overlay", "host", "to overlay", "to host", "spread", "runs")


LOCAL_HEADER = (
    *("case", "unit", "freeflow", "plain", "overlay", "host", "af_unix", "ring"),
    *("to overlay", "to plain", "cpu to overlay", "p50 us", "p99 us", "upgraded", "spread", "runs"),
)
CROSS_HEADER = (
    *("case", "unit", "freeflow", "off", "overlay", "host", "to overlay", "to off", "to host"),
    *("cpu to overlay", "cpu to off", "cpu to host", "p50 us", "p99 us"),
    *("connections_in_relay", "foreign", "spread", "runs"),
)
VERBS_HEADER = (
    *("case", "unit", "freeflow", "direct", "overlay", "memcpy", "to overlay", "direct to overlay"),
    *("to memcpy", "direct to memcpy", "cpu to overlay", "direct cpu to overlay", "foreign"),
    *("spread", "runs", "met", "direct met", "goal"),
)
FEW: Final = 3
"""With fewer rounds than this a median means nothing."""


class BenchReport(TypedDict):
    machine: Machine
    results: Mapping[str, Row | LocalRow | CrossRow | VerbsRow]


def as_json(report: BenchReport) -> str:
    return json.dumps(report, indent=2) + "\n"


def number(value: float | None) -> str:
    """At most four significant digits; a dash for no figure."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def times(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}x" if value >= 0.1 or value == 0 else f"{value:.2g}x"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.0f}%"


def lines(rows: Mapping[str, Row]) -> list[tuple[str, ...]]:
    return [
        (
            *_named(name, row),
            number(row["freeflow"]),
            number(row["overlay"]),
            number(row["host"]),
            times(row["ratio_to_overlay"]),
            times(row["ratio_to_host"]),
            percent(row["spread"]),
            str(row["runs"]),
        )
        for name, row in rows.items()
    ]


def local_lines(rows: Mapping[str, LocalRow]) -> list[tuple[str, ...]]:
    return [
        (
            *_named(name, row),
            number(row["freeflow"]),
            number(row["freeflow_plain"]),
            number(row["overlay"]),
            number(row["host"]),
            number(row["af_unix"]),
            number(row["ring"]),
            times(row["ratio_to_overlay"]),
            times(row["ratio_to_plain"]),
            times(row["cpu_ratio_to_overlay"]),
            _beside(row["p50_us"]),
            _beside(row["p99_us"]),
            percent(row["upgraded"]),
            percent(row["spread"]),
            str(row["runs"]),
        )
        for name, row in rows.items()
    ]


def cross_lines(rows: Mapping[str, CrossRow]) -> list[tuple[str, ...]]:
    return [
        (
            *_named(name, row),
            number(row["freeflow"]),
            number(row["freeflow_off"]),
            number(row["overlay"]),
            number(row["host"]),
            times(row["ratio_to_overlay"]),
            times(row["ratio_to_off"]),
            times(row["ratio_to_host"]),
            times(row["cpu_ratio_to_overlay"]),
            times(row["cpu_ratio_to_off"]),
            times(row["cpu_ratio_to_host"]),
            _beside(row["p50_us"]),
            _beside(row["p99_us"]),
            f"{number(row['connections_in_relay'])}/{row['connections']}",
            percent(max(row["foreign"].values(), default=None)),
            percent(row["spread"]),
            str(row["runs"]),
        )
        for name, row in rows.items()
    ]


def verbs_lines(rows: Mapping[str, VerbsRow]) -> list[tuple[str, ...]]:
    return [
        (
            *_named(name, row),
            number(row["freeflow"]),
            number(row["freeflow_direct"]),
            number(row["overlay"]),
            number(row["memcpy"]),
            times(row["ratio_to_overlay"]),
            times(row["direct_to_overlay"]),
            times(row["ratio_to_memcpy"]),
            times(row["direct_to_memcpy"]),
            times(row["cpu_ratio_to_overlay"]),
            times(row["cpu_direct_to_overlay"]),
            percent(max(row["foreign"].values(), default=None)),
            percent(row["spread"]),
            str(row["runs"]),
            verdict(row["met"]),
            verdict(row["direct_met"]),
            row["goal"],
        )
        for name, row in rows.items()
    ]


def verdict(met: bool | None) -> str:
    """Whether a goal is met."""
    return "-" if met is None else "yes" if met else "NO"


def _beside(latency: Mapping[str, float]) -> str:
    """freeflow's latency, and overlay's behind a stroke."""
    if FREEFLOW not in latency and OVERLAY not in latency:
        return "-"
    return f"{number(latency.get(FREEFLOW))}/{number(latency.get(OVERLAY))}"


def _named(name: str, row: Row) -> tuple[str, str]:
    return name, row["unit"] + (" (less is better)" if row["better"] == "less" else "")


def is_local(row: Row | LocalRow | CrossRow) -> TypeGuard[LocalRow]:
    return "freeflow_plain" in row


def is_cross(row: Row | LocalRow | CrossRow) -> TypeGuard[CrossRow]:
    return "connections_in_relay" in row


def is_verbs(row: Row | LocalRow | CrossRow | VerbsRow) -> TypeGuard[VerbsRow]:
    return "ratio_to_memcpy" in row


def columns(
    header: tuple[str, ...],
    body: Sequence[tuple[str, ...]],
    left: int = 2,
    at_least: Sequence[int] = (),
) -> str:
    """An aligned table: the first `left` columns to the left, the others to the right.

    `at_least` has the minimum width of each column.
    """
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    widths = [max(pair) for pair in zip_longest(widths, at_least, fillvalue=0)]

    def line(cells: tuple[str, ...]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *(line(cells) for cells in body)]) + "\n"


CROSS_NOTES = (
    "cross-host: off is freeflow on a network without the relay. CPU is that of both hosts per unit\n"
    "of work: all processes, routers and relays included, with the kernel's work in their context,\n"
    "and ksoftirqd. p50 and p99 are of freeflow / overlay. connections_in_relay is freeflow's number\n"
    "of connections that both routers list as relay, of all; foreign is the share of the machine\n"
    "that others used, of the worst subject.\n"
)


def as_table(report: BenchReport) -> str:
    machine = report["machine"]
    about = (
        f"{machine['cores']} x {machine['cpu']}, Linux {machine['kernel']}, {machine['when']}\n"
        f"engines: {', '.join(machine['engines']) or 'none'}; "
        f"load before: {machine['load']:.2f}; TCP {machine['congestion_control']}\n"
        "Medians; spread is IQR / median, the widest of the subjects. Ratios: freeflow / other.\n"
    )
    rows = report["results"]
    local = {name: row for name, row in rows.items() if is_local(row)}
    cross = {name: row for name, row in rows.items() if is_cross(row)}
    verbs = {name: row for name, row in rows.items() if is_verbs(row)}
    others = {name: row for name, row in rows.items() if name not in {*local, *cross, *verbs}}
    if any(0 < row["runs"] < FEW for row in rows.values()):
        about += f"FEW ROUNDS: rows with fewer than {FEW} runs only show that the cases work.\n"
    about += CROSS_NOTES if cross else ""
    about += "".join(f"no {name}: {why}\n" for name, why in machine["absent"].items())
    tables = [columns(LOCAL_HEADER, local_lines(local))] if local else []
    tables += [columns(CROSS_HEADER, cross_lines(cross))] if cross else []
    tables += [columns(VERBS_HEADER, verbs_lines(verbs))] if verbs else []
    tables += [columns(HEADER, lines(others))] if others else []
    notes = "".join(f"{name}: {row['about']}\n" for name, row in rows.items())
    failed = "".join(
        f"failed: {name} on {subject}: {why}\n"
        for some in (local, cross, verbs)
        for name, row in some.items()
        for subject, why in row["failed"].items()
    )
    return "\n".join([about, *tables, notes + failed])
