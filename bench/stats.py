"""Statistics: makes one row per case from samples, with medians, spreads and ratios.

A subject without samples has the figure None, never 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypedDict

from bench.latency import Latency

FREEFLOW: Final = "freeflow"
OVERLAY: Final = "overlay"
HOST: Final = "host"
SUBJECTS: Final = (FREEFLOW, OVERLAY, HOST)
FREEFLOW_PLAIN: Final = "freeflow_plain"
"""Without the library."""
FREEFLOW_OFF: Final = "freeflow_off"
"""With the library, on a network without the relay: overlay and fast path."""
FREEFLOW_DIRECT: Final = "freeflow_direct"
"""With the library, on a network whose peers map each other's registered memory."""
AF_UNIX: Final = "af_unix"
RING: Final = "ring"
"""A bare ring in shared memory."""
MEMCPY: Final = "memcpy"
"""One core that copies bytes."""
LOCAL_SUBJECTS: Final = (FREEFLOW, FREEFLOW_PLAIN, OVERLAY, HOST, AF_UNIX, RING)
CROSS_SUBJECTS: Final = (FREEFLOW, FREEFLOW_OFF, OVERLAY, HOST)
VERBS_SUBJECTS: Final = (FREEFLOW, FREEFLOW_DIRECT, OVERLAY)

Samples = Mapping[str, Sequence[float]]
"""Subject to one figure per run."""


@dataclass(frozen=True, slots=True)
class Case:
    """A case: its name, unit and description, and whether more or less is better."""

    name: str
    unit: str
    more_is_better: bool
    about: str


class Row(TypedDict):
    """One case as `--json` prints it. `spread` is the largest IQR / median of its subjects."""

    unit: str
    better: str
    about: str
    freeflow: float | None
    overlay: float | None
    host: float | None
    ratio_to_overlay: float | None
    ratio_to_host: float | None
    spread: float | None
    spread_of: dict[str, float | None]
    runs: int


class CostRow(Row):
    """A row with CPU time per unit of work, and latencies of requests, by subject."""

    cpu: dict[str, float]
    cpu_unit: str | None
    cpu_ratio_to_overlay: float | None
    p50_us: dict[str, float]
    p99_us: dict[str, float]
    samples: dict[str, list[float]]
    failed: dict[str, str]


class LocalRow(CostRow):
    """A row of the suite `same-host`. `upgraded` is a share of freeflow's connections."""

    freeflow_plain: float | None
    af_unix: float | None
    ring: float | None
    ratio_to_plain: float | None
    upgraded: float | None


class CrossRow(CostRow):
    """A row of the suite `cross-host`; CPU time is that of both hosts.

    `connections_in_relay` is freeflow's median of all runs, of `connections`; None: not listed.
    `paths` are those of its last run. `foreign` is the share of the machine that others used, the
    median of each subject's runs.
    """

    freeflow_off: float | None
    ratio_to_off: float | None
    cpu_ratio_to_off: float | None
    cpu_ratio_to_host: float | None
    cpu_samples: dict[str, list[float]]
    connections: int
    connections_in_relay: float | None
    paths: dict[str, int]
    foreign: dict[str, float]


class VerbsRow(CostRow):
    """A row of the suite `verbs`; CPU time is that of both hosts.

    `met` and `direct_met` say whether `freeflow` and `freeflow_direct` reach the goal; None: there
    is no figure. `foreign` is as in `CrossRow`.
    """

    freeflow_direct: float | None
    memcpy: float | None
    direct_to_overlay: float | None
    ratio_to_memcpy: float | None
    direct_to_memcpy: float | None
    cpu_direct_to_overlay: float | None
    foreign: dict[str, float]
    goal: str
    met: bool | None
    direct_met: bool | None


