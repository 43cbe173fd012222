"""Programs on devices, at the hook where packets come in.

They are tcx links (Linux 6.6), pinned: a restarted plugin puts another program in their place without a moment between.
Where there is no tcx, they are filters of a clsact qdisc, replaced in place too, and told from others' by their name. On a
device that isn't ours alone ours comes last: what others attach sees every packet first, and what they keep or redirect
never reaches ours; whatever isn't the overlay's goes on to those behind.
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
from driver.errors import DOCTOR, KernelError
from driver.kernel.namespace import in_netns
from driver.kernel.netlink import Sockets, translate

NAME: Final = "freeflow"
_INGRESS: Final = 0xFFFFFFF2
"""TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS), linux/pkt_sched.h."""
_EGRESS: Final = 0xFFFFFFF3
_ETH_P_ALL: Final = 0x0003
_PRIORITY: Final = 49999
"""Behind all that others attach: tc(8) counts down from 49152 by itself."""
_HANDLE: Final = 1
_NO_TCX: Final = (errno.EINVAL, errno.EOPNOTSUPP)
_INFO: Final = (_PRIORITY << 16) | (_ETH_P_ALL << 8)


class Hooks:
    """Our programs on the devices of one namespace.

    `kind` names the namespace in pins: indexes of two namespaces are the same numbers. `tcx`: false to do without it.
    """

    def __init__(
        self, kind: str, namespace: int, sockets: Sockets, admin: Path, *, tcx: bool = True
    ) -> None:
        self._namespace = namespace
        self._sockets = sockets
        self._links = admin / "bpf" / f"links-{kind}"
        self._filters = admin / f"filters-{kind}"
        """What a BPF file system can't hold: devices with a filter of ours, and whether their qdisc is ours too."""
        self._tcx = tcx

    def devices(self) -> set[int]:
        """Indexes of the devices that have one, or had when they went."""
        found: set[int] = set()
        for folder in (self._links, self._filters):
            if folder.is_dir():
                found |= {int(each.name) for each in folder.iterdir()}
        return found

    def attach(self, index: int, program: int) -> None:
        """Put a program on a device, in the place of an earlier one of ours.

        Raises:
            KernelError, KernelRefused: it can't be.
        """
        if self._update(index, program):
            return
        try:
            if not self._tcx:
                raise OSError(errno.EOPNOTSUPP, "not to be used")
            link = in_netns(self._namespace, lambda: link_device(program, index))
        except OSError as error:
            if error.errno not in _NO_TCX:
                raise KernelError(
                    f"linking a program to device {index}",
                    cause=os.strerror(error.errno or 0),
                    remedy=DOCTOR,
                ) from error
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
            # Its device has gone, or somebody has detached it.
            pinned_at.unlink()
            return False
        finally:
            os.close(link)
        return True

    def _attach_filter(self, index: int, program: int) -> None:
        with self._sockets.take() as route:
            try:
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
            except NetlinkError as error:
                raise translate(error, f"attaching a program to device {index}") from error

    def detach(self, index: int) -> None:
        """Take ours off a device, and the qdisc if we made it and nobody else uses it; absence is fine."""
        self._detach_link(self._links / str(index))
        note = self._filters / str(index)
        if not note.exists():
            return
        with self._sockets.take() as route:
            with contextlib.suppress(NetlinkError):
                route.tc("del-filter", "bpf", index, _HANDLE, info=_INFO, parent=_INGRESS)
            others = any(
                each.get_attr("TCA_KIND")
                for parent in (_INGRESS, _EGRESS)
                for each in _filters(route, index, parent)
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
        """Take ours off all devices; their indexes."""
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
