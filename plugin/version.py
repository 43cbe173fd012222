"""FreeFlow's version, for status, metrics and the package."""

from typing import Final

VERSION: Final = "0.1.0"
