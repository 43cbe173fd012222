"""Scans for the RDMA device of the underlay's address, every 20 s, in a process of its own.

Devices come and go while the router runs: a driver is loaded, a NIC is reset, `rdma link delete`.
The result of a scan by `devices.py` holds until the next. The router never waits for a scan.
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
from dataplane.router.devices import Device, DeviceScan, IPAddress, Unusable
from dataplane.router.loop import Loop, Timer

EVERY: Final = 20.0
"""Seconds between two scans."""
PATIENCE: Final = 30.0
"""Seconds for one scan: opening a device that is being reset takes time."""
_MOST: Final = 1 << 20
"""Bytes of its result."""

NOT_YET: Final = DeviceScan(None, "scanning for RDMA devices")
NO_ADDRESS: Final = DeviceScan(None, "the underlay's address isn't known yet")
TOO_LONG: Final = DeviceScan(None, f"the scan for RDMA devices took longer than {PATIENCE:.0f} s")


def command() -> list[str]:
    """The command of a scan. The system's own Python runs `devices.py`: pyverbs is packaged for
    it.
    """
    python = "/usr/bin/python3"
    return [python if os.access(python, os.X_OK) else sys.executable, "-P", devices.__file__]


def decode(text: str) -> DeviceScan:
    """The result of a scan, as `devices.encode` wrote it. An invalid text gives a reason, too."""
    try:
        made = json.loads(text)
        device = made["device"]
        return DeviceScan(
            None if device is None else Device(**device),
            str(made["why"]),
            tuple(Unusable(**entry) for entry in made["unusable"]),
        )
    except (ValueError, KeyError, TypeError):
        return DeviceScan(None, "the scan for RDMA devices failed; see the plugin's log")


class DeviceScanner:
    """`result` is that of the last scan. `changed` is called when it is another one than before."""

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
        self.result = NO_ADDRESS

    def use(self, address: IPAddress | None) -> None:
        """Scan for a device with this address, the underlay's. None: don't scan."""
        if address == self._address:
            return
        self._address = address
        self._end()
        self._set(NO_ADDRESS if address is None else NOT_YET)
        self.scan()

    def scan(self) -> None:
        """Scan now: a device may have changed. Only one scan runs at a time."""
        if self._process is not None or self._address is None:
            return
        self._cancel()
        command = [*self._command, "--address", str(self._address)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            self._set(
                DeviceScan(None, f"the scan for RDMA devices can't be started: {error.strerror}")
            )
            self._timer = self._loop.after(EVERY, self.scan)
            return
        self._text.clear()
        self._timer = self._loop.after(PATIENCE, self._too_long)
        self._loop.watch(self._descriptor(), select.EPOLLIN, lambda _: self._read())

    def close(self) -> None:
        """Stop scanning."""
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

    def _again(self, result: DeviceScan) -> None:
        self._timer = self._loop.after(EVERY, self.scan)
        self._set(result)

    def _set(self, result: DeviceScan) -> None:
        if result != self.result:
            self.result = result
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
        # It may hang in a system call. We don't wait for its end: a later `poll` of Popen's reaps
        # it.
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)


def offer_devices(host: Path, own: Path = Path("/dev/infiniband")) -> None:
    """Make /dev/infiniband, which libibverbs reads, a link to the host's, which may appear
    later.
    """
    if host.parent.is_dir() and not own.exists() and not own.is_symlink():
        with contextlib.suppress(OSError):
            own.symlink_to(host)
