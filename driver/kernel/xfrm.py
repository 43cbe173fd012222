"""Whether the host has IPsec policies: the kernel encrypts packets by them, the fast path would
not.

pyroute2 has no NETLINK_XFRM; one dump is all that is needed (linux/xfrm.h).
"""

from __future__ import annotations

import contextlib
import socket
from typing import Final

from dataplane.nlmsg import Netlink
from driver.errors import reporting
from driver.kernel.namespace import in_netns

_NETLINK_XFRM: Final = 6
_GETPOLICY: Final = 0x15
_POLICY_ID: Final = 64
"""Size of struct xfrm_userpolicy_id; all zero: any."""


class Policies:
    """The policies of a network namespace, given by its descriptor."""

    def __init__(self, namespace: int) -> None:
        self._netlink: Netlink | None = None
        # EPROTONOSUPPORT: a kernel without IPsec.
        with contextlib.suppress(OSError):
            channel = in_netns(
                namespace, lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_XFRM)
            )
            channel.settimeout(5)
            self._netlink = Netlink(channel)

    def exist(self) -> bool:
        """Whether there are any.

        Raises:
            KernelError: they can't be listed.
        """
        if self._netlink is None:
            return False
        with reporting("IPsec policies can't be listed"):
            return bool(self._netlink.dump(_GETPOLICY, bytes(_POLICY_ID)))

    def close(self) -> None:
        if self._netlink is not None:
            self._netlink.close()
