"""What a run of `freeflow test` checks, and who with whom."""

from __future__ import annotations

import itertools

import pytest

from plugin.network_test.plan import Check, TestPlan, rounds


@pytest.mark.parametrize("count", range(9))
def test_every_pair_once_and_nobody_twice_in_a_round(count: int) -> None:
    """Each two hosts meet once, each host meets itself, and no host is in two pairs at once."""
    hosts = list(range(count))
    found = rounds(hosts)
    pairs = [tuple(sorted(pair)) for some in found for pair in some]
    wanted = list(itertools.combinations_with_replacement(hosts, 2))
    assert sorted(pairs) == wanted
    for some in found:
        busy = [host for pair in some for host in set(pair)]
        assert len(busy) == len(set(busy))


def test_options_leave_checks_out() -> None:
    """--quick leaves out what takes long, --perf all but the measurements; both remove what they
    have made.
    """
    quick = {check for check in Check if TestPlan(quick=True).has(check)}
    assert Check.MEASURE not in quick
    assert {Check.DNS, Check.VIP, Check.MTU, Check.SHM, Check.CLEANUP} <= quick
    perf = {check for check in Check if TestPlan(perf=True).has(check)}
    assert perf == {Check.PROBE, Check.REACH, Check.MEASURE, Check.CLEANUP}
    assert all(TestPlan().has(check) for check in Check)
