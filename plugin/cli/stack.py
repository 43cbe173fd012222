"""Changes a stack's text: the library's mount and variable are written where they belong, and not a character else.

Comments, anchors, order, quotes and indentation stay since nothing is written anew. Whether the text then says what it
must is checked by reading it: each service against what it was, with what it should get. What an anchor or a `<<` carries to
a service that should not have it is taken back there; if reading shows anything else, nothing is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

from driver.errors import InvalidRequest
from plugin.cli.tree import BREAKS, Node, Plain, tree, values

KEYS: Final = ("volumes", "environment")
_ROUNDS: Final = 4
_BREAK: Final = re.compile(f"[{BREAKS}]")
_DASH: Final = re.compile(f"[{BREAKS}]( *)-\\s")
_MEANING: Final = ("true", "false", "yes", "no", "on", "off", "null")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a service must get: a mount and LD_PRELOAD's value, each None if it has it."""

    mount: Any
    preload: str | None


@dataclass(frozen=True, slots=True)
class _Edit:
    start: int
    end: int
    text: str


def parse(text: str, name: str) -> dict[str, Any]:
    """A stack's plain value, with services. Raises InvalidRequest."""
    stack = values(tree(text.removeprefix("\ufeff"), name), name)
    if not isinstance(stack, dict) or not isinstance(stack.get("services"), dict):
        raise InvalidRequest(
            f"{name} has no services; give a file as for docker stack deploy, with a mapping called services"
        )
    return stack


def inject(text: str, wanted: Mapping[str, Wanted], name: str) -> str:
    """The text in which these services have what they must get. Raises InvalidRequest."""
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    text = text.removeprefix("\ufeff")
    before = parse(text, name)
    expected = deepcopy(before)
    # Values of an anchor are one object here too; each service is to be changed alone.
    expected["services"] = {
        service: deepcopy(content) for service, content in before["services"].items()
    }
    for service, each in wanted.items():
        expected["services"][service] = _with(expected["services"][service] or {}, each)
    for number in range(_ROUNDS):
        now = parse(text, name)
        if _same(now, expected):
            return mark + text
        changed = _round(text, name, now, expected, frozenset(wanted), plain=number > 0)
        if changed == text:
            break
        text = changed
        try:
            parse(text, name)
        except InvalidRequest:
            break
    raise InvalidRequest(
        f"{name} is written in a way that can't be changed safely, and nothing was; write volumes and environment of "
        f"{', '.join(wanted)} as blocks of their own, or add the lines of docs/acceleration.md by hand"
    )


def _with(service: dict[str, Any], wanted: Wanted) -> dict[str, Any]:
    if wanted.mount is not None:
        service["volumes"] = [*(service.get("volumes") or ()), wanted.mount]
    if wanted.preload is not None:
        variables = service.get("environment")
        if isinstance(variables, list):
            kept = [each for each in variables if str(each).partition("=")[0] != "LD_PRELOAD"]
            service["environment"] = [*kept, f"LD_PRELOAD={wanted.preload}"]
        else:
            service["environment"] = {**(variables or {}), "LD_PRELOAD": wanted.preload}
    return service


def _normal(value: Any) -> Any:
    """None, no entry and an empty one say the same; the order of a list of variables says nothing."""
    if not isinstance(value, dict):
        return value
    volumes, variables = value.get("volumes") or [], value.get("environment") or {}
    if isinstance(variables, list):
        variables = sorted(str(each) for each in variables)
    return {**value, "volumes": volumes, "environment": variables}


