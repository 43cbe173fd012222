"""Output to the terminal. Names come from containers, images, stacks and other hosts.

They may hold anything: see `plugin/printable.py`. All output of a command goes through `say`, which
makes each line harmless.
"""

from __future__ import annotations

import re
from typing import Any

import click
import msgspec

from plugin.printable import shown, shown_all

__all__ = ("json_text", "lines", "say", "say_json", "shown", "shown_all")


def lines(text: str) -> str:
    """`shown` for each line of a text."""
    return "\n".join(map(shown, text.split("\n")))


def say(text: str, *, newline: bool = True, err: bool = False) -> None:
    """Print lines."""
    stream = click.get_text_stream("stderr" if err else "stdout")
    encoding = stream.encoding or "utf-8"
    # Characters that the terminal's encoding lacks become escapes.
    safe = lines(text).encode(encoding, "backslashreplace").decode(encoding)
    click.echo(safe, nl=newline, err=err)


def json_text(value: Any) -> str:
    """JSON in which characters that aren't printable are escaped."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    return re.sub(r"[^\n -~]", lambda found: _in_json(found[0]), text)


def say_json(value: Any) -> None:
    """Print JSON."""
    say(json_text(value))


def _in_json(character: str) -> str:
    if character.isprintable():
        return character
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))
