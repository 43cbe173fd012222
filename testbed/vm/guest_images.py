"""What guests boot: one root file system, and a kernel with modules for each Debian release.

Kernel packages are downloaded and unpacked, never installed. Everything is made once and kept in
the cache beside the engines' root file systems, named by its recipe: the lists of packages and
modules, and the first program.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from testbed.debian_suite import DebianSuite, SuiteAbsentError
from testbed.images import (
    TOP,
    NotPreparedError,
    bootstrap,
    cache,
    forget_others,
    recipe_key,
    workshop,
)
from testbed.process import CommandError, run

KERNELS: Final = {"6.12": "trixie", "6.1": "bookworm", "5.10": "bullseye"}
"""Kernel to the Debian suite that has it."""
DEFAULT_KERNEL: Final = "6.12"
HOST_TOOLS: Final = ("qemu-system-x86_64", "mmdebstrap", "mke2fs", "depmod", "zstd", "dpkg")

_SUITE: Final = "trixie"  # The plugin's own: the same Python, the same libraries.
_PLUGIN_PACKAGES: Final = TOP / "plugin/image/packages.txt"
_PACKAGES: Final = (
    *("busybox-static", "ethtool", "iproute2", "kmod", "mount", "procps", "util-linux"),
    *(
        "ibverbs-providers",
        "ibverbs-utils",
        "perftest",
        "python3-pyverbs",
        "rdma-core",
        "rdmacm-utils",
    ),
    *("bpftool", "iptables", "iputils-ping", "libbpf1", "nftables", "openssl", "tcpdump"),
    # The project's own tests run in guests too.
    *("python3-hypothesis", "python3-pytest", "python3-pytest-timeout"),
    *("docker-cli", "docker.io", "ipvsadm"),
    *(
        "curl",
        "iperf3",
        "nginx-light",
        "postgresql",
        "postgresql-contrib",
        "redis-server",
        "redis-tools",
    ),
)
_ROOM: Final = 1024
"""MB that guests can write. The file is sparse, so this costs nothing."""

_MODULES: Final = (
    *("arch/x86/crypto", "crypto", "lib", "net"),
    *("drivers/block/loop.ko", "drivers/block/virtio_blk.ko", "drivers/char/virtio_console.ko"),
    *(
        "drivers/char/hw_random",
        "drivers/infiniband/core",
        "drivers/infiniband/sw",
        "drivers/virtio",
    ),
    *(
        "drivers/net/dummy.ko",
        "drivers/net/ifb.ko",
        "drivers/net/macvlan.ko",
        "drivers/net/net_failover.ko",
    ),
    *(
        "drivers/net/tun.ko",
        "drivers/net/veth.ko",
        "drivers/net/virtio_net.ko",
        "drivers/net/vxlan",
        "drivers/net/wireguard",
    ),
    *(
        "drivers/net/ipvlan",
        "fs/9p",
        "fs/configfs",
        "fs/ext4",
        "fs/fscache",
        "fs/jbd2",
        "fs/mbcache.ko",
    ),
    *("fs/netfs", "fs/nls", "fs/overlayfs"),
)
"""The modules that tests of networks may need, out of some 4,000."""
_NO_MODULES: Final = (
    *(
        "6lowpan",
        "appletalk",
        "atm",
        "ax25",
        "batman-adv",
        "bluetooth",
        "can",
        "ceph",
        "hsr",
        "ieee802154",
    ),
    *(
        "l2tp",
        "lapb",
        "mac80211",
        "mac802154",
        "mpls",
        "netrom",
        "nfc",
        "phonet",
        "qrtr",
        "rose",
        "rxrpc",
    ),
    *("sunrpc", "tipc", "wireless", "x25"),
)
_FOR_ROOT: Final = ("virtio_pci", "virtio_blk", "ext4")
_INIT: Final = """\
#!/bin/busybox sh
# From the kernel to the guest's root; vda is the root, vdb the kernel's modules.
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
for module in $($bb cat /order); do $bb insmod "/modules/$module"; done
tries=0
while ! [ -b /dev/vdb ] && [ $tries -lt 400 ]; do $bb usleep 25000; tries=$((tries + 1)); done
$bb mount -t ext4 -o rw,noatime /dev/vda /root
$bb mount -t ext4 -o ro /dev/vdb /root/usr/lib/modules
$bb mount --move /dev /root/dev
exec $bb switch_root /root /sbin/vm-init
"""
# Everything else comes from the checkout, so a change there needs no new image.
_VM_INIT: Final = """\
#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
modprobe -a virtio_console virtio_net virtio_rng 9pnet_virtio 9p
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144,cache=loose src /src
. /src/testbed/vm/guest_init.sh
"""


class KernelAbsentError(Exception):
    """The archive no longer has this kernel's release."""


