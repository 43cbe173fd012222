"""Files as the user of the command sees them, though it runs inside the plugin's root file system.

The script on the host leaves two descriptors open, of the user's directory and of the host's root; their numbers stand in
a variable. Going there and back is for as long as a file is opened: whatever is imported later comes from the plugin again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

VARIABLE: Final = "FREEFLOW_PLACE"
"""`DIRECTORY:ROOT`, two descriptors' numbers."""


@contextmanager
def users_place(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Paths inside mean what they mean to the user. Only for a program with one thread."""
    numbers = environment.get(VARIABLE, "")
    if not numbers:
        yield
        return
    directory, _, root = numbers.partition(":")
    own = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.fchdir(int(root))
        os.chroot(".")
        os.fchdir(int(directory))
        try:
            yield
        finally:
            os.fchdir(own)
            os.chroot(".")
    finally:
        os.close(own)
