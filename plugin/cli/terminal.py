"""Output to the terminal. Names come from containers, images, stacks and other hosts.

They may hold anything. `shown` is for one name or sentence, `shown_all` for all texts in a value:
characters that aren't printable are replaced by their escapes, so that they can't move the cursor,
change colours, or look like another line. All output of a command goes through `say`, which does
the same for each line.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar, cast

import click
import msgspec

T = TypeVar("T")

_CONTROLS: Final = re.compile(r"[^ -~]")


def shown(text: object) -> str:
    """One line without control characters, zero-width characters or changes of direction."""
    return _CONTROLS.sub(lambda found: _escaped(found[0]), str(text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def shown_all(value: T) -> T:
    """The value with each text as in `shown`."""
    return cast("T", _all(value))


def _all(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        fields = {name: _all(getattr(value, name)) for name in value.__struct_fields__}
        return msgspec.structs.replace(value, **fields)
    if isinstance(value, dict):
        return {_all(name): _all(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_all, value))
    return shown(value) if isinstance(value, str) else value


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
