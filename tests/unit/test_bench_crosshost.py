"""The suite `cross-host`: its rows and its targets."""

from __future__ import annotations

import random
from ipaddress import IPv4Address
from pathlib import Path

from bench import crosshost, load
from bench.crosshost import LOCAL, TARGETS, CrossHost
from bench.load import Load
from bench.namespaces import Namespaces, Pair
from bench.stats import Case, row

PLACE = Namespaces(Path("/proc/1"), IPv4Address("192.0.2.1"))
FIGURES = {"freeflow": 30.0, "overlay": 20.0, "host": 60.0}
PAIRS = [Pair(subject, PLACE, PLACE) for subject in FIGURES]
LOADS = [
    Load("stream_1", lambda pair, seconds: {"stream_1": FIGURES[pair.subject]}),
    Load("tcp_rr", lambda pair, seconds: {"tcp_rr_one_core": FIGURES[pair.subject]}),
]


def suite(names: list[str], said: list[str], within: list[Pair]) -> CrossHost:
    return CrossHost(PAIRS, within, names, 3, 1.0, random.Random(1), said.append, loads=LOADS)


def test_both_places_have_rows() -> None:
    """A case has a row for two hosts and one for one host; unchosen cases have no figures."""
    said: list[str] = []
    picked = ["stream_1", LOCAL + "stream_1"]
    found = suite(picked, said, PAIRS[:2]).measure()
    assert found["stream_1"]["ratio_to_overlay"] == 1.5
    assert found["stream_1"]["ratio_to_host"] == 0.5
    assert found[LOCAL + "stream_1"]["ratio_to_overlay"] == 1.5
    assert found[LOCAL + "stream_1"]["host"] is None
    assert found["stream_1"]["runs"] == 3
    assert found["tcp_rr_one_core"]["freeflow"] is None
    assert "met: stream_1 1.50 (>= 1.35)" in said


def test_a_suite_of_another_path_adds_its_rows() -> None:
    """Additional suites add rows of their own at the end."""
    case = Case("relay", "us", False, "another path")
    made = suite(["stream_1"], [], [])
    made.more = [lambda: {"relay": row(case, {"freeflow": [1.0]})}]
    assert made.measure()["relay"]["freeflow"] == 1.0


def test_targets_are_judged() -> None:
    """A target is a minimum for rates and a maximum for times; no figure, no verdict."""
    fast = Case("stream_4", "Gbit/s", True, "")
    slow = Case("tcp_rr_one_core", "us", False, "")
    found = {
        "stream_4": row(fast, {"freeflow": [13.0], "overlay": [10.0]}),
        "tcp_rr_one_core": row(slow, {"freeflow": [7.0], "overlay": [10.0]}),
        "cpu_per_byte": row(load.CPU, {}),
    }
    assert crosshost.verdicts(found) == [
        "MISSED: stream_4 1.30 (>= 1.4)",
        "met: tcp_rr_one_core 0.70 (<= 0.78)",
    ]


def test_every_target_is_a_case() -> None:
    """Each target is for an existing case."""
    cases = {case.name for case in load.CASES}
    assert {name.removeprefix(LOCAL) for name in TARGETS} <= cases
    assert {name.removeprefix(LOCAL) for name in crosshost.names()} == {
        one.name for one in load.loads()
    }
