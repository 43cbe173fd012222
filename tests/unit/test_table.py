"""Tables, numbers and bars of the command."""

from __future__ import annotations

import pytest

from plugin.cli.table import bar, draws


@pytest.mark.parametrize(
    ("part", "fine", "plain"),
    [
        (1.0, "████", "####"),
        (0.5, "██", "##"),
        (0.53, "██▏", "##"),
        (0.001, "▏", "#"),
        (0.0, "", ""),
        (7.0, "████", "####"),
        (-1.0, "", ""),
    ],
)
def test_bars(part: float, fine: str, plain: str) -> None:
    """A bar is as long as its part of the width, never longer, and never empty but for nothing."""
    assert bar(part, 4) == fine
    assert bar(part, 4, plain=True) == plain


@pytest.mark.parametrize(
    ("encoding", "able"),
    [("utf-8", True), ("iso-8859-1", False), ("ascii", False), ("nonsense", False), (None, False)],
)
def test_terminals_with_bars(encoding: str | None, able: bool) -> None:
    """Only a terminal that has all characters of bars gets them."""
    assert draws(encoding) == able
