"""The `freeflow` command; without an argument it means `status`. Read on in `commands.py`."""

from __future__ import annotations


def main() -> None:
    """Entry point."""
    from plugin.cli.commands import cli

    cli(prog_name="freeflow")
