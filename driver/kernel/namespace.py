"""Network namespaces: running code inside one, and checking whether a path is one.

A thread that has changed its namespace is never used for anything else: see `dataplane.threads`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from dataplane.threads import in_thread
from driver.errors import DOCTOR, KernelError, reporting

T = TypeVar("T")

CLONE_NEWNET: Final = 0x40000000
_NSFS_MAGIC: Final = 0x6E736673

OVERLAY_PIN: Final = Path("freeflow-admin/netns/overlay")
"""Where the overlay namespace is pinned, below the host's /run."""
ENCRYPTION_PIN: Final = OVERLAY_PIN.with_name("encryption")
"""The same of the encryption namespace."""

libc = ctypes.CDLL(None, use_errno=True)


class _Statfs(ctypes.Structure):
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_byte * 248))


def check(result: int, what: str) -> None:
    """Raise KernelError with errno's text if a C call failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise KernelError(what, cause=os.strerror(number), remedy=DOCTOR)


def enter(namespace: int) -> None:
    """Move the calling thread into a network namespace, and never back: see `dataplane.threads`."""
    check(libc.setns(namespace, CLONE_NEWNET), "entering a network namespace failed")


def in_netns(namespace: Path | int, function: Callable[[], T]) -> T:
    """Run `function` inside a network namespace, given by path or open descriptor.

    Raises:
        KernelError: the namespace can't be opened or entered, or what `function` raises.
    """
    if isinstance(namespace, int):
        descriptor = os.dup(namespace)
    else:
        what = f"network namespace {namespace} can't be opened"
        with reporting(what, remedy="check that its container runs"):
            descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)

    def body() -> T:
        enter(descriptor)
        return function()

    try:
        return in_thread(body)
    finally:
        os.close(descriptor)


def filesystem(path: Path) -> int | None:
    """The magic number of the file system of `path` (statfs(2)); None if there is no such path."""
    answer = _Statfs()
    if libc.statfs(str(path).encode(), ctypes.byref(answer)) != 0:
        return None
    return int(answer.f_type)


def is_namespace(path: Path) -> bool:
    """Whether a namespace is mounted at `path`: Docker creates the file before it mounts there."""
    return filesystem(path) == _NSFS_MAGIC


def isolated(function: Callable[[], T]) -> T:
    """Run `function` in a temporary network namespace, to try a feature of the kernel.

    Raises:
        KernelError: no namespace could be made.
    """

    def body() -> T:
        check(libc.unshare(CLONE_NEWNET), "making a network namespace")
        return function()

    return in_thread(body)
