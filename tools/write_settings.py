"""Writes what is generated from the settings: `env` of config.json and tables of docs/options.md.

`python -m tools.write_settings` (`make settings`) rewrites both files in the current directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from plugin.settings import SETTINGS, Setting

CONFIG: Final = Path("config.json")
DOCUMENT: Final = Path("docs/options.md")
_ENV: Final = re.compile(r'(?<=\n  "env": \[\n).*?(?=\n  \],\n)', re.DOTALL)
_TABLE: Final = "<!-- {0}: written by make settings -->\n"
_END: Final = "<!-- end -->"


def config(text: str) -> str:
    """config.json with the settings of the code."""
    return _ENV.sub(lambda _: ",\n".join(map(_row, SETTINGS)), text)


def _row(setting: Setting) -> str:
    return (
        "    {\n"
        f'      "name": {json.dumps(setting.name)},\n'
        f'      "description": {json.dumps(setting.description)},\n'
        f'      "value": {json.dumps(setting.default)},\n'
        '      "settable": ["value"]\n'
        "    }"
    )


def document(text: str) -> str:
    """docs/options.md with the settings of the code."""
    for name, tuning in (("settings", False), ("tuning", True)):
        head, start, rest = text.partition(_TABLE.format(name))
        _, end, tail = rest.partition(_END)
        table = _table(setting for setting in SETTINGS if setting.tuning == tuning)
        text = head + start + table + end + tail
    return text


def _table(settings: Iterable[Setting]) -> str:
    rows = ["| name | default | values | what it does |", "| --- | --- | --- | --- |"]
    for setting in settings:
        empty = f"(empty: {setting.empty})" if setting.empty else "(empty)"
        default = f"`{setting.default}`" if setting.default else empty
        text = setting.text[0].upper() + setting.text[1:]
        text += f". {setting.details}" if setting.details else "."
        rows.append(f"| `{setting.name}` | {default} | {setting.kind.values} | {text} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    CONFIG.write_text(config(CONFIG.read_text()))
    DOCUMENT.write_text(document(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
