"""ruamel.yaml's scanner with the rules of libyaml, of which Docker's reader, go-yaml, is a port.

Where ruamel.yaml is stricter, libyaml's rules apply: tabs separate tokens but don't indent, tags
have no meaning here, and `%YAML` doesn't change how a text is split into tokens. Where libyaml is
stricter, Docker reports the error itself.
"""

from __future__ import annotations

from typing import Any, Final

from ruamel.yaml.scanner import Scanner as Base
from ruamel.yaml.scanner import ScannerError
from ruamel.yaml.tokens import DirectiveToken, TagToken

_BLANKS: Final = " \t"
_BREAKS: Final = "\r\n\x85\u2028\u2029"
_ENDS: Final = "\0" + _BREAKS
_VERSION: Final = (1, 2)


class Scanner(Base):
    """The base class calls these methods by their names."""

    @property
    def scanner_processing_version(self) -> Any:
        return _VERSION

    def scan_to_next_token(self) -> Any:
        """Skip blanks, comments and line breaks."""
        reader = self.reader
        if reader.index == 0 and reader.peek() == "\ufeff":
            reader.forward()
        while True:
            # Where a block could begin, a tab would be its indentation.
            tabs = self.flow_level or not self.allow_simple_key
            while reader.peek() == " " or (tabs and reader.peek() == "\t"):
                reader.forward()
            self._skip_comment()
            if not self.scan_line_break():
                return
            if not self.flow_level:
                self.allow_simple_key = True

    def _skip_comment(self) -> None:
        if self.reader.peek() == "#":
            while self.reader.peek() not in _ENDS:
                self.reader.forward()

    def _skip_rest(self, what: str, start: Any) -> None:
        """Skip blanks and a comment up to the next line; anything else there is an error."""
        while self.reader.peek() in _BLANKS:
            self.reader.forward()
        self._skip_comment()
        if self.reader.peek() not in _ENDS:
            raise ScannerError(
                f"while scanning {what}",
                start,
                f"expected a comment or a line break, but found {self.reader.peek()!r}",
                self.reader.get_mark(),
            )
        self.scan_line_break()

    def scan_directive(self) -> Any:
        """Directives are ignored."""
        start = self.reader.get_mark()
        length = 1
        while self.reader.peek(length) not in _ENDS:
            length += 1
        self.reader.forward(length)
        end = self.reader.get_mark()
        self.scan_line_break()
        return DirectiveToken("", None, start, end)

    def scan_block_scalar_indicators(self, start_mark: Any) -> Any:
        """Whether trailing line breaks are kept (None: one); the indentation (None: unknown)."""
        keep, indent = None, None
        while (found := self.reader.peek()) in "+-123456789":
            if found in "+-" and keep is None:
                keep = found == "+"
            elif found not in "+-" and indent is None:
                indent = int(found)
            else:
                break
            self.reader.forward()
        return keep, indent

    def scan_block_scalar_ignored_line(self, start_mark: Any) -> Any:
        self._skip_rest("a block scalar", start_mark)

    def scan_tag(self) -> Any:
        """A tag as it is written."""
        reader = self.reader
        start = reader.get_mark()
        ends = _ENDS + _BLANKS + (",[]{}" if self.flow_level else "")
        length = 1
        while reader.peek(length) not in ends:
            length += 1
        text = reader.prefix(length)
        reader.forward(length)
        value: tuple[str | None, str]
        if text.startswith("!<") and text.endswith(">"):
            value = (None, text[2:-1])
        elif text.startswith("!!"):
            value = ("!!", text[2:])
        else:
            value = (None, text)
        return TagToken(value, start, reader.get_mark())

    def scan_plain_spaces(self, indent: Any, start_mark: Any) -> Any:
        """The folded space between two words of a plain scalar; None at a document's end."""
        reader = self.reader
        length = 0
        while reader.peek(length) in _BLANKS:
            length += 1
        blanks = reader.prefix(length)
        reader.forward(length)
        if reader.peek() not in _BREAKS:
            return [blanks] if blanks else []
        first = self.scan_line_break()
        self.allow_simple_key = True
        breaks: list[str] = []
        while True:
            if self._is_document_end():
                return None
            while reader.peek() in _BLANKS:
                if reader.peek() == "\t" and reader.column < indent:
                    raise ScannerError(
                        "while scanning a plain scalar",
                        start_mark,
                        "found a tab character that violates indentation",
                        reader.get_mark(),
                    )
                reader.forward()
            if reader.peek() not in _BREAKS:
                break
            breaks.append(self.scan_line_break())
        if first != "\n":
            return [first, *breaks]
        return breaks or [" "]

    def _is_document_end(self) -> bool:
        reader = self.reader
        return (
            reader.column == 0
            and reader.prefix(3) in ("---", "...")
            and reader.peek(3) in _ENDS + _BLANKS
        )
