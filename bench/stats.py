"""Statistics: makes one row per case from samples, with medians, spreads and ratios.

A subject without samples has the figure None, never 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypedDict

FREEFLOW: Final = "freeflow"
OVERLAY: Final = "overlay"
HOST: Final = "host"
SUBJECTS: Final = (FREEFLOW, OVERLAY, HOST)
FREEFLOW_PLAIN: Final = "freeflow_plain"
"""Without the library."""
AF_UNIX: Final = "af_unix"
RING: Final = "ring"
"""A bare ring in shared memory."""
LOCAL_SUBJECTS: Final = (FREEFLOW, FREEFLOW_PLAIN, OVERLAY, HOST, AF_UNIX, RING)

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


class LocalRow(Row):
    """A row of the suite `same-host`. `upgraded` is a share of freeflow's connections."""

    freeflow_plain: float | None
    af_unix: float | None
    ring: float | None
    ratio_to_plain: float | None
    cpu: dict[str, float]
    cpu_unit: str | None
    cpu_ratio_to_overlay: float | None
    upgraded: float | None
    samples: dict[str, list[float]]
    failed: dict[str, str]


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


def local_row(
    case: Case,
    samples: Samples,
    cpu: Mapping[str, float],
    cpu_unit: str | None,
    upgraded: float | None,
    failed: Mapping[str, str],
) -> LocalRow:
    """The row of a case, with the additional subjects of `same-host`."""
    made = row(case, samples)
    middle = {name: statistics.median(some) for name, some in samples.items() if some}
    return LocalRow(
        **made,
        freeflow_plain=middle.get(FREEFLOW_PLAIN),
        af_unix=middle.get(AF_UNIX),
        ring=middle.get(RING),
        ratio_to_plain=ratio(made["freeflow"], middle.get(FREEFLOW_PLAIN)),
        cpu=dict(cpu),
        cpu_unit=cpu_unit,
        cpu_ratio_to_overlay=ratio(cpu.get(FREEFLOW), cpu.get(OVERLAY)),
        upgraded=upgraded,
        samples={name: list(some) for name, some in samples.items()},
        failed=dict(failed),
    )
