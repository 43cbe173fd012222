"""Whether rules of the host may apply to the packets that a bridge forwards.

There are two kinds. br_netfilter passes such packets to the rules for IP, if a setting says so:
https://docs.kernel.org/networking/ip-sysctl.html, bridge-nf-call-iptables. A bridge has its own
settings beside those of its namespace: IFLA_BR_NF_CALL_IPTABLES of linux/if_link.h. And nftables
has tables of the families bridge, which ebtables uses too (not ebtables-legacy), and netdev.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dataplane.nlmsg import Netlink, attribute, attributes

# linux/rtnetlink.h, linux/if_link.h
_GETLINK: Final = 18
_IFLA_IFNAME: Final = 3
_IFLA_LINKINFO: Final = 18
_INFO_DATA: Final = 2
_CALL: Final = {4: 36, 6: 37}
_IFINFO: Final = struct.Struct("=BxHiII")
_TIMEOUT: Final = 1.0

# linux/netfilter/nfnetlink.h, nf_tables.h, linux/netfilter.h
_NETLINK_NETFILTER: Final = 12
_GETTABLE: Final = 10 << 8 | 1
_NFGEN: Final = struct.Struct("!BBH")
_NFPROTO_NETDEV: Final = 5
_NFPROTO_BRIDGE: Final = 7
_NO_NFTABLES: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT)
"""What the kernel answers without nf_tables."""

_ALL: Final = {4: "bridge-nf-call-iptables", 6: "bridge-nf-call-ip6tables"}


def _netlink(protocol: int) -> contextlib.closing[Netlink]:
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    channel.settimeout(_TIMEOUT)
    return contextlib.closing(Netlink(channel))


def has_tables() -> bool:
    """Whether this process's network namespace has a table of the families bridge or netdev.

    True too if the kernel doesn't tell.
    """
    try:
        with _netlink(_NETLINK_NETFILTER) as netlink:
            return any(
                netlink.dump(_GETTABLE, _NFGEN.pack(family, 0, 0))
                for family in (_NFPROTO_BRIDGE, _NFPROTO_NETDEV)
            )
    except OSError as error:
        return error.errno not in _NO_NFTABLES


def own_setting(bridge: str, version: int) -> bool:
    """The setting of a bridge in this process's network namespace.

    Raises:
        OSError, ValueError, KeyError: there is no such bridge, or the kernel doesn't tell.
    """
    with _netlink(socket.NETLINK_ROUTE) as netlink:
        name = attribute(_IFLA_IFNAME, bridge.encode() + b"\0")
        link = netlink.get(_GETLINK, _IFINFO.pack(0, 0, 0, 0, 0) + name)
    info = dict(attributes(link, _IFINFO.size))[_IFLA_LINKINFO]
    return any(dict(attributes(dict(attributes(info))[_INFO_DATA]))[_CALL[version]])


def is_filtered(
    bridge: str,
    version: int,
    root: Path = Path("/"),
    own: Callable[[str, int], bool] = own_setting,
) -> bool:
    """Whether packets of this IP version pass the hooks of this process's network namespace.

    A setting that can't be read counts as on. `root` and `own` are for tests.
    """
    settings = root / "proc/sys/net/bridge"
    if not settings.exists():
        # br_netfilter isn't loaded.
        return False
    try:
        return (settings / _ALL[version]).read_text().strip() != "0" or own(bridge, version)
    except (OSError, ValueError, KeyError):
        return True