@dataclass(frozen=True)
class BootKernel:
    """The files that QEMU needs to boot a kernel."""

    name: str
    folder: Path

    @property
    def vmlinux(self) -> Path:
        return self.folder / "vmlinux"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd.img"

    @property
    def modules(self) -> Path:
        return self.folder / "modules.ext4"

    @property
    def version(self) -> str:
        """The kernel's release, as `uname -r` prints it."""
        return (self.folder / "version").read_text()


def missing_tools() -> str:
    """The programs that guests need and the machine lacks; empty if none."""
    if os.geteuid() != 0:
        return "root"
    absent = [tool for tool in HOST_TOOLS if shutil.which(tool) is None]
    return f"{', '.join(absent)} (make setup)" if absent else ""


def _packages() -> list[str]:
    return sorted({*_PLUGIN_PACKAGES.read_text().split(), *_PACKAGES})


def ext4(tree: Path, image: Path, room: int) -> None:
    """Make a guest's disk with the content of a folder and this many MB of free space."""
    used = int(run(["du", "-sm", str(tree)], timeout=None).split()[0])
    # No journal, because a guest's disk is removed with the guest.
    options = ["-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1"]
    run(
        [
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            *options,
            "-d",
            str(tree),
            str(image),
            f"{used * 5 // 4 + room}M",
        ],
        timeout=None,
    )


def _root_path() -> Path:
    key = recipe_key(_SUITE, ",".join(_packages()), _VM_INIT, str(_ROOM))
    return cache() / f"guest-{key}.ext4"


def root_image() -> Path:
    """The guests' root file system, an ext4 image.

    Raises:
        NotPreparedError: it wasn't made.
    """
    target = _root_path()
    if not target.exists():
        raise NotPreparedError("the root file system of virtual machines", target)
    return target


def make_root_image() -> Path:
    """The guests' root file system; makes it if it is absent (about a minute)."""
    target = _root_path()
    with workshop(target) as folder:
        if not target.exists():
            # Named like the target, so that downloads of another recipe are not used for this one.
            tree = folder / target.stem
            bootstrap(_SUITE, ",".join(_packages()), tree)
            for point in ("src", "usr/lib/modules"):
                (tree / point).mkdir(exist_ok=True)
            (tree / "etc/resolv.conf").unlink(missing_ok=True)
            init = tree / "sbin/vm-init"
            init.write_text(_VM_INIT)
            init.chmod(0o755)
            ext4(tree, folder / "image", _ROOM)
            (folder / "image").rename(target)
        forget_others(target, "guest-*.ext4")
    return target


def _kernel_path(name: str) -> Path:
    if name not in KERNELS:
        raise ValueError(f"kernel {name} is none of {', '.join(KERNELS)}")
    key = recipe_key(KERNELS[name], *_MODULES, *_NO_MODULES, *_FOR_ROOT, _INIT)
    return cache() / f"kernel-{name}-{key}"


def _absence(target: Path) -> Path:
    """The file with the reason why the archive has no such kernel."""
    return target.with_name(f"{target.name}.absent")


def kernel(name: str = DEFAULT_KERNEL) -> BootKernel:
    """A kernel of Debian.

    Raises:
        KernelAbsentError: the archive had no such release when it was to be made.
        NotPreparedError: it wasn't made.
    """
    target = _kernel_path(name)
    if target.exists():
        return BootKernel(name, target)
    if _absence(target).exists():
        raise KernelAbsentError(_absence(target).read_text())
    raise NotPreparedError(f"kernel {name} of virtual machines", target)


def make_kernel(name: str) -> BootKernel:
    """A kernel of Debian; makes it if it is absent (about a quarter of a minute).

    Raises:
        KernelAbsentError: the archive has no such release (any more).
    """
    target = _kernel_path(name)
    with workshop(target) as folder:
        if not target.exists():
            made = folder / "made"
            made.mkdir()
            fetched = cache() / "downloads" / target.name
            _absence(target).unlink(missing_ok=True)
            try:
                _make_kernel(KERNELS[name], folder, fetched, made)
            except KernelAbsentError as error:
                _absence(target).write_text(str(error))
                raise
            made.rename(target)
            shutil.rmtree(fetched)
        forget_others(target, f"kernel-{name}-*")
    return BootKernel(name, target)


