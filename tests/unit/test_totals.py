"""Sums over endpoints that come and go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from plugin.totals import Counts, Totals


def test_sums_outlive_endpoints() -> None:
    """The counts of a deleted endpoint stay in its network's sum."""
    totals = Totals(2)
    assert totals.update({"n": {"a": (100, 1), "b": (10, 1)}}) == {"n": (110, 2)}
    assert totals.update({"n": {"b": (15, 1)}}) == {"n": (115, 2)}
    assert totals.update({"n": {}}) == {"n": (115, 2)}
    assert totals.update({"n": {"a": (7, 0)}}) == {"n": (122, 2)}


def test_a_link_made_anew() -> None:
    """Counters that restart at zero add their value, and reduce no sum."""
    totals = Totals(1)
    totals.update({"n": {"a": (100,)}})
    assert totals.update({"n": {"a": (5,)}}) == {"n": (105,)}


def test_counters_that_cannot_be_read() -> None:
    """An endpoint whose counters can't be read for a while isn't counted twice afterwards."""
    totals = Totals(1)
    totals.update({"n": {"a": (100,)}})
    assert totals.update({"n": {"a": None}}) == {"n": (100,)}
    assert totals.update({"n": {"a": (101,)}}) == {"n": (101,)}


def test_networks_are_apart_and_forgotten() -> None:
    """Each network has its own sum, and a deleted one starts again at zero."""
    totals = Totals(1)
    assert totals.update({"m": {"a": (1,)}, "n": {"b": (2,)}}) == {"m": (1,), "n": (2,)}
    assert totals.update({"n": {"b": (2,)}}) == {"n": (2,)}
    assert totals.update({"m": {}, "n": {"b": (3,)}}) == {"m": (0,), "n": (3,)}


looks = st.lists(
    st.dictionaries(
        st.sampled_from("abc"), st.none() | st.tuples(st.integers(0, 50), st.integers(0, 50))
    ),
    max_size=12,
)


@given(looks)
def test_sums_never_fall(rounds: list[dict[str, Counts | None]]) -> None:
    """A network's sums never fall, whatever the kernel counts."""
    totals = Totals(2)
    before: Counts = (0, 0)
    for endpoints in rounds:
        after = totals.update({"n": endpoints})["n"]
        assert all(new >= old for new, old in zip(after, before, strict=True))
        before = after
