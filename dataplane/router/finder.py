"""Looks for the RDMA device that carries the underlay, now and then, in a process that the router doesn't wait for.

Devices come and go while we run: a driver is loaded, a card is reset, `rdma link delete`. What `devices.py` says is remembered
until it says something else.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from dataplane.router import devices
from dataplane.router.devices import Device, Found, IPAddress, Unusable
from dataplane.router.loop import Loop, Timer

EVERY: Final = 20.0
"""Seconds between two looks."""
PATIENCE: Final = 30.0
"""Seconds that one may take: opening a device that is being reset can."""
_MOST: Final = 1 << 20

NOT_YET: Final = Found(None, "it is being looked for")
NO_ADDRESS: Final = Found(None, "the underlay's address isn't known yet")
TOO_LONG: Final = Found(None, f"looking for devices took longer than {PATIENCE:.0f} s")


def command() -> list[str]:
    """How `devices.py` is run: by the system's own Python, for which pyverbs is packaged."""
    python = "/usr/bin/python3"
    return [python if os.access(python, os.X_OK) else sys.executable, "-P", devices.__file__]


def decode(text: str) -> Found:
    """What `devices.encode` wrote; what can't be read is a reason too."""
    try:
        made = json.loads(text)
        device = made["device"]
        return Found(
            None if device is None else Device(**device),
            str(made["why"]),
            tuple(Unusable(**each) for each in made["looked"]),
        )
    except (ValueError, KeyError, TypeError):
        return Found(None, "looking for devices failed; the plugin's log may say why")


class Finder:
    """`found` is what is known; `changed` is called when that is something else."""

    def __init__(
        self, loop: Loop, changed: Callable[[], None], start: Sequence[str] | None = None
    ) -> None:
        self._loop = loop
        self._changed = changed
        self._command = list(start if start is not None else command())
        self._address: IPAddress | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._text = bytearray()
        self._timer: Timer | None = None
        self.found = NO_ADDRESS

    def look_for(self, address: IPAddress | None) -> None:
        """The underlay's address, or None: nothing is to be looked for."""
        if address == self._address:
            return
        self._address = address
        self._end()
        self._set(NO_ADDRESS if address is None else NOT_YET)
        self.look()

    def look(self) -> None:
        """Look now: something was heard of a device. Two looks are never under way at once."""
        if self._process is not None or self._address is None:
            return
        self._cancel()
        command = [*self._command, "--address", str(self._address)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            self._set(Found(None, f"looking for devices: {error.strerror}"))
            self._timer = self._loop.after(EVERY, self.look)
            return
        self._text.clear()
        self._timer = self._loop.after(PATIENCE, self._too_long)
        self._loop.watch(self._descriptor(), select.EPOLLIN, lambda _: self._read())

    def close(self) -> None:
        """Look no more."""
        self._address = None
        self._end()

    def _descriptor(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def _read(self) -> None:
        data = os.read(self._descriptor(), 1 << 16)
        self._text += data
        if data and len(self._text) <= _MOST:
            return
        text = bytes(self._text).decode(errors="replace")
        self._end()
        self._again(decode(text))

    def _too_long(self) -> None:
        self._end()
        self._again(TOO_LONG)

    def _again(self, found: Found) -> None:
        self._timer = self._loop.after(EVERY, self.look)
        self._set(found)

    def _set(self, found: Found) -> None:
        if found != self.found:
            self.found = found
            self._changed()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._cancel()
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdout is not None
        self._loop.forget(process.stdout.fileno())
        process.stdout.close()
        # It may hang in the kernel, whose answer we don't wait for: `poll` collects it later.
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)


def offer_devices(host: Path, own: Path = Path("/dev/infiniband")) -> None:
    """libibverbs looks into /dev/infiniband: in the plugin that is the host's, which may come later."""
    if host.parent.is_dir() and not own.exists() and not own.is_symlink():
        with contextlib.suppress(OSError):
            own.symlink_to(host)
