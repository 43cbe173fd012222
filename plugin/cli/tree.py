"""A YAML text as a tree of places: where each value begins and ends, what is an alias, what is written in flow style.

ruamel.yaml's composer would put the anchored value where an alias stands, and lose the alias' place; its events have it.
A block's end is that of its last value: comments and blank lines after it belong to what follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)


@dataclass(slots=True)
class Node:
    """A value. `start` and `end` are characters of the text; `children` of a mapping are keys and values in turn.

    `inside`: something around it is in flow style, so that no block can stand there.
    `alias` is the anchor's name if this is an alias; `target` is what it stands for, otherwise the node itself.
    """

    kind: str
    start: int
    end: int
    column: int = 0
    value: str = ""
    flow: bool = False
    inside: bool = False
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


def tree(text: str) -> Node:
    """The only document's tree. Raises ruamel.yaml's errors."""
    events = iter(YAML(typ="safe", pure=True).parse(text))
    anchors: dict[str, Node] = {}
    for event in events:
        if isinstance(event, DocumentStartEvent):
            return _node(next(events), events, anchors, inside=False)
    return Node("scalar", 0, 0)


def _node(event: Any, events: Iterator[Any], anchors: dict[str, Node], *, inside: bool) -> Node:
    start, end = event.start_mark.index, event.end_mark.index
    column = event.start_mark.column
    if isinstance(event, AliasEvent):
        node = Node("alias", start, end, column, inside=inside, alias=event.anchor)
        node.target = anchors.get(event.anchor, node)
        return node
    anchor = event.anchor or ""
    if isinstance(event, ScalarEvent):
        node = Node("scalar", start, end, column, event.value, inside=inside, anchor=anchor)
        anchors[anchor] = node
        return node
    assert isinstance(event, MappingStartEvent | SequenceStartEvent)
    kind = "map" if isinstance(event, MappingStartEvent) else "list"
    node = Node(kind, start, end, column, flow=bool(event.flow_style), inside=inside, anchor=anchor)
    anchors[anchor] = node
    for inner in events:
        if isinstance(inner, MappingEndEvent | SequenceEndEvent):
            node.end = (
                inner.end_mark.index
                if node.flow
                else max([node.end, *(each.end for each in node.children)])
            )
            break
        node.children.append(_node(inner, events, anchors, inside=inside or node.flow))
    return node
