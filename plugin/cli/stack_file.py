"""Reads a stack file as plain values, as Docker's reader takes it.

Only what `inject` needs is interpreted: null and booleans, and `<<`. Numbers and words such as `on`
stay as they are written, and tags are ignored.

A text may be hostile: its size, its depth and the number of values that its aliases stand for are
bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
)

from driver.errors import InvalidRequest

LONGEST: Final = 1 << 20
"""Characters of a text."""
DEEPEST: Final = 64
"""Nested values."""
MOST: Final = 100_000
"""Values, counted again at each alias. Docker's reader has a higher limit."""

_NULLS: Final = ("", "~", "null", "Null", "NULL")
_BOOLEANS: Final = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_MERGE: Final = "<<"


def read_stack(text: str, name: str) -> dict[str, Any]:
    """A stack's plain value, with a mapping `services`. `name` is the text's, for messages.

    Raises:
        InvalidRequest: it is no YAML, too large, or no stack.
    """
    if len(text) > LONGEST:
        raise InvalidRequest(
            f"{name} has more than {LONGEST >> 20} MiB, which no stack has",
            remedy="name the file given to docker stack deploy -c",
        )
    reader = _Reader(_events(text.removeprefix("\ufeff"), name), name)
    documents = list(reader.documents())
    if len(documents) != 1:
        raise InvalidRequest(
            f"{name} has {len(documents)} YAML documents; a stack is one",
            remedy="write each into a file of its own",
        )
    (stack,) = documents
    if not isinstance(stack, dict) or not isinstance(stack.get("services"), dict):
        raise InvalidRequest(
            f"{name} has no services",
            remedy="give a file as for docker stack deploy, with a mapping called services",
        )
    return stack


def _invalid(name: str, line: int, problem: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name} line {line + 1} is no YAML",
        cause=problem,
        remedy=f"correct it there, docker stack config -c {name} reads it too",
    )


def _events(text: str, name: str) -> Iterator[Any]:
    try:
        # libyaml, of which Docker's reader, go-yaml, is a port.
        yield from yaml.parse(text, Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        # Some of its errors have no position, and one may be after the last line.
        mark = getattr(error, "problem_mark", None)
        line = min(mark.line, text.count("\n")) if mark is not None else 0
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise _invalid(name, line, problem) from error


class _Reader:
    """Makes values of events, each with the number of values that it holds."""

    def __init__(self, events: Iterator[Any], name: str) -> None:
        self._events = events
        self._name = name
        self._anchors: dict[str, tuple[Any, int] | None] = {}
        """None: its value isn't complete yet."""

    def documents(self) -> Iterator[Any]:
        for event in self._events:
            if isinstance(event, DocumentStartEvent):
                self._anchors.clear()
                yield self._value(next(self._events), 0)[0]

    def _value(self, event: Any, depth: int) -> tuple[Any, int]:
        line = event.start_mark.line
        if depth > DEEPEST:
            raise _invalid(self._name, line, f"values are more than {DEEPEST} deep in each other")
        if isinstance(event, AliasEvent):
            return self._alias(event.anchor, line)
        if event.anchor:
            self._anchors[event.anchor] = None
        if isinstance(event, ScalarEvent):
            made: tuple[Any, int] = (_scalar(event), 1)
        elif isinstance(event, MappingStartEvent):
            made = self._mapping(depth)
        else:
            made = self._list(line, depth)
        if event.anchor:
            self._anchors[event.anchor] = made
        return made

    def _alias(self, anchor: str, line: int) -> tuple[Any, int]:
        if anchor not in self._anchors:
            raise _invalid(self._name, line, f"there is no anchor {anchor} before")
        made = self._anchors[anchor]
        if made is None:
            raise _invalid(self._name, line, f"anchor {anchor} contains itself")
        return made

    def _checked(self, size: int, line: int) -> int:
        if size > MOST:
            raise _invalid(self._name, line, f"aliases make more than {MOST} values of it")
        return size

    def _list(self, line: int, depth: int) -> tuple[list[Any], int]:
        values: list[Any] = []
        size = 1
        for event in self._events:
            if isinstance(event, SequenceEndEvent):
                break
            value, inner = self._value(event, depth + 1)
            values.append(value)
            size = self._checked(size + inner, line)
        return values, size

    def _mapping(self, depth: int) -> tuple[dict[str, Any], int]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        size = 1
        for event in self._events:
            if isinstance(event, MappingEndEvent):
                break
            line = event.start_mark.line
            key = self._key(event, depth + 1)
            value, inner = self._value(next(self._events), depth + 1)
            size = self._checked(size + 1 + inner, line)
            if key == _MERGE and _is_plain(event):
                for other in value if isinstance(value, list) else [value]:
                    if not isinstance(other, dict):
                        raise _invalid(self._name, line, "<< takes a mapping or a list of them")
                    merged = {**other, **merged}
            elif key in own:
                raise _invalid(self._name, line, f"{key} stands there twice")
            else:
                own[key] = value
        return {**merged, **own}, size

    def _key(self, event: Any, depth: int) -> str:
        """A key is its text: a network may be called `on` or `1`."""
        value, _ = self._value(event, depth)
        key = event.value if isinstance(event, ScalarEvent) else value
        if not isinstance(key, str):
            raise _invalid(self._name, event.start_mark.line, "a key is no text")
        return key


def _is_plain(event: Any) -> bool:
    """Whether it is a scalar without quotes and tag."""
    return isinstance(event, ScalarEvent) and not event.style and event.tag is None


def _scalar(event: Any) -> str | bool | None:
    text: str = event.value
    if not _is_plain(event):
        return text
    return None if text in _NULLS else _BOOLEANS.get(text, text)