def _same(now: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Templates (`x-…`) may change where all that use them get the same: the services are what counts."""
    rest = [
        name for name in {*now, *expected} if name != "services" and not str(name).startswith("x-")
    ]
    if any(now.get(name) != expected.get(name) for name in rest):
        return False
    if list(now["services"]) != list(expected["services"]):
        return False
    return all(
        _normal(content or {}) == _normal(expected["services"][service] or {})
        for service, content in now["services"].items()
    )


def _round(
    text: str,
    name: str,
    now: Mapping[str, Any],
    expected: Mapping[str, Any],
    chosen: frozenset[str],
    *,
    plain: bool,
) -> str:
    """One pass over what differs. `plain`: values are written out whole, where the first pass wasn't enough."""
    root = tree(text, name)
    services = root.own("services")
    if services is None:
        return text
    services = services.target
    uses: dict[int, set[str]] = {}
    for key, node in services.pairs():
        for identity in {id(found.target) for found in node.target.walk()}:
            uses.setdefault(identity, set()).add(key.value)
    for inner in root.walk():
        if not services.start <= inner.start < services.end:
            uses.setdefault(id(inner.target), set()).add("")
    edits: dict[int, list[_Edit]] = {}
    writer = _Writer(text, chosen, uses)
    for key, node in services.pairs():
        service = key.value
        if service not in expected["services"]:
            continue
        is_now, must = (
            _normal(now["services"][service] or {}),
            _normal(expected["services"][service] or {}),
        )
        missing = {each: must[each] for each in KEYS if is_now[each] != must[each]}
        if missing:
            for edit in writer.change(key, node, missing, is_now, plain=plain):
                # Two services may share a value; it is changed once.
                if edit not in (same := edits.setdefault(edit.start, [])):
                    same.append(edit)
    return _edited(text, edits)


def _edited(text: str, edits: Mapping[int, list[_Edit]]) -> str:
    parts, at = [], 0
    for start in sorted(edits):
        # One that begins in what another one replaces comes in the next round.
        if start < at:
            continue
        parts += [text[at:start], *(edit.text for edit in edits[start])]
        at = max(edit.end for edit in edits[start])
    return "".join([*parts, text[at:]])


_AS_IT_IS: Final = re.compile(r"[\w./+-](?:[\w./+:@=-]*[\w./@=+-])?")
"""What may stand without quotes in any place, and did."""


def _json(value: Any) -> str:
    """In JSON's form, which is YAML too, but for its way to write what is beyond 16 bits, and what had no quotes."""
    if isinstance(value, dict):
        return (
            f"{{{', '.join(f'{_json(str(name))}: {_json(each)}' for name, each in value.items())}}}"
        )
    if isinstance(value, list):
        return f"[{', '.join(map(_json, value))}]"
    if isinstance(value, Plain) and _AS_IT_IS.fullmatch(value):
        return str(value)
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(
        r"[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda m: f"\\u{ord(m[0]):04x}", text
    )


def _scalar(value: str) -> str:
    """A path, or paths with colons between, as they are; anything else in quotes."""
    return value if re.fullmatch(r"/[\w./:-]*[\w./]", value) else _json(value)


def _word(value: str) -> str:
    """The same for what may be a word, which YAML may take for something else."""
    plain = re.fullmatch(r"[A-Za-z_/][\w./:=-]*[\w./]", value)
    return value if plain and value.lower() not in _MEANING else _json(value)


class _Writer:
    """Makes edits of one text. `uses`: which services write or alias a node; the empty name is a template."""

    def __init__(self, text: str, chosen: frozenset[str], uses: Mapping[int, set[str]]) -> None:
        self._text = text
        self._chosen = chosen
        self._uses = uses
        kinds = [each for each in ("\r\n", "\n", *BREAKS) if each in text]
        self._newline = kinds[0] if kinds else "\n"

    def change(
        self,
        key: Node,
        node: Node,
        missing: Mapping[str, Any],
        now: Mapping[str, Any],
        *,
        plain: bool,
    ) -> list[_Edit]:
        """The edits that give the service at `key` what it lacks."""
        if node.alias:
            if not plain and self._uses[id(node.target)] <= self._chosen:
                node = node.target
            else:
                # The alias becomes a mapping that has all of it, and then says otherwise.
                return [
                    self._instead_of_alias(
                        key, node, {name: _json(each) for name, each in missing.items()}
                    )
                ]
        if node.kind == "scalar" and node.inside:
            return [self._value(node, missing)]
        if node.kind == "scalar":
            return self._block_below(key, node, missing)
        edits: list[_Edit] = []
        absent = {}
        for name, value in missing.items():
            found = node.own(name)
            if found is None:
                absent[name] = value
            elif plain:
                edits.append(_Edit(found.start, self._end(found), _json(value)))
            else:
                edits += self._add(node.key(name), found, value, now[name])
        if absent and node.flow:
            edits.append(
                self._in_flow(node, [f'"{name}": {_json(each)}' for name, each in absent.items()])
            )
        elif absent:
            pad = " " * self._column(node)
            lines = [line for name, each in absent.items() for line in self._entry(name, each, pad)]
            edits.append(self._after(node, lines))
        return edits

    def _add(self, key: Node, found: Node, value: Any, now: Any) -> list[_Edit]:
        """Into a value that is written here, or aliased."""
        node = found
        if found.alias:
            shared = self._uses[id(found.target)]
            if shared <= self._chosen:
                node = found.target
            elif isinstance(value, dict):
                return [
                    self._instead_of_alias(key, found, {"LD_PRELOAD": _scalar(value["LD_PRELOAD"])})
                ]
            else:
                return [_Edit(found.start, found.end, _json(value))]
        if node.kind == "scalar" and node.inside:
            return [self._value(node, value)]
        if node.kind == "scalar":
            pad = " " * (key.column + 2)
            lines = self._inner(value, pad)
            if node.start == node.end:
                # Nothing stands there: below the key's line, whose comment stays.
                at = self._line_end(key.end)
                return [_Edit(at, at, "".join(self._newline + line for line in lines))]
            return [_Edit(node.start, node.end, "".join(self._newline + line for line in lines))]
        if node.kind == "map":
            written = _scalar(value["LD_PRELOAD"])
            old = node.own("LD_PRELOAD")
            if old is not None and old.start == old.end:
                at = node.key("LD_PRELOAD").end
                at = self._text.index(":", at) + 1
                return [_Edit(at, at, f" {written}")]
            if old is not None:
                return [_Edit(old.start, self._end(old), self._requoted(old, value["LD_PRELOAD"]))]
            if node.flow:
                return [self._in_flow(node, [f'"LD_PRELOAD": {_json(value["LD_PRELOAD"])}'])]
            return [self._after(node, [f"{' ' * self._column(node)}LD_PRELOAD: {written}"])]
        added = [each for each in value if each not in now]
        edits = []
        for each in added:
            for old in (
                node.children if isinstance(each, str) and each.startswith("LD_PRELOAD=") else ()
            ):
                if old.kind == "scalar" and old.value.partition("=")[0] == "LD_PRELOAD":
                    return [_Edit(old.start, self._end(old), self._requoted(old, each))]
            if node.flow:
                edits.append(self._in_flow(node, [_json(each)]))
            else:
                edits.append(self._after(node, self._item(each, " " * self._dash(node))))
        return edits

    def _requoted(self, old: Node, value: str) -> str:
        """In the quotes that were there."""
        quote = self._text[old.start]
        if quote == "'" and "'" not in value:
            return f"'{value}'"
        if quote == '"':
            return _json(value)
        plain = re.fullmatch(r"[\w/][\w./:=+-]*[\w./]", value)
        return value if plain else _json(value)

    def _entry(self, name: str, value: Any, pad: str) -> list[str]:
        """A key of its own, with all that its value must say: what comes by `<<` is replaced by it."""
        if not value:
            return [f"{pad}{name}: {_json(value)}"]
        return [f"{pad}{name}:", *self._inner(value, pad + "  ")]

    def _inner(self, value: Any, pad: str) -> list[str]:
        if isinstance(value, dict):
            return [
                f"{pad}{name}: {_scalar(each) if isinstance(each, str) else _json(each)}"
                for name, each in value.items()
            ]
        return [line for each in value for line in self._item(each, pad)]

    def _item(self, value: Any, pad: str) -> list[str]:
        if isinstance(value, dict) and all(isinstance(each, str) for each in value.values()):
            first, *others = (f"{name}: {_word(each)}" for name, each in value.items())
            return [f"{pad}- {first}", *(f"{pad}  {line}" for line in others)]
        if isinstance(value, str):
            return [f"{pad}- {_word(value)}"]
        return [f"{pad}- {_json(value)}"]

    def _value(self, node: Node, value: Any) -> _Edit:
        """In place of a scalar, maybe one of no characters."""
        blank = " " if node.start == node.end else ""
        return _Edit(node.start, node.end, blank + _json(value))

    def _instead_of_alias(self, key: Node, alias: Node, entries: Mapping[str, str]) -> _Edit:
        if alias.inside:
            inner = ", ".join(f'"{name}": {each}' for name, each in entries.items())
            return _Edit(alias.start, alias.end, f"{{<<: *{alias.alias}, {inner}}}")
        pad = self._newline + " " * (key.column + 2)
        lines = [f"<<: *{alias.alias}", *(f"{name}: {each}" for name, each in entries.items())]
        start = (
            alias.start - len(before := self._text[key.end : alias.start]) + len(before.rstrip())
        )
        return _Edit(start, alias.end, "".join(pad + line for line in lines))

    def _block_below(self, key: Node, node: Node, missing: Mapping[str, Any]) -> list[_Edit]:
        pad = " " * (key.column + 2)
        lines = [line for name, each in missing.items() for line in self._entry(name, each, pad)]
        at = self._line_end(key.end) if node.start == node.end else node.start
        return [_Edit(at, max(at, node.end), "".join(self._newline + line for line in lines))]

    def _in_flow(self, node: Node, entries: list[str]) -> _Edit:
        at = node.end - 1
        before = self._text[node.start : at].rstrip()
        at = node.start + len(before)
        comma = "" if before.endswith((",", "[", "{")) else ", "
        if before.endswith(","):
            comma = " "
        return _Edit(at, at, comma + ", ".join(entries))

    def _after(self, node: Node, lines: list[str]) -> _Edit:
        at = self._line_end(self._end(node))
        return _Edit(at, at, "".join(self._newline + line for line in lines))

    def _end(self, node: Node) -> int:
        """Past the last character: a block scalar's own end is that of the lines after it."""
        return node.start + len(self._text[node.start : node.end].rstrip())

    def _line_end(self, at: int) -> int:
        found = _BREAK.search(self._text, at)
        return found.start() if found else len(self._text)

    def _column(self, node: Node) -> int:
        return node.children[0].column

    def _dash(self, node: Node) -> int:
        """The column of a block list's dashes."""
        if self._text[node.start] == "-":
            return node.column
        # It begins with its anchor.
        found = _DASH.search(self._text, node.start)
        return len(found[1]) if found else node.column
