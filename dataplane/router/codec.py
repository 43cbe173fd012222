"""Messages that are C structures: each class names its kinds and, field by field, its bytes.

A message begins with two 16-bit numbers, its kind and its size, and is in the host's byte order.
What follows is the class's fields in their order, without implicit padding:

    @codec.message(MessageKind.NOTE)
    class Note(msgspec.Struct, frozen=True):
        reason: U32
        cookie: U64

A class that stands for several kinds has a field `kind`, its first. The codec checks the size and
the kind of what arrives, and each field its own limits; what a field means is checked where it is
used.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, Final, TypeVar, get_type_hints

import msgspec
from msgspec.structs import astuple

from dataplane.errors import WrongMessage

C = TypeVar("C", bound=type[msgspec.Struct])

_HEAD: Final = struct.Struct("=HH")
"""Kind and size."""


@dataclass(frozen=True, slots=True)
class WireField:
    """The bytes of a field: one code of `struct`, with pad bytes (`x`) around it if there are some.

    `decode` raises WrongMessage for a value that the field may not have.
    """

    code: str
    encode: Callable[[Any], Any] | None = None
    decode: Callable[[Any], Any] | None = None


U32 = Annotated[int, WireField("I")]
U64 = Annotated[int, WireField("Q")]
I32 = Annotated[int, WireField("i")]


class Codec:
    """The messages of one protocol."""

    def __init__(self) -> None:
        self._by_kind: dict[int, _Layout] = {}
        self._by_class: dict[type, _Layout] = {}

    def message(
        self, *kinds: IntEnum, order: Sequence[str] = (), tail: int = 0
    ) -> Callable[[C], C]:
        """Register a class.

        Args:
            kinds: the kinds that it stands for.
            order: its fields in the order of their bytes, if that is another one.
            tail: the most bytes of the last field, if its length isn't fixed.
        """

        def register(message: C) -> C:
            layout = _Layout(message, kinds, order, tail)
            self._by_class[message] = layout
            self._by_kind.update(dict.fromkeys(map(int, kinds), layout))
            return message

        return register

    def pack(self, message: msgspec.Struct) -> bytes:
        """A message as bytes."""
        return self._by_class[type(message)].pack(message)

    def unpack(self, data: bytes) -> Any:
        """The message in a packet.

        Raises:
            WrongMessage: the packet isn't exactly one known message.
        """
        if len(data) < _HEAD.size:
            raise WrongMessage(
                f"packet of {len(data)} bytes", cause=f"a message has at least {_HEAD.size}"
            )
        kind, size = _HEAD.unpack_from(data)
        layout = self._by_kind.get(kind)
        if layout is None:
            raise WrongMessage(f"message of unknown kind {kind}")
        if size != len(data) or not 0 <= size - layout.form.size <= layout.tail:
            raise WrongMessage(
                f"{layout.name(kind)} of {len(data)} bytes that says {size}",
                cause=f"it has {layout.form.size}",
            )
        return layout.unpack(kind, data)


class _Layout:
    """The bytes of one class."""

    __slots__ = ("_converted", "_kinds", "_message", "_order", "_shared", "form", "tail")

    def __init__(
        self,
        message: type[msgspec.Struct],
        kinds: Sequence[IntEnum],
        order: Sequence[str],
        tail: int,
    ) -> None:
        hints = get_type_hints(message, include_extras=True)
        names = message.__struct_fields__
        self._message = message
        self._kinds = {int(kind): kind for kind in kinds}
        self._shared = names[0] == "kind"
        own = names[1:] if self._shared else names
        self._order = [own.index(name) for name in order]
        fixed = [_field(hints[name]) for name in order or own[: len(own) - bool(tail)]]
        self._converted = [
            (place, field.encode, field.decode)
            for place, field in enumerate(fixed)
            if field.encode is not None and field.decode is not None
        ]
        self.form = struct.Struct("=HH" + "".join(field.code for field in fixed))
        self.tail = tail

    def name(self, kind: int) -> str:
        """The name of one of its kinds."""
        return self._kinds[kind].name

    def pack(self, message: msgspec.Struct) -> bytes:
        kind, values = next(iter(self._kinds)), list(astuple(message))
        if self._shared:
            kind = values.pop(0)
        if self._order:
            values = [values[place] for place in self._order]
        tail = values.pop() if self.tail else b""
        for place, encode, _ in self._converted:
            values[place] = encode(values[place])
        return self.form.pack(kind, self.form.size + len(tail), *values) + tail

    def unpack(self, kind: int, data: bytes) -> msgspec.Struct:
        values = list(self.form.unpack_from(data)[2:])
        for place, _, decode in self._converted:
            values[place] = decode(values[place])
        if self.tail:
            values.append(data[self.form.size :])
        if self._order:
            values = [values[self._order.index(place)] for place in range(len(values))]
        if self._shared:
            values.insert(0, self._kinds[kind])
        return self._message(*values)


def _field(hint: Any) -> WireField:
    """The `WireField` in an annotation."""
    return next(part for part in hint.__metadata__ if isinstance(part, WireField))
