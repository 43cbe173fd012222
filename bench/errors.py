"""What can go wrong with a measurement. Each message names the object, the cause and the next step."""

from __future__ import annotations


class BenchError(Exception):
    """No figure came out; a figure that isn't trustworthy is an error too."""


class ProgramError(BenchError):
    """A load program failed or said something that its parser doesn't know."""


class EngineRefusedError(BenchError):
    """A Docker engine answered with an error."""

    def __init__(self, status: int, what: str, message: str) -> None:
        super().__init__(f"Docker answered {status} to {what}: {message}")
        self.status = status
