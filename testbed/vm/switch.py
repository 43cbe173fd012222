"""The wire between guests: a learning switch in this process, which can drop a guest's frames.

A guest's NIC is one end of a pair of datagram sockets, so no frame can leave for anywhere else. A
frame waits while its receiver's queue is full; past `_QUEUE` frames it is lost, as in a real
switch.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from testbed.vm.capture import WireCapture

_QUEUE: Final = 4096
_FRAME: Final = 1 << 17
"""More than virtio's largest frame: 64 KiB with segmentation offload."""


@dataclass(eq=False)
class _Port:
    number: int
    end: socket.socket
    waiting: deque[bytes] = field(default_factory=deque)


class Switch:
    """A switch whose ports have the guests' numbers."""

    def __init__(self) -> None:
        self._ports: dict[int, _Port] = {}
        self._learned: dict[bytes, int] = {}
        self._cut: frozenset[int] = frozenset()
        self._captures: frozenset[WireCapture] = frozenset()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="wire", daemon=True)
        self._thread.start()

    def plug(self, number: int) -> socket.socket:
        """Connect a guest; return its end for QEMU, which the caller closes. It replaces an older
        one.
        """
        mine, guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        mine.setblocking(False)
        for end in (mine, guest):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        with self._lock:
            self._unplug(number)
            self._ports[number] = port = _Port(number, mine)
            self._selector.register(mine, selectors.EVENT_READ, port)
        self._wake.send(b".")
        return guest

    def unplug(self, number: int) -> None:
        with self._lock:
            self._unplug(number)

    def cut(self, number: int) -> None:
        """Drop all frames from and to a guest, without its knowledge."""
        self._cut |= {number}

    def heal(self, number: int) -> None:
        self._cut -= {number}

    @contextlib.contextmanager
    def capture(self, *marks: bytes) -> Iterator[WireCapture]:
        """Capture every frame that a guest sends, those to a guest that was cut off too."""
        capture = WireCapture(marks)
        self._captures |= {capture}
        try:
            yield capture
        finally:
            self._captures -= {capture}

    def close(self) -> None:
        self._ended = True
        self._wake.send(b".")
        self._thread.join()
        for number in list(self._ports):
            self._unplug(number)
        self._selector.close()
        self._wake.close()
        self._woken.close()

    def _unplug(self, number: int) -> None:
        port = self._ports.pop(number, None)
        if port is not None:
            self._selector.unregister(port.end)
            port.end.close()

    def _run(self) -> None:
        while not self._ended:
            ready = self._selector.select()
            with self._lock:
                for key, events in ready:
                    port: _Port | None = key.data
                    if port is None:
                        self._woken.recv(64)
                    elif self._ports.get(port.number) is port:
                        if events & selectors.EVENT_WRITE:
                            self._drain(port)
                        if events & selectors.EVENT_READ:
                            self._take(port)

    def _take(self, port: _Port) -> None:
        for _ in range(64):
            try:
                frame = port.end.recv(_FRAME)
            except OSError:
                return  # There is no more, or the guest was switched off.
            if not frame:
                return
            for capture in self._captures:
                capture.take(port.number, frame)
            self._learned[frame[6:12]] = port.number
            known = self._ports.get(self._learned.get(frame[:6], 0))
            for other in [known] if known is not None else list(self._ports.values()):
                if other is not port and not self._cut & {port.number, other.number}:
                    self._give(other, frame)

    def _give(self, port: _Port, frame: bytes) -> None:
        if not port.waiting:
            try:
                port.end.send(frame)
                return
            except BlockingIOError:
                self._selector.modify(port.end, selectors.EVENT_READ | selectors.EVENT_WRITE, port)
            except OSError:
                return
        if len(port.waiting) < _QUEUE:
            port.waiting.append(frame)

    def _drain(self, port: _Port) -> None:
        try:
            while port.waiting:
                port.end.send(port.waiting[0])
                port.waiting.popleft()
        except BlockingIOError:
            return
        except OSError:
            port.waiting.clear()
        self._selector.modify(port.end, selectors.EVENT_READ, port)
