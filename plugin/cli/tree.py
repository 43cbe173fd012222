"""A YAML text as a tree of places: where each value begins and ends, what is an alias, what is written in flow style.

ruamel.yaml's events keep the place of an alias, which its composer would put the anchored value in. Plain values are made of
them here, and say no more than must be known: tags are left to whom they mean something, and numbers and words such as `on`
stay as they are written.
A block's end is that of its last value: comments and blank lines after it belong to what follows.

A text may be hostile: its size, its depth and what its aliases stand for are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from driver.errors import InvalidRequest
from plugin.cli.scan import Scanner

LONGEST: Final = 1 << 20
"""Characters of a text."""
DEEPEST: Final = 64
"""Values in values."""
MOST: Final = 100_000
"""Values, those that aliases stand for counted each time. Docker's reader refuses a text that has many times more, too."""

_NULLS: Final = ("", "~", "null", "Null", "NULL")
_BOOLEANS: Final = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_MERGE: Final = "<<"
BREAKS: Final = "\r\n\x85\u2028\u2029"
"""What ends a line: all of YAML 1.1's, as Docker has it."""
_AS_BREAKS: Final = dict.fromkeys(map(ord, BREAKS[2:]), "\n")


class Plain(str):
    """A scalar without quotes that is neither null nor a boolean: a number, a date or a word, as it is written."""

    __slots__ = ()


@dataclass(slots=True)
class Node:
    """A value. `start` and `end` are characters of the text; `children` of a mapping are keys and values in turn.

    `inside`: something around it is in flow style, so that no block can stand there. `plain`: a scalar without quotes and tag.
    `alias` is the anchor's name if this is an alias; `target` is what it stands for, otherwise the node itself.
    """

    kind: str
    start: int
    end: int
    column: int = 0
    value: str = ""
    flow: bool = False
    inside: bool = False
    plain: bool = False
    line: int = 0
    anchor: str = ""
    alias: str = ""
    children: list[Node] = field(default_factory=list)
    target: Node = field(init=False)

    def __post_init__(self) -> None:
        self.target = self

    def own(self, key: str) -> Node | None:
        """A key's value where it is written, not what comes by `<<`."""
        found = None
        for name, value in self.pairs():
            if name.value == key:
                found = value
        return found

    def pairs(self) -> Iterator[tuple[Node, Node]]:
        """A mapping's keys and values."""
        return zip(self.children[::2], self.children[1::2], strict=True)

    def key(self, name: str) -> Node:
        """Where a key is written that `own` has found."""
        return [each for each, _ in self.pairs() if each.value == name][-1]

    def walk(self) -> Iterator[Node]:
        """This and all that is written below it."""
        yield self
        for each in self.children:
            yield from each.walk()


def _wrong(where: str, line: int, problem: str) -> InvalidRequest:
    return InvalidRequest(
        f"{where} line {line + 1} is no YAML: {problem}; mend it there, docker stack config -c {where} reads it too"
    )


def _events(text: str, where: str) -> Iterator[Any]:
    """The events of a text. Raises InvalidRequest."""
    try:
        reader = YAML(typ="safe", pure=True)
        reader.Scanner = Scanner
        # Character by character, so that places stay.
        yield from reader.parse(text.translate(_AS_BREAKS))
    except (YAMLError, ValueError) as error:
        # Some of its errors have no place in the text.
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise _wrong(where, mark.line if mark is not None else 0, problem) from error


@lru_cache(2)
def tree(text: str, where: str) -> Node:
    """The only document's tree, not to be changed. `where` is the text's name, for messages. Raises InvalidRequest."""
    if len(text) > LONGEST:
        raise InvalidRequest(
            f"{where} has more than {LONGEST >> 20} MiB, which no stack has; name the file given to docker stack deploy -c"
        )
    roots = []
    reader = _Reader(_events(text, where), where)
    for event in reader.events:
        if isinstance(event, DocumentStartEvent):
            reader.anchors.clear()
            roots.append(reader.node(next(reader.events), 0, inside=False))
    if len(roots) != 1:
        raise InvalidRequest(
            f"{where} has {len(roots)} YAML documents; a stack is one: write each into a file of its own"
        )
    return roots[0]


