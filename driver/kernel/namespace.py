"""Network namespaces: running code inside one, and the overlay namespace that holds our links.

The overlay namespace is pinned by a bind mount, so that it outlives the plugin's process. That needs a
shared mount underneath (mount_namespaces(7)): without one the pin would die with the plugin's own mount
namespace, and every container's network with it; so `open_overlay` refuses then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from driver.errors import KernelError

T = TypeVar("T")

_CLONE_NEWNET: Final = 0x40000000
_CLONE_NEWNS: Final = 0x00020000
_MS_BIND: Final = 4096
_MS_REC: Final = 16384
_MS_PRIVATE: Final = 1 << 18
_MNT_DETACH: Final = 2
_NSFS_MAGIC: Final = 0x6E736673

OVERLAY_PIN: Final = Path("freeflow-admin/netns/overlay")
"""Where the overlay namespace is pinned, below the host's /run."""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise KernelError(f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, what: str) -> None:
    _check(
        _libc.mount(
            source.encode(),
            target.encode(),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            None,
        ),
        what,
    )


def unmount(target: Path) -> None:
    """Detach the mount at `target`; nothing mounted there is fine."""
    _libc.umount2(str(target).encode(), _MNT_DETACH)


def in_thread(function: Callable[[], T]) -> T:
    """Run `function` in a thread of its own and return or raise what it does.

    Namespaces are a thread's property in Linux: a thread that changed one must not serve anything else.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name="netns", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def enter(namespace: int) -> None:
    """Move the calling thread into the network namespace of this descriptor. For good: see `in_thread`."""
    _check(_libc.setns(namespace, _CLONE_NEWNET), "entering a network namespace failed")


def in_netns(namespace: Path | int, function: Callable[[], T]) -> T:
    """Run `function` inside a network namespace, given by path or open descriptor.

    Raises:
        KernelError: the namespace can't be opened or entered, or what `function` raises.
    """
    if isinstance(namespace, int):
        descriptor = os.dup(namespace)
    else:
        try:
            descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError(
                f"network namespace {namespace} can't be opened: {error.strerror}; has its container ended?"
            ) from error

    def body() -> T:
        enter(descriptor)
        return function()

    try:
        return in_thread(body)
    finally:
        os.close(descriptor)


def is_namespace(path: Path) -> bool:
    """Whether a namespace is mounted at `path`: Docker creates the file before it mounts there."""

    class _Statfs(ctypes.Structure):
        _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_byte * 248))

    answer = _Statfs()
    if _libc.statfs(str(path).encode(), ctypes.byref(answer)) != 0:
        return False
    return int(answer.f_type) == _NSFS_MAGIC


def is_shared(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether mounts made below `path` reach the host: its mount is in a peer group (mountinfo, proc(5))."""
    best, shared = -1, False
    resolved = str(path.resolve())
    for line in mountinfo.read_text(errors="replace").splitlines():
        fields = line.split()
        point = fields[4].replace("\\040", " ")
        if resolved == point or resolved.startswith(point.rstrip("/") + "/"):
            optional = fields[6 : fields.index("-")]
            if len(point) >= best:
                best = len(point)
                shared = any(tag.startswith("shared:") for tag in optional)
    return shared


@contextlib.contextmanager
def _writable_proc() -> Iterator[Path]:
    """A /proc that can be written: a plugin's own has /proc/sys read-only. For a thread of its own."""
    _check(_libc.unshare(_CLONE_NEWNS), "a private mount namespace")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, "a private mount namespace")
    # Over the old one: no directory of ours is needed, and it goes with the thread.
    _mount("proc", "/proc", "proc", 0, "mounting /proc for sysctls")
    yield Path("/proc/sys/net")


def _set_sysctls() -> None:
    """What the overlay namespace must not do: filter bridged frames, or speak for itself."""
    values = {
        "bridge/bridge-nf-call-iptables": "0",
        "bridge/bridge-nf-call-ip6tables": "0",
        "bridge/bridge-nf-call-arptables": "0",
        "ipv6/conf/all/disable_ipv6": "1",
        "ipv6/conf/default/disable_ipv6": "1",
        "ipv4/ip_forward": "0",
    }
    with _writable_proc() as net:
        for name, value in values.items():
            # Absent where br_netfilter isn't loaded or IPv6 is off: then there is nothing to switch off.
            with contextlib.suppress(FileNotFoundError):
                (net / name).write_text(value)


class OverlayNamespace:
    """The pinned namespace of bridges, VXLAN devices and host-side veth ends."""

    def __init__(self, host_run: Path) -> None:
        self.path = host_run / OVERLAY_PIN
        self._host_run = host_run
        self._lock = threading.Lock()
        self._descriptor: int | None = None

    @property
    def exists(self) -> bool:
        return is_namespace(self.path)

    def descriptor(self) -> int:
        """Open descriptor of the namespace, which is made if absent. Owned by this object.

        Raises:
            KernelError: the host's /run is not shared, or the kernel refuses.
        """
        with self._lock:
            if self._descriptor is not None and self.exists:
                return self._descriptor
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
            if not self.exists:
                self._make()
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            in_netns(self._descriptor, _set_sysctls)
            return self._descriptor

    def _make(self) -> None:
        if not is_shared(self._host_run):
            raise KernelError(
                f"{self._host_run} is not a shared mount, so container networks would die with the plugin; "
                "on the host: mount --make-rshared /run, then docker plugin disable -f and enable"
            )
        parent = self.path.parent
        parent.mkdir(parents=True, exist_ok=True)
        parent.parent.chmod(0o700)
        self.path.touch(mode=0o400)

        def pin() -> None:
            _check(_libc.unshare(_CLONE_NEWNET), "making the overlay namespace")
            source = f"/proc/self/task/{threading.get_native_id()}/ns/net"
            _mount(source, str(self.path), None, _MS_BIND, f"pinning {self.path}")

        in_thread(pin)

    def remove(self) -> bool:
        """Unpin: the namespace goes with all links in it. False if there was none."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None
            existed = self.exists
            if existed:
                unmount(self.path)
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()
            return existed


def isolated(function: Callable[[], T]) -> T:
    """Run `function` in a network namespace of its own that goes with it: to try a feature for real.

    Raises:
        KernelError: no namespace could be made.
    """

    def body() -> T:
        _check(_libc.unshare(_CLONE_NEWNET), "making a network namespace")
        return function()

    return in_thread(body)
