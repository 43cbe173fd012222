"""Descriptors that a test may leave open: closed for it, so that they do not add up."""

from __future__ import annotations

import contextlib
import os


def close_unless_reused(descriptor: int, inode: int) -> None:
    """Close a descriptor that a test has left open. Its number may be another file's by now."""
    with contextlib.suppress(OSError):
        if os.fstat(descriptor).st_ino == inode:
            os.close(descriptor)
