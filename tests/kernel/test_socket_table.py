"""Lists of the TCP sockets of many namespaces."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

import pytest
from pyroute2 import IPRoute

from dataplane.router import netlink_socket
from dataplane.router.socket_table import Namespaces
from dataplane.threads import in_thread
from driver.kernel.namespace import in_netns
from testbed.kernel_hosts import new_namespace


def connect() -> list[socket.socket]:
    """Both ends of a connection over loopback, in a new namespace."""
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return [client, listener.accept()[0]]


def test_lists_of_many_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of many namespaces has the connections of each, and needs one thread for dozens of
    them; namespaces that can't be entered are missing.
    """
    threads: list[object] = []

    def counted(do: Callable[[], object]) -> object:
        threads.append(do)
        return in_thread(do)

    monkeypatch.setattr(netlink_socket, "in_thread", counted)
    made = [new_namespace() for _ in range(20)]
    table = Namespaces(lambda _: None, time.monotonic)
    inodes = [table.hold(os.dup(each)) for each in made]

    ends = [in_netns(each, connect) for each in made[:2]]
    with table.lists([*inodes, 1]) as diags:
        found = {
            inode: sum(each is not None for each in diag.connected())
            for inode, diag in diags.items()
        }
    assert found == {inode: 2 if at < 2 else 0 for at, inode in enumerate(inodes)}
    assert len(threads) == 1
    for pair in ends:
        for end in pair:
            end.close()
    table.close()
    for each in made:
        os.close(each)
