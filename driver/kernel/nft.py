"""nftables through libnftables: each call is one transaction. Never used in containers' namespaces.

libnftables reads the ruleset before it changes it, and aborts the process on some rulesets that the
kernel accepts. So it is only for namespaces where only the host's root writes rules; `nf_tables.py`
is for others.

A context opens its netlink socket in the calling thread's namespace and keeps it: a `Session` stays
in the namespace where it was made, whichever thread uses it. Closing the socket makes the kernel
wait until earlier removals are complete (10 ms and more), so frequent callers keep a session.

The library counts references to shared data types without atomics: two threads in it at the same
time, even with separate contexts, make it abort the process. So one lock covers all sessions.
Interface: libnftables(3), libnftables-json(5); syntax: nft(8).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from driver.errors import DOCTOR, TRY_AGAIN, KernelError, reporting
from driver.kernel.namespace import in_netns

_LIBRARY: Final = "libnftables.so.1"
_OUTPUT_JSON: Final = 1 << 4
_OUTPUT_NUMERIC: Final = 0x3F << 5
_OUTPUT_TERSE: Final = 1 << 11
"""Omits the elements of named sets."""
_MOST_DESCRIPTORS: Final = 1024
"""FD_SETSIZE: the library calls select(), and aborts the process if its descriptor is larger."""
_one_at_a_time: Final = threading.RLock()
"""Reentrant: the garbage collector may free a session in a thread that holds it."""


@functools.cache
def _library() -> ctypes.CDLL:
    with reporting(f"{_LIBRARY} can't be loaded", remedy="install libnftables1"):
        library = ctypes.CDLL(_LIBRARY)
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_free.argtypes = [ctypes.c_void_p]
    library.nft_ctx_buffer_output.argtypes = [ctypes.c_void_p]
    library.nft_ctx_buffer_error.argtypes = [ctypes.c_void_p]
    library.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
    library.nft_ctx_get_output_buffer.argtypes = [ctypes.c_void_p]
    library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    library.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return library


class Session:
    """A context of the library in the calling thread's namespace. Any thread may use it."""

    def __init__(self) -> None:
        self._library = _library()
        with _one_at_a_time:
            _check_descriptors()
            self._context = self._library.nft_ctx_new(0)
            if not self._context:
                raise KernelError(
                    "nftables", cause="libnftables can't be opened", remedy="modprobe nf_tables"
                )
            self._library.nft_ctx_buffer_output(self._context)
            self._library.nft_ctx_buffer_error(self._context)
        self._free = weakref.finalize(self, _free, self._library, self._context)

    def close(self) -> None:
        """Free the context; not while another thread uses it."""
        self._free()

    def _execute(self, commands: str, flags: int) -> str:
        library = self._library
        with _one_at_a_time:
            if not self._free.alive:
                raise KernelError(
                    "nftables", cause="the namespace was removed meanwhile", remedy=TRY_AGAIN
                )
            library.nft_ctx_output_set_flags(self._context, flags)
            result = library.nft_run_cmd_from_buffer(self._context, commands.encode())
            # Reading a buffer also clears it.
            output = library.nft_ctx_get_output_buffer(self._context) or b""
            error = library.nft_ctx_get_error_buffer(self._context) or b""
        if result != 0:
            lines = error.decode(errors="replace").splitlines()
            first = next((line for line in lines if line.strip()), "no reason given")
            raise KernelError("nftables refused", cause=first.strip(), remedy=DOCTOR)
        return bytes(output).decode()

    def run(self, commands: str) -> None:
        """Run nft(8) commands as one transaction.

        Raises:
            KernelError: with nft's own first line.
        """
        self._execute(commands, 0)

    def query(self, commands: str, *, elements: bool = False) -> list[dict[str, Any]]:
        """Run a listing command; returns the objects of libnftables-json(5) without the metainfo.

        `elements`: include the elements of named sets.

        Raises:
            KernelError: with nft's own first line.
        """
        terse = 0 if elements else _OUTPUT_TERSE
        text = self._execute(commands, _OUTPUT_JSON | _OUTPUT_NUMERIC | terse)
        if not text.strip():
            return []
        objects: list[dict[str, Any]] = json.loads(text)["nftables"]
        return [item for item in objects if "metainfo" not in item]


def _check_descriptors() -> None:
    """Raise KernelError if the next descriptor would be too large."""
    number = os.open("/", os.O_PATH | os.O_CLOEXEC)
    os.close(number)
    if number >= _MOST_DESCRIPTORS - 1:
        raise KernelError(
            "nftables",
            cause=f"this process has {number} descriptors open, and libnftables can't work with "
            f"more than {_MOST_DESCRIPTORS}",
            remedy="restart the plugin, and report it with `freeflow bugreport`",
        )


def _free(library: ctypes.CDLL, context: int) -> None:
    with _one_at_a_time:
        library.nft_ctx_free(context)


@contextlib.contextmanager
def _session(netns: Path | int | None) -> Iterator[Session]:
    """A session in `netns` (path or descriptor), or in the calling thread's namespace."""
    session = Session() if netns is None else in_netns(netns, Session)
    try:
        yield session
    finally:
        session.close()


def run(commands: str, netns: Path | int | None = None) -> None:
    """`Session.run` once."""
    with _session(netns) as session:
        session.run(commands)


def query(commands: str, netns: Path | int | None = None) -> list[dict[str, Any]]:
    """`Session.query` once."""
    with _session(netns) as session:
        return session.query(commands)
