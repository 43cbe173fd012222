"""nftables through libnftables, in any network namespace, each call one atomic transaction.

The library opens its netlink socket in the calling thread's namespace when its context is made, so a
context is made, used and freed inside one call. Interface: libnftables(3), syntax: nft(8).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import json
from pathlib import Path
from typing import Any, Final

from driver.errors import KernelError
from driver.kernel.namespace import in_netns

_OUTPUT_JSON: Final = 1 << 4
_OUTPUT_NUMERIC: Final = 1 << 11 | 0x3F << 5


@functools.cache
def _library() -> ctypes.CDLL:
    name = ctypes.util.find_library("nftables") or "libnftables.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise KernelError(f"{name} can't be loaded: {error}; install libnftables1") from error
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


def _execute(commands: str, flags: int) -> str:
    library = _library()
    context = library.nft_ctx_new(0)
    if not context:
        raise KernelError("nftables: no context; does the kernel have nf_tables?")
    try:
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        library.nft_ctx_output_set_flags(context, flags)
        result = library.nft_run_cmd_from_buffer(context, commands.encode())
        if result != 0:
            error = (library.nft_ctx_get_error_buffer(context) or b"").decode(errors="replace")
            first = next((line for line in error.splitlines() if line.strip()), "no reason given")
            raise KernelError(f"nftables refused: {first.strip()}")
        return (library.nft_ctx_get_output_buffer(context) or b"").decode()
    finally:
        library.nft_ctx_free(context)


def run(commands: str, netns: Path | int | None = None) -> None:
    """Run nft(8) commands as one transaction, in `netns` (path or descriptor) or the current namespace.

    Raises:
        KernelError: with nft's own first line.
    """
    if netns is None:
        _execute(commands, 0)
    else:
        in_netns(netns, lambda: _execute(commands, 0))


def query(commands: str, netns: Path | int | None = None) -> list[dict[str, Any]]:
    """Run a listing command; the objects of libnftables-json(5) without the metainfo.

    Raises:
        KernelError: with nft's own first line.
    """

    def ask() -> str:
        return _execute(commands, _OUTPUT_JSON | _OUTPUT_NUMERIC)

    text = ask() if netns is None else in_netns(netns, ask)
    if not text.strip():
        return []
    objects: list[dict[str, Any]] = json.loads(text)["nftables"]
    return [item for item in objects if "metainfo" not in item]
