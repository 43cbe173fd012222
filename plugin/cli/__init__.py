"""The `freeflow` command. No argument means `status`. Each command is a module; read on in `commands.py`."""

from __future__ import annotations


def main() -> None:
    """Entry point."""
    from plugin.cli.commands import cli

    cli(prog_name="freeflow")
