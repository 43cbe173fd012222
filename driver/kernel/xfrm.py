"""Whether the host has IPsec policies: the kernel encrypts packets by them, the fast path would
not.

pyroute2 has no NETLINK_XFRM; one dump is all that is needed (linux/xfrm.h).
"""

from __future__ import annotations

import contextlib
import socket
from typing import Final

from driver.errors import DOCTOR, KernelError
from driver.kernel.namespace import in_netns
from driver.kernel.nlmsg import DONE, DUMP, ERROR, check, message, messages

_NETLINK_XFRM: Final = 6
_NEWPOLICY: Final = 0x13
_GETPOLICY: Final = 0x15
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
            KernelError: they can't be listed.
        """
        if self._socket is None:
            return False
        try:
            return self._list(self._socket)
        except OSError as error:
            raise KernelError(
                "IPsec policies can't be listed", cause=str(error.strerror), remedy=DOCTOR
            ) from error

    @staticmethod
    def _list(netlink: socket.socket) -> bool:
        netlink.send(message(_GETPOLICY, DUMP, 1, bytes(_POLICY_ID)))
        found = False
        while True:
            for kind, _, _, body in messages(netlink.recv(1 << 16)):
                if kind == ERROR:
                    check(body)
                if kind in (ERROR, DONE):
                    return found
                found |= kind == _NEWPOLICY

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
