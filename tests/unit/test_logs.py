"""The log: one event per line, in JSON, on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import structlog

from plugin import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Restores the logging of other tests."""
    yield
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def test_event_with_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """An event is one line of JSON with level and fields; line breaks and umlauts are kept."""
    logs.configure("info")
    structlog.get_logger().warning("network created", network="n", reason="zwei\nZeilen, größer")
    (line,) = lines(capsys)
    assert json.loads(line) == {
        "event": "network created",
        "level": "warning",
        "network": "n",
        "reason": "zwei\nZeilen, größer",
    }


@pytest.mark.parametrize(
    ("level", "said"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
def test_level(capsys: pytest.CaptureFixture[str], level: str, said: int) -> None:
    """LOG_LEVEL is the least level that is logged."""
    logs.configure(level)
    log = structlog.get_logger()
    for method in (log.debug, log.info, log.warning, log.error):
        method("event")
    assert len(lines(capsys)) == said


def test_long_fields_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """No line is so long that dockerd splits it, whatever a caller sent."""
    logs.configure("info")
    structlog.get_logger().info("request refused", reason="x" * 1_000_000, path="y" * 1_000_000)
    (line,) = lines(capsys)
    assert len(line.encode()) < 64 * 1024
    assert json.loads(line)["reason"].endswith("…")


def test_exceptions_have_their_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """A bug is logged with its traceback, on one line."""
    logs.configure("info")
    try:
        raise ZeroDivisionError
    except ZeroDivisionError as error:
        structlog.get_logger().exception("a bug in FreeFlow", exc_info=error)
    (line,) = lines(capsys)
    assert "test_logs.py" in json.loads(line)["exception"]
