"""Netlink sockets in namespaces in which a container may send to them."""

from __future__ import annotations

import socket

import pytest

from dataplane.nlmsg import HEADER, Netlink

_GET_LINK = 18
_LOOPBACK = b"\0\0\0\0" + (1).to_bytes(4, "little") + bytes(8)


def test_only_the_kernel_answers() -> None:
    """Another process of the namespace, whatever it may, can't put an answer into a socket."""
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    made.bind((0, 0))
    made.settimeout(1)
    number, _ = made.getsockname()
    netlink = Netlink(made)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as hostile:
        for sequence in range(1, 4):
            with pytest.raises(ConnectionRefusedError):
                hostile.sendto(HEADER.pack(HEADER.size, 16, 0, sequence, 0), (number, 0))
    assert len(netlink.get(_GET_LINK, _LOOPBACK)) > HEADER.size
    netlink.close()
