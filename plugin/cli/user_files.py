"""Files as the user of the command sees them.

The command runs inside the plugin's root file system. The script on the host leaves two descriptors
open, of the user's directory and of the host's root, and puts their numbers into a variable. The
command changes its root only while it opens a file: modules that are imported later must come from
the plugin again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

VARIABLE: Final = "FREEFLOW_PLACE"
"""`DIRECTORY:ROOT`, the numbers of two descriptors."""


@contextmanager
def users_root(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Within it, paths are the user's. Only for a process with one thread."""
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