@dataclass(slots=True)
class Measured:
    """All runs of a case: figures, CPU time per unit in microseconds, and latencies, by subject."""

    case: Case
    cpu_of: str | None = None
    figures: dict[str, list[float]] = field(default_factory=dict)
    cpu_us: dict[str, list[float]] = field(default_factory=dict)
    latencies: dict[str, list[Latency]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def keep(
        self, subject: str, figure: float, cpu_us: float | None, latency: Latency | None
    ) -> None:
        """Add a run."""
        self.figures.setdefault(subject, []).append(figure)
        if cpu_us is not None:
            self.cpu_us.setdefault(subject, []).append(cpu_us)
        if latency is not None:
            self.latencies.setdefault(subject, []).append(latency)

    def cost_row(self) -> CostRow:
        """The row, with medians of all runs."""
        cpu = medians(self.cpu_us)
        p50 = {name: [one.p50_us for one in some] for name, some in self.latencies.items()}
        p99 = {name: [one.p99_us for one in some] for name, some in self.latencies.items()}
        return CostRow(
            **row(self.case, self.figures),
            cpu=cpu,
            cpu_unit=f"us/{self.cpu_of}" if self.cpu_of else None,
            cpu_ratio_to_overlay=ratio(cpu.get(FREEFLOW), cpu.get(OVERLAY)),
            p50_us=medians(p50),
            p99_us=medians(p99),
            samples={name: list(some) for name, some in self.figures.items()},
            failed=dict(self.failed),
        )


def percentile(samples: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile, which is always one of the samples."""
    if not samples:
        raise ValueError("no samples")
    rank = math.ceil(percent / 100 * len(samples))
    return sorted(samples)[max(rank, 1) - 1]


def spread(samples: Sequence[float]) -> float | None:
    """Interquartile range over median; None with fewer than two samples or a median of 0."""
    if len(samples) < 2:
        return None
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle if middle else None


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def row(case: Case, samples: Samples, percent: float = 50) -> Row:
    """The row of a case. `percent` is not 50 if the case itself is a percentile of all runs."""
    figure: dict[str, float | None] = {}
    for subject in SUBJECTS:
        values = samples.get(subject) or ()
        if not values:
            figure[subject] = None
        elif percent == 50:
            figure[subject] = statistics.median(values)
        else:
            figure[subject] = percentile(values, percent)
    spreads = {subject: spread(samples.get(subject) or ()) for subject in SUBJECTS}
    known = [value for value in spreads.values() if value is not None]
    return Row(
        unit=case.unit,
        better="more" if case.more_is_better else "less",
        about=case.about,
        freeflow=figure[FREEFLOW],
        overlay=figure[OVERLAY],
        host=figure[HOST],
        ratio_to_overlay=ratio(figure[FREEFLOW], figure[OVERLAY]),
        ratio_to_host=ratio(figure[FREEFLOW], figure[HOST]),
        spread=max(known) if known else None,
        spread_of=spreads,
        runs=max((len(values) for values in samples.values()), default=0),
    )


def medians(samples: Samples) -> dict[str, float]:
    """The median of each subject that has samples."""
    return {name: statistics.median(some) for name, some in samples.items() if some}


def local_row(measured: Measured, upgraded: float | None) -> LocalRow:
    """The row of a case, with the additional subjects of `same-host`."""
    made = measured.cost_row()
    middle = medians(measured.figures)
    return LocalRow(
        **made,
        freeflow_plain=middle.get(FREEFLOW_PLAIN),
        af_unix=middle.get(AF_UNIX),
        ring=middle.get(RING),
        ratio_to_plain=ratio(made["freeflow"], middle.get(FREEFLOW_PLAIN)),
        upgraded=upgraded,
    )


def cross_row(
    measured: Measured,
    connections: int,
    in_relay: Sequence[int],
    paths: Mapping[str, int],
    foreign: Samples,
) -> CrossRow:
    """The row of a case, with the additional subject of `cross-host`."""
    made = measured.cost_row()
    off = medians(measured.figures).get(FREEFLOW_OFF)
    cpu = made["cpu"]
    made["spread_of"][FREEFLOW_OFF] = spread(measured.figures.get(FREEFLOW_OFF) or ())
    known = [value for value in made["spread_of"].values() if value is not None]
    made["spread"] = max(known) if known else None
    return CrossRow(
        **made,
        freeflow_off=off,
        ratio_to_off=ratio(made["freeflow"], off),
        cpu_ratio_to_off=ratio(cpu.get(FREEFLOW), cpu.get(FREEFLOW_OFF)),
        cpu_ratio_to_host=ratio(cpu.get(FREEFLOW), cpu.get(HOST)),
        cpu_samples={name: list(some) for name, some in measured.cpu_us.items()},
        connections=connections,
        connections_in_relay=statistics.median(in_relay) if in_relay else None,
        paths=dict(paths),
        foreign=medians(foreign),
    )


def verbs_row(measured: Measured, goal: str, foreign: Samples) -> VerbsRow:
    """The row of a case, with the limit that memory sets; the caller sets `met`."""
    made = measured.cost_row()
    middle = medians(measured.figures)
    direct, copied = middle.get(FREEFLOW_DIRECT), middle.get(MEMCPY)
    for subject in (FREEFLOW_DIRECT, MEMCPY):
        made["spread_of"][subject] = spread(measured.figures.get(subject) or ())
    known = [value for value in made["spread_of"].values() if value is not None]
    made["spread"] = max(known) if known else None
    return VerbsRow(
        **made,
        freeflow_direct=direct,
        memcpy=copied,
        direct_to_overlay=ratio(direct, made["overlay"]),
        ratio_to_memcpy=ratio(made["freeflow"], copied),
        direct_to_memcpy=ratio(direct, copied),
        cpu_direct_to_overlay=ratio(made["cpu"].get(FREEFLOW_DIRECT), made["cpu"].get(OVERLAY)),
        foreign=medians(foreign),
        goal=goal,
        met=None,
        direct_met=None,
    )
