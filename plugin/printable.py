"""Texts that come from containers, images, stacks and other hosts, made harmless.

They may hold anything. `shown` is for one name or sentence, `shown_all` for all texts in a value:
characters that aren't printable are replaced by their escapes, so that they can't move the cursor,
change colours or the direction of the text, or look like another line.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar, cast

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
