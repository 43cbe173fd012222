"""The overlay namespace: the network namespace of our bridges, VXLAN devices and host-side veths.

A bind mount in the host's /run pins it, so that it outlives the plugin's process. The encryption
namespace (`encryption_namespace.py`) is pinned in the same way. That needs a shared mount
underneath (mount_namespaces(7)). Without one the pin would go with the plugin's mount namespace,
and every container's network with it, so the namespace isn't made then. The overlay namespace is
layer 2 only: nothing in it has an address.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dataplane.threads import in_thread
from driver.errors import KernelError, reporting
from driver.kernel.mounts import BIND, PRIVATE, REC, detach, is_shared, mount
from driver.kernel.namespace import (
    CLONE_NEWNET,
    OVERLAY_PIN,
    check,
    in_netns,
    is_namespace,
    libc,
)

_CLONE_NEWNS: Final = 0x00020000

_OWN_PROC: Final = Path("/proc")
_SYSCTLS: Final = {
    # Docker loads br_netfilter. Here bridged frames must not pass iptables.
    "bridge/bridge-nf-call-iptables": "0",
    "bridge/bridge-nf-call-ip6tables": "0",
    "bridge/bridge-nf-call-arptables": "0",
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv6/conf/default/disable_ipv6": "1",
    "ipv4/ip_forward": "0",
}


@contextlib.contextmanager
def _writable_proc() -> Iterator[None]:
    """A writable /proc: that of a plugin has /proc/sys read-only. Only in a thread that then
    ends."""
    check(libc.unshare(_CLONE_NEWNS), "a private mount namespace")
    mount("none", "/", REC | PRIVATE)
    # Mounted over the old one: that needs no directory, and it goes with the thread.
    mount("proc", _OWN_PROC, 0, kind="proc")
    yield


def _wrong_sysctls() -> dict[str, str]:
    net = _OWN_PROC / "sys/net"
    wrong = {}
    for name, value in _SYSCTLS.items():
        # Absent without br_netfilter or IPv6: nothing to switch off then.
        with contextlib.suppress(FileNotFoundError):
            if (net / name).read_text().strip() != value:
                wrong[name] = value
    return wrong


def _write_sysctls() -> None:
    wrong = _wrong_sysctls()
    if wrong:
        with _writable_proc():
            for name, value in wrong.items():
                (_OWN_PROC / "sys/net" / name).write_text(value)


def quiet(namespace: int) -> None:
    """Make the namespace layer 2 only.

    Repeat it before each new bridge: br_netfilter may have been loaded in the meantime.

    Raises:
        KernelError: a sysctl can't be written.
    """
    try:
        in_netns(namespace, _write_sysctls)
    except OSError as error:
        raise KernelError(
            f"overlay namespace: writing {error.filename}",
            cause=str(error.strerror),
            remedy="check that the plugin has CAP_SYS_ADMIN",
        ) from error


def make(host_run: Path, name: Path = OVERLAY_PIN) -> None:
    """Make the namespace of this pin, unless it exists.

    Raises:
        KernelError: the host's /run is not shared, or the kernel refuses.
    """
    path = host_run / name
    if is_namespace(path):
        return
    if not is_shared(host_run):
        raise KernelError(
            f"{host_run} is not a shared mount",
            cause="container networks would die with the plugin",
            remedy="on the host: mount --make-rshared /run, then docker plugin disable -f and "
            "enable",
        )
    with reporting(f"{path} can't be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.parent.chmod(0o700)
        path.touch(mode=0o400)

    def pin() -> None:
        check(libc.unshare(CLONE_NEWNET), f"making the {name.name} namespace")
        mount("/proc/thread-self/ns/net", path, BIND)

    in_thread(pin)


def remove(host_run: Path, name: Path = OVERLAY_PIN) -> bool:
    """Unpin it: the namespace goes with its links once no process has it open. False: there was
    none.

    Raises:
        KernelError: the pin can't be removed.
    """
    path = host_run / name
    existed = is_namespace(path)
    if existed:
        detach(path)
    mounted_at = f"grep {path.name} /proc/*/mountinfo"
    with reporting(
        f"{path} can't be removed",
        remedy=f"unmount it where it is mounted a second time: {mounted_at}",
    ):
        # Other mount namespaces have copies of the pin; unlinking unmounts all (unlink(2)).
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()
    return existed


def identity(host_run: Path, name: Path = OVERLAY_PIN) -> tuple[int, int] | None:
    """Identifies a namespace among all that had this path; None if there is none."""
    path = host_run / name
    if not is_namespace(path):
        return None
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