def _make_kernel(suite: str, work: Path, fetched: Path, made: Path) -> None:
    unpacked = _download(suite, work, fetched)
    version = next(unpacked.glob("boot/vmlinuz-*")).name.removeprefix("vmlinuz-")
    (made / "version").write_text(version)
    # Uncompressed, because an emulated processor needs three seconds to decompress it.
    (made / "vmlinux").write_bytes(_vmlinux((unpacked / f"boot/vmlinuz-{version}").read_bytes()))
    tree = work / "modules"
    _modules(
        next(unpacked.glob(f"**/lib/modules/{version}")), tree / "lib/modules" / version, version
    )
    ext4(tree / "lib/modules", made / "modules.ext4", 8)
    order = _load_order(tree, version, _FOR_ROOT)
    files = {
        "bin/busybox": next(unpacked.glob("**/bin/busybox")).read_bytes(),
        "init": _INIT.encode(),
    }
    files |= {f"modules/{path.name}": path.read_bytes() for path in order}
    files["order"] = "\n".join(path.name for path in order).encode()
    (made / "initrd.img").write_bytes(_cpio(("bin", "dev", "modules", "root"), files))


def _download(suite: str, work: Path, fetched: Path) -> Path:
    """Download and unpack a suite's kernel and busybox.

    Packages that are in `fetched` are not downloaded again.
    """
    try:
        archive = DebianSuite(suite, work, architecture="amd64")
        depends = archive.ask("apt-cache", "depends", "linux-image-amd64")
    except (SuiteAbsentError, CommandError) as error:
        raise KernelAbsentError(f"the Debian archive serves no {suite}: {error}") from error
    image = next(
        word
        for word in depends.split()
        if word.startswith("linux-image-") and word != "linux-image-amd64"
    )
    unpacked = work / "unpacked"
    archive.unpack((image, "busybox-static"), unpacked, fetched)
    return unpacked


def _vmlinux(bzimage: bytes) -> bytes:
    """The ELF file in a bzImage (Linux, Documentation/arch/x86/boot.rst: payload_offset and
    others).
    """
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = ((bzimage[0x1F1] or 4) + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        # The size follows the stream, and a reader of files would take it for another stream.
        kernel_file = lzma.LZMADecompressor().decompress(payload)
    else:
        done = subprocess.run(["zstd", "-dcq"], input=payload, capture_output=True, check=False)
        kernel_file = done.stdout
    if not kernel_file.startswith(b"\x7fELF"):
        raise ValueError(f"a kernel packed in an unknown way: it begins with {payload[:4].hex()}")
    return kernel_file


def _modules(source: Path, target: Path, version: str) -> None:
    """Copy the modules that guests may need, decompressed for the same reason as the kernel."""
    target.mkdir(parents=True)
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        shutil.copy(source / name, target / name)
    for wanted in _MODULES:
        # What is a module in one kernel is built in, or a folder, in another.
        for module in sorted((source / "kernel").glob(f"{wanted}*")):
            if module.name == Path(wanted).name or module.name == f"{Path(wanted).name}.xz":
                for path in [module, *module.rglob("*")]:
                    _copy_module(path, target / path.relative_to(source))
    run(["depmod", "-b", str(target.parents[2]), version], timeout=None)


def _copy_module(path: Path, target: Path) -> None:
    parts = target.parts
    if path.is_dir() or any(
        parts[i - 1] == "net" and part in _NO_MODULES for i, part in enumerate(parts)
    ):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".xz":
        target.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
    else:
        shutil.copy(path, target)


def _load_order(tree: Path, version: str, modules: Iterable[str]) -> list[Path]:
    """The files to load for some modules, dependencies first; built-in modules have none."""
    files: dict[Path, None] = {}
    for module in modules:
        shown = run(["modprobe", "-d", str(tree), "-S", version, "--show-depends", module])
        for line in shown.splitlines():
            if line.startswith("insmod "):
                files[Path(line.split()[1])] = None
    return list(files)


def _cpio(folders: Iterable[str], files: dict[str, bytes]) -> bytes:
    """An initramfs (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""
    members = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    members += [(name, stat.S_IFREG | 0o755, content) for name, content in files.items()]
    members.append(("TRAILER!!!", 0, b""))
    packed = bytearray()
    for number, (name, mode, content) in enumerate(members, 1):
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        packed += b"070701" + b"".join(b"%08x" % value for value in fields) + name.encode() + b"\0"
        packed += bytes(-len(packed) % 4) + content
        packed += bytes(-len(packed) % 4)
    return bytes(packed)
