"""What reaches the terminal: names come from containers, images, stacks and other hosts, and may hold anything.

`shown` is for one name or sentence, `shown_all` for all in a value: whatever isn't printable stands there as Python writes it in
a string, so that it can't move the cursor, change colours, or pretend to be another line. All that a command prints goes through `say`, which does the
same to each line.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar, cast

import click
import msgspec

T = TypeVar("T")

_CONTROLS: Final = re.compile(r"[^ -~]")


def shown(text: object) -> str:
    """On one line, with nothing that a terminal obeys: no control, no character without a width, no change of direction."""
    return _CONTROLS.sub(lambda found: _escaped(found[0]), str(text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def shown_all(value: T) -> T:
    """A value whose every text is one that can be shown."""
    return cast("T", _all(value))


def _all(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        fields = {name: _all(getattr(value, name)) for name in value.__struct_fields__}
        return msgspec.structs.replace(value, **fields)
    if isinstance(value, dict):
        return {_all(name): _all(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_all, value))
    return shown(value) if isinstance(value, str) else value


def lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(shown, text.split("\n")))


def say(text: str, *, newline: bool = True, err: bool = False) -> None:
    """Print lines."""
    stream = click.get_text_stream("stderr" if err else "stdout")
    encoding = stream.encoding or "utf-8"
    # A terminal that can't show a letter gets its number.
    safe = lines(text).encode(encoding, "backslashreplace").decode(encoding)
    click.echo(safe, nl=newline, err=err)


def json_text(value: Any) -> str:
    """JSON, which is the same with a letter's number in the letter's place."""
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
