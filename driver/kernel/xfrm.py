"""Whether the host has IPsec policies: they wrap what leaves by the ordinary way, and what leaves by another would be plain.

pyroute2 doesn't speak NETLINK_XFRM; one dump is all that is needed (linux/xfrm.h).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import Final

from driver.errors import KernelError
from driver.kernel.namespace import in_netns

_NETLINK_XFRM: Final = 6
_NEWPOLICY: Final = 0x13
_GETPOLICY: Final = 0x15
_REQUEST_DUMP: Final = 0x1 | 0x300
_ERROR, _DONE = 2, 3
_HEADER: Final = struct.Struct("=IHHII")
_POLICY_ID: Final = 64
"""Size of struct xfrm_userpolicy_id; all zero: any."""


class Policies:
    """The policies of a network namespace, given by its descriptor."""

    def __init__(self, namespace: int) -> None:
        self._socket: socket.socket | None = None
        # EPROTONOSUPPORT: a kernel without IPsec.
        with contextlib.suppress(OSError):
            self._socket = in_netns(
                namespace, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_XFRM)
            )
            self._socket.settimeout(5)

    def exist(self) -> bool:
        """Whether there are any.

        Raises:
            KernelError: it can't be told.
        """
        if self._socket is None:
            return False
        try:
            return self._ask(self._socket)
        except OSError as error:
            raise KernelError(f"IPsec policies can't be listed: {error.strerror}") from error

    @staticmethod
    def _ask(asking: socket.socket) -> bool:
        request = bytes(_POLICY_ID)
        asking.send(
            _HEADER.pack(_HEADER.size + len(request), _GETPOLICY, _REQUEST_DUMP, 1, 0) + request
        )
        found = False
        while True:
            answer = asking.recv(1 << 16)
            offset = 0
            while offset + _HEADER.size <= len(answer):
                length, kind, *_ = _HEADER.unpack_from(answer, offset)
                if kind == _ERROR:
                    code = -struct.unpack_from("=i", answer, offset + _HEADER.size)[0]
                    raise OSError(code, os.strerror(code))
                if kind == _DONE or length < _HEADER.size:
                    return found
                found |= kind == _NEWPOLICY
                offset += (length + 3) & ~3

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
