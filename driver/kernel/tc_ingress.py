"""eBPF programs on devices, at tc ingress.

They are pinned tcx links (Linux 6.6), whose program a restarted plugin replaces atomically. Without
tcx they are filters of a clsact qdisc, replaced in place too, and identified by their name. On a
device that isn't ours our program comes last: programs of others see every packet first, and
packets that they consume or redirect never reach ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from dataplane.ebpf import detach_link, link_device, pin, pinned, update_link
from driver.errors import reporting
from driver.kernel.namespace import in_netns
from driver.kernel.netlink import Sockets, requesting

NAME: Final = "freeflow"
_INGRESS: Final = 0xFFFFFFF2
"""TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS), linux/pkt_sched.h."""
_EGRESS: Final = 0xFFFFFFF3
_ETH_P_ALL: Final = 0x0003
_PRIORITY: Final = 49999
"""After the filters of others: tc(8) assigns priorities from 49152 downwards."""
_HANDLE: Final = 1
_NO_TCX: Final = (errno.EINVAL, errno.EOPNOTSUPP)
_INFO: Final = (_PRIORITY << 16) | (_ETH_P_ALL << 8)


class Hooks:
    """Our programs on the devices of one namespace.

    `kind` names the namespace in pins, since two namespaces use the same indexes. `tcx`: false to
    do without it.
    """

    def __init__(
        self, kind: str, namespace: int, sockets: Sockets, admin: Path, *, tcx: bool = True
    ) -> None:
        self._namespace = namespace
        self._sockets = sockets
        self._links = admin / "bpf" / f"links-{kind}"
        self._filters = admin / f"filters-{kind}"
        """Devices with a filter of ours, and whether the qdisc is ours: a BPF file system can't
        hold that."""
        self._tcx = tcx

    def devices(self) -> set[int]:
        """Indexes of the devices with our program, or with one until they were deleted."""
        found: set[int] = set()
        for folder in (self._links, self._filters):
            if folder.is_dir():
                found |= {int(path.name) for path in folder.iterdir()}
        return found

    def attach(self, index: int, program: int) -> None:
        """Attach a program to a device, in place of an earlier one of ours.

        Raises:
            KernelError, KernelRefused: it can't be attached.
        """
        if self._update(index, program):
            return
        link = None
        with reporting(f"linking a program to device {index}", ignore=_NO_TCX):
            if self._tcx:
                link = in_netns(self._namespace, lambda: link_device(program, index))
        if link is None:
            self._attach_filter(index, program)
            return
        try:
            self._links.mkdir(exist_ok=True)
            pin(link, self._links / str(index))
        finally:
            os.close(link)

    def _update(self, index: int, program: int) -> bool:
        """Replace the program of a link; false if there is none."""
        pinned_at = self._links / str(index)
        link = pinned(pinned_at) if self._links.is_dir() else None
        if link is None:
            return False
        try:
            update_link(link, program)
        except OSError:
            # Its device is gone, or another process has detached it.
            pinned_at.unlink()
            return False
        finally:
            os.close(link)
        return True

    def _attach_filter(self, index: int, program: int) -> None:
        what = f"attaching a program to device {index}"
        with requesting(what), self._sockets.take() as route:
            ours = _add_qdisc(route, index)
            self._filters.mkdir(exist_ok=True)
            note = self._filters / str(index)
            if ours or not note.exists():
                note.write_text("qdisc" if ours else "filter")
            route.tc(
                "replace-filter",
                "bpf",
                index,
                _HANDLE,
                info=_INFO,
                parent=_INGRESS,
                fd=program,
                name=NAME,
                classid=1,
                direct_action=True,
            )

    def detach(self, index: int) -> None:
        """Detach our program, if there is one, and delete our qdisc if nobody else uses it."""
        self._detach_link(self._links / str(index))
        note = self._filters / str(index)
        if not note.exists():
            return
        with self._sockets.take() as route:
            with contextlib.suppress(NetlinkError):
                route.tc("del-filter", "bpf", index, _HANDLE, info=_INFO, parent=_INGRESS)
            others = any(
                item.get_attr("TCA_KIND")
                for parent in (_INGRESS, _EGRESS)
                for item in _filters(route, index, parent)
            )
            if note.read_text() == "qdisc" and not others:
                with contextlib.suppress(NetlinkError):
                    route.tc("del", "clsact", index)
        note.unlink()

    def _detach_link(self, pinned_at: Path) -> None:
        link = pinned(pinned_at) if self._links.is_dir() else None
        if link is not None:
            detach_link(link)
            os.close(link)
            pinned_at.unlink()

    def detach_all(self) -> list[int]:
        """Detach our programs from all devices; returns their indexes."""
        found = sorted(self.devices())
        for index in found:
            self.detach(index)
        for folder in (self._links, self._filters):
            with contextlib.suppress(OSError):
                folder.rmdir()
        return found


def _add_qdisc(route: IPRoute, index: int) -> bool:
    """False if the device has one."""
    try:
        route.tc("add", "clsact", index)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise
        return False
    return True


def _filters(route: IPRoute, index: int, parent: int) -> tuple[Any, ...]:
    try:
        return tuple(route.get_filters(index=index, parent=parent))
    except NetlinkError:
        return ()
