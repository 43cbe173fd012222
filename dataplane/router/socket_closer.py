"""Closes containers' sockets without waiting.

When a unix socket closes, the kernel drops what is still in its queue. There may be descriptors in
it, and the last close() of one, for example of a TCP socket with SO_LINGER, can wait for as long as
its sender likes. So a socket that may have descriptors in its queue is given to another process,
which is then killed: the sockets of a process that ends don't linger.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Final

import structlog

log = structlog.get_logger()

MOST: Final = 512
"""Sockets that may wait to be closed."""
_LOOK: Final = int(socket.MSG_DONTWAIT | socket.MSG_PEEK)
_WAITS: Final = (sys.executable, "-I", "-S", "-c", "import os; os.read(0, 1)")


class Closer:
    """Closes SOCK_SEQPACKET sockets, at once or at the next call of `work`."""

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._children: list[subprocess.Popen[bytes]] = []

    def close(self, connection: socket.socket) -> None:
        """Close a socket, at once if its queue is empty and nothing more can come."""
        if _is_empty(connection):
            connection.close()
        else:
            self.give(connection)

    def give(self, connection: socket.socket) -> None:
        """Close a socket at the next call of `work`, whatever is in its queue."""
        self._pending.append(connection.detach())
        if len(self._pending) >= MOST:
            self.work()

    def work(self) -> None:
        """Close the sockets that wait, by the end of a process. To be called regularly."""
        self._children = [child for child in self._children if child.poll() is None]
        if not self._pending:
            return
        try:
            child = subprocess.Popen(
                _WAITS,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=self._pending,
            )
        except OSError as error:
            log.error("cannot close sockets for now", reason=str(error))
            return
        # The child has them, so this is not the last close.
        for descriptor in self._pending:
            os.close(descriptor)
        self._pending.clear()
        child.kill()
        assert child.stdin is not None
        child.stdin.close()
        self._children.append(child)


def _is_empty(connection: socket.socket) -> bool:
    """Whether the queue is empty. Nothing can be sent to the socket from now on.

    With SO_PASSCRED even an empty packet has a control message. There is no room for it here, so
    MSG_CTRUNC tells an empty packet from the end of the connection.
    """
    try:
        connection.shutdown(socket.SHUT_RDWR)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        data, _, flags, _ = connection.recvmsg(1, 0, _LOOK)
    except OSError:
        return False
    return not data and not flags & socket.MSG_CTRUNC