class _Reader:
    """Makes nodes of events."""

    def __init__(self, events: Iterator[Any], where: str) -> None:
        self.events = events
        self.anchors: dict[str, Node] = {}
        self._where = where

    def node(self, event: Any, depth: int, *, inside: bool) -> Node:
        mark = event.start_mark
        start, end, column, line = mark.index, event.end_mark.index, mark.column, mark.line
        if depth > DEEPEST:
            raise _wrong(self._where, line, f"values are more than {DEEPEST} deep in each other")
        if isinstance(event, AliasEvent):
            node = Node("alias", start, end, column, inside=inside, alias=event.anchor, line=line)
            if event.anchor not in self.anchors:
                raise _wrong(self._where, line, f"there is no anchor {event.anchor} before")
            node.target = self.anchors[event.anchor]
            return node
        if isinstance(event, ScalarEvent):
            node = Node("scalar", start, end, column, event.value, inside=inside, line=line)
            node.plain = not event.style and event.tag is None
        else:
            assert isinstance(event, MappingStartEvent | SequenceStartEvent)
            kind = "map" if isinstance(event, MappingStartEvent) else "list"
            flow = bool(event.flow_style)
            node = Node(kind, start, end, column, flow=flow, inside=inside, line=line)
        if event.anchor:
            node.anchor = event.anchor
            self.anchors[node.anchor] = node
        if node.kind != "scalar":
            self._fill(node, depth)
        return node

    def _fill(self, node: Node, depth: int) -> None:
        for inner in self.events:
            if isinstance(inner, MappingEndEvent | SequenceEndEvent):
                node.end = (
                    inner.end_mark.index
                    if node.flow
                    else max([node.end, *(each.end for each in node.children)])
                )
                return
            node.children.append(self.node(inner, depth + 1, inside=node.inside or node.flow))


def values(root: Node, where: str) -> Any:
    """The plain value of a tree; what aliases stand for is the same object each time. Raises InvalidRequest."""
    return _Values(where).of(root)[0]


class _Values:
    """Makes values of nodes, each with how many values it holds."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._made: dict[int, tuple[Any, int]] = {}
        self._open: set[int] = set()

    def of(self, node: Node) -> tuple[Any, int]:
        node = node.target
        made = self._made.get(id(node))
        if made is None:
            if id(node) in self._open:
                raise _wrong(self._where, node.line, f"anchor {node.anchor} contains itself")
            self._open.add(id(node))
            made = self._made[id(node)] = self._make(node)
            self._open.discard(id(node))
        if made[1] > MOST:
            raise _wrong(self._where, node.line, f"aliases make more than {MOST} values of it")
        return made

    def _make(self, node: Node) -> tuple[Any, int]:
        if node.kind == "scalar":
            return _scalar(node), 1
        if node.kind == "list":
            made = [self.of(each) for each in node.children]
            return [value for value, _ in made], 1 + sum(size for _, size in made)
        return self._mapping(node)

    def _mapping(self, node: Node) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        size = 1
        for key, content in node.pairs():
            name = key.target
            if name.kind != "scalar":
                raise _wrong(self._where, key.line, "a key is no text")
            value, inner = self.of(content)
            size += 1 + inner
            if size > MOST:
                raise _wrong(self._where, key.line, f"aliases make more than {MOST} values of it")
            if name.value == _MERGE and name.plain:
                for each in value if isinstance(value, list) else [value]:
                    if not isinstance(each, dict):
                        raise _wrong(self._where, key.line, "<< takes a mapping or a list of them")
                    merged = {**each, **merged}
            elif name.value in found:
                raise _wrong(self._where, key.line, f"{name.value} stands there twice")
            else:
                found[name.value] = value
        return {**merged, **found}, size


def _scalar(node: Node) -> str | bool | None:
    if not node.plain:
        return node.value
    if node.value in _NULLS:
        return None
    return _BOOLEANS.get(node.value, Plain(node.value))
