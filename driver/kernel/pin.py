"""The overlay namespace: one network namespace per host that holds our bridges, VXLAN devices and host-side veths.

It is pinned by a bind mount in the host's /run, so that it outlives the plugin's process. That needs a shared
mount underneath (mount_namespaces(7)): without one the pin would die with the plugin's own mount namespace, and every
container's network with it; so it isn't made then. Nothing in it has an address: it is layer 2 only.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dataplane.threads import in_thread
from driver.errors import DOCTOR, KernelError
from driver.kernel.namespace import (
    CLONE_NEWNET,
    OVERLAY_PIN,
    check,
    in_netns,
    is_namespace,
    is_shared,
    libc,
)

_CLONE_NEWNS: Final = 0x00020000
_MS_BIND: Final = 4096
_MS_REC: Final = 16384
_MS_PRIVATE: Final = 1 << 18
_MNT_DETACH: Final = 2

_OWN_PROC: Final = Path("/proc")
_SYSCTLS: Final = {
    # Docker has br_netfilter in the kernel: here nobody wants bridged frames to pass iptables.
    "bridge/bridge-nf-call-iptables": "0",
    "bridge/bridge-nf-call-ip6tables": "0",
    "bridge/bridge-nf-call-arptables": "0",
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv6/conf/default/disable_ipv6": "1",
    "ipv4/ip_forward": "0",
}


def _mount(source: str, target: Path | str, kind: str | None, flags: int, what: str) -> None:
    check(
        libc.mount(
            source.encode(),
            str(target).encode(),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            None,
        ),
        what,
    )


@contextlib.contextmanager
def _writable_proc() -> Iterator[None]:
    """A /proc that can be written: a plugin's own has /proc/sys read-only. For a thread of its own."""
    check(libc.unshare(_CLONE_NEWNS), "a private mount namespace")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, "a private mount namespace")
    # Over the old one: no directory of ours is needed, and it goes with the thread.
    _mount("proc", _OWN_PROC, "proc", 0, "mounting /proc for sysctls")
    yield


def _wrong_sysctls() -> dict[str, str]:
    net = _OWN_PROC / "sys/net"
    wrong = {}
    for name, value in _SYSCTLS.items():
        # Absent where br_netfilter isn't loaded or IPv6 is off: then there is nothing to switch off.
        with contextlib.suppress(FileNotFoundError):
            if (net / name).read_text().strip() != value:
                wrong[name] = value
    return wrong


def _mend_sysctls() -> None:
    wrong = _wrong_sysctls()
    if wrong:
        with _writable_proc():
            for name, value in wrong.items():
                (_OWN_PROC / "sys/net" / name).write_text(value)


def quiet(namespace: int) -> None:
    """Make the namespace layer 2 only. Again before each new bridge: br_netfilter may have come in the meantime.

    Raises:
        KernelError: a sysctl can't be written.
    """
    try:
        in_netns(namespace, _mend_sysctls)
    except OSError as error:
        raise KernelError(
            f"overlay namespace: writing {error.filename}",
            cause=str(error.strerror),
            remedy="check that the plugin has CAP_SYS_ADMIN",
        ) from error


def make(host_run: Path) -> None:
    """Make the overlay namespace and pin it; if it is there, nothing.

    Raises:
        KernelError: the host's /run is not shared, or the kernel refuses.
    """
    path = host_run / OVERLAY_PIN
    if is_namespace(path):
        return
    if not is_shared(host_run):
        raise KernelError(
            f"{host_run} is not a shared mount",
            cause="container networks would die with the plugin",
            remedy="on the host: mount --make-rshared /run, then docker plugin disable -f and "
            "enable",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.parent.chmod(0o700)
        path.touch(mode=0o400)
    except OSError as error:
        raise KernelError(
            f"{path} can't be made", cause=str(error.strerror), remedy=DOCTOR
        ) from error

    def pin() -> None:
        check(libc.unshare(CLONE_NEWNET), "making the overlay namespace")
        _mount("/proc/thread-self/ns/net", path, None, _MS_BIND, f"pinning {path}")

    in_thread(pin)


def remove(host_run: Path) -> bool:
    """Unpin: the namespace goes with all links in it, once nobody has it open. False if there was none.

    Raises:
        KernelError: the pin can't be removed.
    """
    path = host_run / OVERLAY_PIN
    existed = is_namespace(path)
    if existed:
        libc.umount2(str(path).encode(), _MNT_DETACH)
    try:
        # Other mount namespaces have copies of the pin: unlinking unmounts them all (unlink(2)).
        path.unlink(missing_ok=True)
    except OSError as error:
        raise KernelError(
            f"{path} can't be removed",
            cause=str(error.strerror),
            remedy=f"unmount it where it is mounted a second time: grep {path.name} "
            "/proc/*/mountinfo",
        ) from error
    with contextlib.suppress(OSError):
        path.parent.rmdir()
    return existed


def identity(host_run: Path) -> tuple[int, int] | None:
    """What tells this overlay namespace from a later one under the same path; None if there is none."""
    path = host_run / OVERLAY_PIN
    if not is_namespace(path):
        return None
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
