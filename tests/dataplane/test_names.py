"""Every symbol that a C library exports is known: the library wraps it, or there is a reason why
not.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.dataplane.places import LIBRARY

NAMES: Final = Path(__file__).with_name("names.txt")
WRAPPED: Final = "wrapped"
NONE: Final = "no descriptor"
MUSL: Final = Path("/lib/ld-musl-x86_64.so.1")
HEADERS: Final = """aio arpa/inet argp argz dirent dlfcn err errno error execinfo fcntl fstab ftw getopt glob grp
iconv ifaddrs langinfo libgen locale malloc mntent monetary mqueue net/if netdb netinet/in nl_types obstack poll
printf pthread pty pwd regex resolv sched search semaphore setjmp shadow signal spawn stdio stdio_ext stdlib string
sys/auxv sys/epoll sys/eventfd sys/fanotify sys/file sys/fsuid sys/inotify sys/ioctl sys/klog sys/mman sys/mount
sys/msg sys/pidfd sys/prctl sys/ptrace sys/quota sys/random sys/resource sys/select sys/sem sys/sendfile sys/shm
sys/signalfd sys/socket sys/stat sys/statfs sys/statvfs sys/swap sys/syscall sys/sysinfo sys/time sys/timerfd
sys/timex sys/types sys/uio sys/utsname sys/wait sys/xattr syslog termios time ucontext unistd utime utmp utmpx
wchar wctype wordexp"""
DECLARED: Final = re.compile(r"(\w+)\s*\(([^()]*(?:\([^()]*\)[^()]*)*)\)")
DESCRIPTOR: Final = re.compile(
    r"\bint\s+_*(\w*fd\w*|fildes\w*|sock\w*)\s*(?:,|$)|aiocb|pollfd|mmsghdr|fd_set"
)


def classes() -> dict[str, list[str]]:
    """Names by their class."""
    found: dict[str, list[str]] = {}
    for line in NAMES.read_text().splitlines():
        if line.startswith("== "):
            found[line[3:]] = []
        elif line and not line.startswith("#"):
            found[next(reversed(found))] += line.split()
    return found


CLASSES: Final = classes()
KNOWN: Final = {name for names in CLASSES.values() for name in names}


def exported(library: Path | str) -> set[str]:
    """The functions with which programs can be linked."""
    said = subprocess.run(
        ["nm", "--dynamic", "--defined-only", str(library)],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [line.split() for line in said.stdout.splitlines()]
    return {
        name.split("@")[0]
        for _, kind, name in (row for row in rows if len(row) == 3)
        if kind in "TWi" and "GLIBC_PRIVATE" not in name
    }


def of_this_machine() -> dict[str, set[str]]:
    """The C libraries of this machine."""
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    paths = re.findall(r"(lib(?:c|pthread|rt|util|anl|dl)\.so\.\d) .* => (/\S*64\S*)", listed)
    found = {name: exported(path) for name, path in paths}
    if MUSL.exists():
        found["musl"] = exported(MUSL)
    return found


def test_each_name_has_one_class() -> None:
    """No name is in two classes, or twice in one."""
    listed = [name for names in CLASSES.values() for name in names]
    assert len(listed) == len(set(listed))
    assert {WRAPPED, NONE} < set(CLASSES)
    assert all(names for names in CLASSES.values())


def test_every_name_of_this_machine_is_known() -> None:
    """A C library with an unclassified function is reported."""
    libraries = of_this_machine()
    assert libraries["libc.so.6"] >= {"read", "dprintf", "preadv2"}
    for library, names in libraries.items():
        assert not names - KNOWN, library


def test_every_release_is_known() -> None:
    """Names that appeared or disappeared between glibc 2.17 and 2.41, and musl's own, are on the
    list.
    """
    assert {
        "__read_chk",  # from 2.4 on
        "clnttcp_create",  # until 2.32
        "getmsg",  # until 2.30
        "preadv64v2",  # 2.26
        "epoll_pwait2",  # 2.35
        "pidfd_spawn",  # 2.39
        "sched_setattr",  # 2.41
        "posix_close",  # musl
    } <= KNOWN
    assert len(KNOWN) > 2900


def test_what_is_called_wrapped_is() -> None:
    """The library exports each of these names."""
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    assert not set(CLASSES[WRAPPED]) - exported(LIBRARY)


def test_the_only_data_are_the_services() -> None:
    """Besides functions the library exports nothing but what our libibverbs looks for."""
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    said = subprocess.run(
        ["nm", "--dynamic", "--defined-only", str(LIBRARY)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert {row.split()[2] for row in said.stdout.splitlines()} - exported(LIBRARY) == {
        "freeflow_services"
    }


def test_no_descriptor_means_none() -> None:
    """By the C library's headers, no function on that list takes a descriptor."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is missing")
    text = "".join(
        f"#if __has_include(<{name}.h>)\n#include <{name}.h>\n#endif\n" for name in HEADERS.split()
    )
    said = subprocess.run(
        ["gcc", "-E", "-P", "-D_GNU_SOURCE", "-x", "c", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    )
    declared = {
        match[1]: match[2]
        for line in said.stdout.replace("\n", " ").split(";")
        if (match := DECLARED.search(line))
    }
    assert DESCRIPTOR.search(declared["dprintf"])
    assert DESCRIPTOR.search(declared["aio_read"])
    wrong = {name for name in CLASSES[NONE] if DESCRIPTOR.search(declared.get(name, ""))}
    assert not wrong
