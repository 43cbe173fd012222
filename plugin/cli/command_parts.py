"""What commands have in common: exit codes, --json, and errors that say what to type."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Final, ParamSpec

import click

from driver.errors import FreeFlowError
from plugin.cli.client import NotRunning
from plugin.cli.terminal import say, say_json, shown
from plugin.status import explanation

P = ParamSpec("P")

PROBLEMS: Final = 1
UNUSABLE: Final = 2
"""Exit codes."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
image_option = click.option(
    "--image", metavar="IMAGE", default="", help="An image with python3, 3.9 or later."
)
registry_option = click.option(
    "--registry",
    metavar="HOST[:PORT]",
    default="",
    help="Push the probes' image to this registry, for the other hosts.",
)


def explained(
    *, problems: tuple[type[FreeFlowError], ...] = (), err: bool = False
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """A command whose errors end it with what failed, why, and what to type.

    The exit code is 1 after one of `problems`, otherwise 2. `err`: they go to stderr.
    """

    def decorate(command: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(command)
        def run(*args: P.args, **options: P.kwargs) -> None:
            try:
                command(*args, **options)
            except FreeFlowError as error:
                if options.get("as_json"):
                    say_json(explanation(error))
                else:
                    say(f"freeflow: {shown(error.reason)}", err=err)
                    if error.remedy:
                        say(f"    do: {shown(error.remedy)}", err=err)
                expected = isinstance(error, problems) and not isinstance(error, NotRunning)
                sys.exit(PROBLEMS if expected else UNUSABLE)

        return run

    return decorate


def say_value(value: Any, text: str, as_json: bool) -> None:
    """Print a value as JSON, or its text."""
    if as_json:
        say_json(value)
    else:
        say(text, newline=False)
