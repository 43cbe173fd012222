"""A queue pair of RDMA verbs, by ctypes: connects to a peer's, and writes into its memory.

The layouts are those of rdma-core's verbs.h on 64-bit machines, which its ABI has fixed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import socket
import struct
import sys
import time
from typing import Any

SIZE = 1 << 16
_PORT = 1
_PSN = 1
_GIDS = 64
_POLL_CQ, _POST_SEND = 96, 208
"""Offsets of functions in struct ibv_context."""
_RC, _WRITE, _SIGNALED, _ACCESS = 2, 0, 2, 7
_INIT, _RTR, _RTS = 1, 2, 3
_TO_INIT, _TO_RTR, _TO_RTS = 57, 1216897, 77313
"""Masks of attributes that these states need."""
_MTU_1024 = 3
_COMPLETING = 15.0


class VerbsError(OSError):
    """A call of libibverbs failed."""


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found


def _word(address: int, offset: int) -> int:
    return ctypes.c_uint32.from_address(address + offset).value


class QueuePair:
    """One queue pair of type RC, with one region of memory. `library` is libibverbs."""

    def __init__(self, library: str, own: str) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int
        verbs = self._verbs = ctypes.CDLL(library)
        listed = _function(verbs, "ibv_get_device_list", ctypes.POINTER(pointer), pointer)(None)
        device = listed[0] if listed else None
        if not device:
            raise VerbsError("there is no device of verbs")
        self._context = self._made("ibv_open_device", device)
        self._gid_index = self._find_gid(own)
        domain = self._made("ibv_alloc_pd", self._context)
        self.memory = ctypes.create_string_buffer(SIZE)
        self._address = ctypes.addressof(self.memory)
        make = _function(verbs, "ibv_reg_mr", pointer, pointer, pointer, ctypes.c_size_t, number)
        self._region = self._checked("ibv_reg_mr", make(domain, self._address, SIZE, _ACCESS))
        make = _function(verbs, "ibv_create_cq", pointer, pointer, number, pointer, pointer, number)
        self._queue = self._checked("ibv_create_cq", make(self._context, 16, None, None, 0))
        wanted = ctypes.create_string_buffer(64)
        # Queues, then struct ibv_qp_cap, the type, and that all requests complete.
        struct.pack_into("QQ", wanted, 8, self._queue, self._queue)
        struct.pack_into("IIIIIII", wanted, 32, 8, 8, 1, 1, 0, _RC, 1)
        make = _function(verbs, "ibv_create_qp", pointer, pointer, pointer)
        self._pair = self._checked("ibv_create_qp", make(domain, wanted))

    def _made(self, name: str, argument: Any) -> int:
        make = _function(self._verbs, name, ctypes.c_void_p, ctypes.c_void_p)
        return self._checked(name, make(argument))

    def _checked(self, name: str, made: int | None) -> int:
        if not made:
            raise VerbsError(f"{name} failed: {os.strerror(ctypes.get_errno())}")
        return made

    def _find_gid(self, own: str) -> int:
        ask = _function(
            self._verbs, "ibv_query_gid", ctypes.c_int, ctypes.c_void_p, ctypes.c_uint8, ctypes.c_int, ctypes.c_void_p
        )  # fmt: skip
        self._gid = bytes(10) + b"\xff\xff" + socket.inet_aton(own)
        found = ctypes.create_string_buffer(16)
        for index in range(_GIDS):
            if ask(self._context, _PORT, index, found):
                break
            if found.raw == self._gid:
                return index
        raise VerbsError(f"{own} is no GID of the device")

    def described(self) -> dict[str, Any]:
        """What the peer needs."""
        return {
            "number": _word(self._pair, 52),
            "gid": self._gid.hex(),
            "address": self._address,
            "key": _word(self._region, 40),
        }

    def connect(self, number: int, gid: str, **_: Any) -> None:
        """Raises VerbsError."""
        attributes = ctypes.create_string_buffer(144)
        struct.pack_into("I", attributes, 0, _INIT)
        struct.pack_into("I", attributes, 32, _ACCESS)
        struct.pack_into("B", attributes, 129, _PORT)
        self._modify(attributes, _TO_INIT)
        struct.pack_into("I", attributes, 0, _RTR)
        struct.pack_into("I", attributes, 8, _MTU_1024)
        struct.pack_into("I", attributes, 20, _PSN)
        struct.pack_into("I", attributes, 28, number)
        struct.pack_into("16s", attributes, 56, bytes.fromhex(gid))
        # sgid_index, hop_limit; is_global, port_num; max_dest_rd_atomic, min_rnr_timer.
        struct.pack_into("BB", attributes, 76, self._gid_index, 64)
        struct.pack_into("BB", attributes, 85, 1, _PORT)
        struct.pack_into("BB", attributes, 127, 1, 12)
        self._modify(attributes, _TO_RTR)
        struct.pack_into("I", attributes, 0, _RTS)
        struct.pack_into("I", attributes, 24, _PSN)
        # max_rd_atomic; timeout, retry_cnt, rnr_retry.
        struct.pack_into("B", attributes, 126, 1)
        struct.pack_into("BBB", attributes, 130, 14, 7, 7)
        self._modify(attributes, _TO_RTS)

    def _modify(self, attributes: Any, mask: int) -> None:
        call = _function(
            self._verbs, "ibv_modify_qp", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int
        )  # fmt: skip
        error = call(self._pair, attributes, mask)
        if error:
            raise VerbsError(f"ibv_modify_qp failed: {os.strerror(error)}")

    def write(self, address: int, key: int, **_: Any) -> str:
        """Write random bytes into the peer's memory; their hash. Raises VerbsError."""
        content = os.urandom(SIZE)
        ctypes.memmove(self.memory, content, SIZE)
        piece = ctypes.create_string_buffer(
            struct.pack("QII", self._address, SIZE, _word(self._region, 36)), 16
        )
        request = ctypes.create_string_buffer(128)
        struct.pack_into("QQQiII", request, 0, 1, 0, ctypes.addressof(piece), 1, _WRITE, _SIGNALED)
        struct.pack_into("QI", request, 40, address, key)
        pointer = ctypes.c_void_p
        post = self._operation(_POST_SEND, pointer, pointer, pointer)
        error = post(self._pair, ctypes.addressof(request), ctypes.addressof(ctypes.c_void_p()))
        if error:
            raise VerbsError(f"ibv_post_send failed: {os.strerror(error)}")
        self._complete()
        return hashlib.sha256(content).hexdigest()

    def _operation(self, offset: int, *arguments: Any) -> Any:
        address = ctypes.c_uint64.from_address(self._context + offset).value
        return ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(address)

    def _complete(self) -> None:
        poll = self._operation(_POLL_CQ, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        completion = ctypes.create_string_buffer(48)
        end = time.monotonic() + _COMPLETING
        while time.monotonic() < end:
            count = poll(self._queue, 1, ctypes.addressof(completion))
            if count < 0:
                raise VerbsError("ibv_poll_cq failed")
            if count:
                (status,) = struct.unpack_from("I", completion, 8)
                if status:
                    raise VerbsError(f"the request has failed with status {status}")
                return
            time.sleep(0.001)
        raise VerbsError(f"the request has not completed in {_COMPLETING:g} s")

    def digest(self) -> str:
        """The hash of the memory."""
        return hashlib.sha256(self.memory.raw).hexdigest()


def serve(library: str, own: str) -> None:
    """Make a queue pair, then carry out lines of standard input, until it ends."""
    pair: QueuePair | None = None
    for line in sys.stdin:
        request = json.loads(line)
        call = request.pop("call")
        try:
            if call == "open":
                pair = QueuePair(library, own)
                value: Any = pair.described()
            else:
                assert pair is not None
                calls: dict[str, Any] = {
                    "connect": pair.connect,
                    "write": pair.write,
                    "digest": pair.digest,
                }
                value = calls[call](**request)
            answer = {"value": value}
        except (OSError, AttributeError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
