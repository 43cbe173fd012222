"""The results of a run as values; `freeflow test --json` writes them field by field.

A field may be added, but never renamed or given another unit.
"""

from __future__ import annotations

import enum

import msgspec


class CheckOutcome(enum.StrEnum):
    """Of one check. `not here`: this Swarm does not have what it checks."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_HERE = "not here"


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """One check of a host, or of two. `detail` says what was seen, or why it is not here."""

    check: str
    subject: str
    outcome: CheckOutcome
    detail: str = ""
    remedy: str = ""
    seconds: float = 0.0


class PairMeasurement(msgspec.Struct, frozen=True, kw_only=True):
    """From a container of one host to one of another host, over one TCP connection."""

    source: str
    target: str
    bits_per_second: float
    round_trip_ms: float
    """Median of round trips of 64 bytes,"""
    round_trip_p99_ms: float
    """and their 99th percentile."""


class NetworkReport(msgspec.Struct, frozen=True, kw_only=True):
    """A run. `error`: why it did not end; `left`: what could not be removed."""

    version: str
    started: str
    seconds: float
    network: str
    driver: str
    hosts: list[str]
    checks: list[CheckResult]
    measurements: list[PairMeasurement] = []
    error: str = ""
    remedy: str = ""
    left: list[str] = []

    @property
    def failed(self) -> list[CheckResult]:
        return [each for each in self.checks if each.outcome == CheckOutcome.FAILED]

    @property
    def code(self) -> int:
        """The exit code: 0 all is well, 1 a check failed, 2 the run did not end."""
        if self.error:
            return 2
        return 1 if self.failed or self.left else 0
