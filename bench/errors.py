"""Errors of measurements. Each message names the object, the cause and the next step."""

from __future__ import annotations


class BenchError(Exception):
    """A measurement has failed. A figure that cannot be trusted is an error, too."""


class ProgramError(BenchError):
    """A load program failed, or printed something unexpected."""


class EngineRefusedError(BenchError):
    """A Docker engine answered with an error."""

    def __init__(self, status: int, what: str, message: str) -> None:
        super().__init__(f"Docker answered {status} to {what}: {message}")
        self.status = status
