"""Closing containers' sockets without waiting.

A unix socket that is closed drops what is still in its queue. Descriptors may be among that, and the last close() of one, say
of a TCP socket with SO_LINGER, waits for as long as its sender likes. So a socket that may have some in its queue is closed by
the end of another process: what ends is never made to linger.
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
"""Sockets that wait to be closed."""
_LOOK: Final = int(socket.MSG_DONTWAIT | socket.MSG_PEEK)
_WAITS: Final = (sys.executable, "-I", "-S", "-c", "import os; os.read(0, 1)")


class Closer:
    """Closes sockets of SOCK_SEQPACKET, now or with the next `work`."""

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._children: list[subprocess.Popen[bytes]] = []

    def close(self, connection: socket.socket) -> None:
        """Close it now if nothing is in its queue and nothing can come."""
        if _is_empty(connection):
            connection.close()
        else:
            self.give(connection)

    def give(self, connection: socket.socket) -> None:
        """Close it with the next `work`, whatever is in it."""
        self._pending.append(connection.detach())
        if len(self._pending) >= MOST:
            self.work()

    def work(self) -> None:
        """Give away what waits, and end the process that got it. To be called now and then."""
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
            log.error("sockets can't be closed for now", reason=str(error))
            return
        # The child has them: ours isn't the last close.
        for descriptor in self._pending:
            os.close(descriptor)
        self._pending.clear()
        child.kill()
        assert child.stdin is not None
        child.stdin.close()
        self._children.append(child)


def _is_empty(connection: socket.socket) -> bool:
    """Whether nothing is in the queue. Nothing can be sent to it from now on.

    With SO_PASSCRED even an empty packet has a control message, for which there is no room: so the end can be told from it.
    """
    try:
        connection.shutdown(socket.SHUT_RDWR)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        data, _, flags, _ = connection.recvmsg(1, 0, _LOOK)
    except OSError:
        return False
    return not data and not flags & socket.MSG_CTRUNC
