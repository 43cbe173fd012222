"""Arenas as memfds of a fixed size, so that no process can shrink memory that another has mapped.

Pages cost nothing until they are touched. A slot's pages are reclaimed as soon as its connection
has ended. Its headers are cleared again before the next connection uses it, since either side can
still write there.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from typing import Final

from dataplane.errors import KernelRefused
from dataplane.router import layout
from dataplane.router.seams import Sent

_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_INCARNATION: Final = struct.Struct("=Q")
_SENT: Final = struct.Struct(f"=Q{layout.MESSAGES_OFFSET - 8}xQ")
"""In struct ring: tail and messages."""
_RING: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_YES: Final = struct.pack("=I", 1)

F_SEAL_FUTURE_WRITE: Final = 0x10  # linux/fcntl.h
SO_PASSRIGHTS: Final = 83  # asm-generic/socket.h, since Linux 6.16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def _punch(memory: int, offset: int, length: int) -> bool:
    return bool(_libc.fallocate(memory, _PUNCH_HOLE | _KEEP_SIZE, offset, length) == 0)


def _is_ring(size: int, remote: bool) -> bool:
    if not remote:
        return size == layout.RING_SIZE
    return layout.REMOTE_RING_LEAST <= size <= layout.REMOTE_RING_MOST and not size & (size - 1)


def refuse_rights(guarded: socket.socket) -> bool:
    """Make the kernel refuse descriptors that are sent to a unix socket; false if it can't.

    The receiver of a descriptor may have to do its last close(), which can wait for as long as the
    sender likes.
    """
    try:
        guarded.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


class LinuxArenaMemory:
    """`ArenaMemory` on memfds and sockets.

    `guards=False`: as on kernels that can't refuse descriptors.
    """

    def __init__(self, *, guards: bool = True) -> None:
        self._guards = guards

    def make(self, ring_size: int = layout.RING_SIZE, remote: bool = False) -> int:
        """A new arena. A remote arena's rings have REMOTE_RING_LEAST to REMOTE_RING_MOST bytes.

        Raises:
            KernelRefused: the kernel has no memory or descriptor for it.
            ValueError: an arena of this kind can't have such rings.
        """
        if not _is_ring(ring_size, remote):
            raise ValueError(
                f"rings of {ring_size} bytes in an arena that is{'' if remote else ' not'} remote"
            )
        try:
            memory = os.memfd_create("freeflow", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise KernelRefused(
                "cannot make an arena", cause=error.strerror or str(error)
            ) from error
        try:
            os.ftruncate(memory, layout.arena_size(ring_size))
            header = layout.HEADER.pack(layout.MAGIC, layout.VERSION, ring_size, remote)
            os.pwrite(memory, header, 0)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
        except OSError as error:
            os.close(memory)
            raise KernelRefused(
                "cannot make an arena", cause=error.strerror or str(error)
            ) from error
        return memory

    def make_file(self, size: int) -> int:
        """Memory for what a process registers, which nobody can shrink. Raises KernelRefused."""
        memory = -1
        try:
            memory = os.memfd_create("freeflow", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(memory, size)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError as error:
            if memory >= 0:
                os.close(memory)
            raise KernelRefused(
                "cannot make a file for memory", cause=error.strerror or str(error)
            ) from error
        return memory

    def protect(self, memory: int) -> None:
        """See `ArenaMemory`. A process that has the file open can't undo it."""
        try:
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        except OSError as error:
            raise KernelRefused("cannot seal a file", cause=error.strerror or str(error)) from error

    def prepare(self, memory: int, slot: int, incarnation: int) -> None:
        """Clear the headers of a slot's rings and write its new incarnation. Raises KernelRefused.

        The bytes after the headers may be what a process wrote after the slot was released. They
        are not read before the sender has overwritten them.
        """
        header = bytearray(layout.RING_HEADER)
        _INCARNATION.pack_into(header, layout.INCARNATION_OFFSET, incarnation)
        try:
            for direction in range(layout.SIDES):
                os.pwrite(memory, header, layout.ring_offset(slot, direction))
        except OSError as error:
            raise KernelRefused(
                "cannot prepare a slot", cause=error.strerror or str(error)
            ) from error

    def leave(self, memory: int, slot: int) -> None:
        for direction in range(layout.SIDES):
            with contextlib.suppress(OSError):
                os.pwrite(memory, _YES, layout.ring_offset(slot, direction) + layout.STOP_OFFSET)

    def sever(self, memory: int, slot: int) -> None:
        for direction in range(layout.SIDES):
            with contextlib.suppress(OSError):
                os.pwrite(memory, _YES, layout.ring_offset(slot, direction) + layout.BROKEN_OFFSET)

    def finish(self, memory: int, slot: int) -> None:
        self.leave(memory, slot)
        with contextlib.suppress(OSError):
            os.pwrite(memory, _YES, layout.ring_offset(slot, 1) + layout.OVER_OFFSET)

    def alarm(self, memory: int) -> None:
        """Have the process check all slots of a remote arena when its bells ring.

        All bits are set: setting one would overwrite bits that are set meanwhile.
        """
        with contextlib.suppress(OSError):
            os.pwrite(memory, b"\xff" * (8 * layout.BELLS), layout.DIRTY_OFFSET)

    def make_bell(self) -> tuple[int, int]:
        """A new bell: its hearing end and its ringing end. Raises KernelRefused.

        Nothing can be sent to the ringing end, and no descriptors to the hearing end. A process
        that has the hearing end can undo the latter. So the router closes its own copy before
        anybody gets the ringing end.
        """
        try:
            hears, rings = socket.socketpair(
                socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK
            )
        except OSError as error:
            raise KernelRefused("cannot make a bell", cause=error.strerror or str(error)) from error
        rings.shutdown(socket.SHUT_RD)
        if self._guards:
            refuse_rights(hears)
        return hears.detach(), rings.detach()

    def close_hearing(self, descriptor: int) -> None:
        os.close(descriptor)

    def ring(self, descriptor: int) -> None:
        """Ring a bell. A bell whose buffer is full has been rung already."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as bell:
            bell.send(b"!", _RING)

    def reclaim(self, memory: int, slot: int) -> bool:
        """Reclaim the pages of a slot; false if the kernel can't.

        Not to be called while a device has them registered.
        """
        size = layout.ring_size_of(os.fstat(memory).st_size)
        return _punch(memory, layout.ring_offset(slot, 0), layout.SIDES * layout.PAGE) and _punch(
            memory, layout.bulk_offset(slot, 0, size), layout.SIDES * size
        )

    def sent(self, memory: int, slot: int) -> tuple[Sent, Sent] | None:
        try:
            one, other = (
                Sent(*_SENT.unpack(os.pread(memory, _SENT.size, layout.ring_offset(slot, way))))
                for way in range(layout.SIDES)
            )
        except (OSError, struct.error):
            return None
        return one, other

    def used(self, memory: int) -> int:
        return os.fstat(memory).st_blocks * 512

    def close(self, memory: int) -> None:
        """Close the memfd. Its pages stay as long as a process has them mapped."""
        os.close(memory)

    def close_bell(self, descriptor: int) -> None:
        os.close(descriptor)
