"""The libraries' files in the folder that containers mount."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from plugin.library_file import COMPANION, NAME, OWNER, SHIPPED, VERBS, place
from testbed.patience import within


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "public"
    made.mkdir()
    return made


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    made = tmp_path / "shipped"
    (made / "verbs").mkdir(parents=True)
    (made / NAME).write_bytes(b"first")
    (made / VERBS).write_bytes(b"first verbs")
    (made / COMPANION).write_bytes(b"first companion")
    return made


def all_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_placed(folder: Path, shipped: Path) -> None:
    """Every user can read the library, and nothing else is left in the folder."""
    assert place(folder, shipped)
    assert (folder / NAME).read_bytes() == b"first"
    assert (folder / NAME).stat().st_mode & 0o777 == 0o644
    assert all_files(folder) == [NAME, COMPANION, VERBS]


def test_same_is_kept(folder: Path, shipped: Path) -> None:
    """A restart of the same plugin keeps the file that programs have mapped."""
    place(folder, shipped)
    before = (folder / NAME).stat()
    assert place(folder, shipped)
    after = (folder / NAME).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_old_stays_for_who_has_it(folder: Path, shipped: Path) -> None:
    """An upgrade replaces the file, and not the one that a program has open."""
    place(folder, shipped)
    with (folder / NAME).open("rb") as opened:
        (shipped / NAME).write_bytes(b"second")
        assert place(folder, shipped)
        assert opened.read() == b"first"
    assert (folder / NAME).read_bytes() == b"second"


def test_replaced_in_one_step(folder: Path, shipped: Path) -> None:
    """While the library is replaced, programs open a complete file, old or new."""
    whole = {b"a" * 100_000, b"b" * 200_000}
    (shipped / NAME).write_bytes(b"a" * 100_000)
    place(folder, shipped)
    seen: set[bytes] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.add((folder / NAME).read_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(50):
            for content in whole:
                (shipped / NAME).write_bytes(content)
                assert place(folder, shipped)
    finally:
        stop.set()
        thread.join()
    assert seen <= whole


@pytest.mark.parametrize("left", [f".{NAME}.new", NAME, "verbs/.libibverbs.so.1.new", VERBS])
def test_half_a_file_is_replaced(folder: Path, shipped: Path, left: str) -> None:
    """Leftovers of a killed plugin are replaced."""
    (folder / "verbs").mkdir()
    (folder / left).write_bytes(b"fi")
    assert place(folder, shipped)
    assert (folder / NAME).read_bytes() == b"first"
    assert (folder / VERBS).read_bytes() == b"first verbs"
    assert all_files(folder) == [NAME, COMPANION, VERBS]


def test_link_is_not_followed(folder: Path, shipped: Path, tmp_path: Path) -> None:
    """A link in place of the library is replaced, and its target stays."""
    other = tmp_path / "other"
    other.write_bytes(b"other")
    (folder / NAME).symlink_to(other)
    assert place(folder, shipped)
    assert not (folder / NAME).is_symlink()
    assert other.read_bytes() == b"other"


def test_verbs(folder: Path, shipped: Path) -> None:
    """Every user can read the libraries of verbs, whatever the plugin's umask; who has an old one
    open keeps it; each is replaced on its own.
    """
    before = os.umask(0o077)
    try:
        assert place(folder, shipped)
    finally:
        os.umask(before)
    assert (folder / "verbs").stat().st_mode & 0o777 == 0o755
    assert [(folder / name).stat().st_mode & 0o777 for name in (VERBS, COMPANION)] == [0o644] * 2
    inode = (folder / COMPANION).stat().st_ino
    with (folder / VERBS).open("rb") as opened:
        (shipped / VERBS).write_bytes(b"second verbs")
        assert place(folder, shipped)
        assert opened.read() == b"first verbs"
    assert (folder / VERBS).read_bytes() == b"second verbs"
    assert (folder / COMPANION).stat().st_ino == inode


def test_names_of_the_image() -> None:
    """The image has the libraries by the names by which the plugin looks for them."""
    top = Path(__file__).parents[2]
    script = (top / "plugin/image/build-dataplane.sh").read_text()
    assert all(f'"$folder/{name}"' in script for name in (NAME, VERBS))
    # Where the library of verbs is built its companion is, too.
    assert f"$folder/{Path(COMPANION).name}" in (top / "dataplane/verbs/build.sh").read_text()
    for recipe in ("rootfs.sh", "from-docker.sh"):
        text = (top / "plugin/image" / recipe).read_text()
        assert f'build-dataplane.sh" "$output/rootfs{SHIPPED}"' in text


def test_without_verbs(folder: Path, shipped: Path) -> None:
    """A plugin that was built without verbs says so, and installs the library for connections."""
    (shipped / VERBS).unlink()
    assert not place(folder, shipped)
    assert all_files(folder) == [NAME, COMPANION]


def test_without_library(folder: Path, tmp_path: Path) -> None:
    """A plugin that was built without the library starts, and leaves the installed one."""
    (folder / NAME).write_bytes(b"earlier")
    assert not place(folder, tmp_path / "missing")
    assert (folder / NAME).read_bytes() == b"earlier"


def _lease(path: Path) -> bool:
    """Whether a lease that delays readers can be taken on a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def test_nobody_delays_a_start(folder: Path, shipped: Path) -> None:
    """No lease that makes each program wait that opens the library can be had on it: not after it
    was replaced, nor after it was found as it was."""
    assert _lease(shipped / NAME)
    for content in (b"first", b"second"):
        (shipped / NAME).write_bytes(content)
        for _ in range(2):
            assert place(folder, shipped)
            assert not _lease(folder / NAME)


def test_a_lease_does_not_delay_the_plugin(folder: Path, shipped: Path) -> None:
    """A plugin doesn't wait for a lease that was taken while none ran; it replaces the file."""
    (folder / NAME).write_bytes(b"first")
    (folder / NAME).chmod(0o644)
    descriptor = os.open(folder / NAME, os.O_RDONLY)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        began = time.monotonic()
        assert place(folder, shipped)
        # The kernel's patience with a lease is 45 s (fs.lease-break-time).
        assert time.monotonic() - began < within(10)
        assert (folder / NAME).stat().st_ino != os.fstat(descriptor).st_ino
        assert not _lease(folder / NAME)
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_owned_by_nobody(folder: Path, shipped: Path) -> None:
    """The library's owner is no user of a container, and one that root owns, as earlier versions
    made it, is replaced.
    """
    (folder / NAME).write_bytes(b"first")
    (folder / NAME).chmod(0o644)
    assert place(folder, shipped)
    assert (folder / NAME).stat().st_uid == OWNER
