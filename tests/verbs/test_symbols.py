"""What our libibverbs exports and needs, compared with the libibverbs of Debian."""

from __future__ import annotations

import ctypes
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dataplane.verbs.symbols import PRIVATE, REAL, TABLE, defaults, read_table
from tests.unit.test_library_built import ALLOWED
from tests.verbs import elf
from tests.verbs.conftest import BUILD, HEADER

FOLDER = BUILD.parent
INSTALLED = sorted(Path("/usr/lib").glob("*/libibverbs.so.1"))
USERS = ("libibverbs/*.so", "librdmacm.so.1", "libmlx5.so.1", "libefa.so.1")
"""Files of Debian's libraries that need libibverbs: drivers of cards, and librdmacm."""
NEEDS = ALLOWED | {"calloc", "close", "free", "mmap", "munmap", "open", "read", "sched_yield"}
NODES, SYMBOLS = read_table(TABLE.read_text())


@pytest.fixture(scope="module")
def installed() -> Path:
    """Debian's libibverbs."""
    if not INSTALLED or not shutil.which("objdump"):
        pytest.skip("missing: libibverbs1, objdump")
    return INSTALLED[0]


def test_each_symbol_is_once_in_a_node() -> None:
    """The table has each node and each symbol of a node once."""
    assert len(NODES) == len(set(NODES))
    pairs = [(symbol.node, symbol.name) for symbol in SYMBOLS]
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("line", ["ibv_open_device pointer", "    ibv_open_device", "    x maybe"])
def test_wrong_line(line: str) -> None:
    """A line that is neither a node nor a symbol is an error."""
    with pytest.raises(ValueError, match=r"symbols\.txt"):
        read_table(f"IBVERBS_1.0\n{line}\n")


def test_symbol_without_node() -> None:
    """A symbol before the first node is an error."""
    with pytest.raises(ValueError, match=r"symbols\.txt"):
        read_table("    ibv_open_device pointer\n")


def test_exports_the_table(library: Path) -> None:
    """The built library exports each symbol of the table in its nodes, and nothing else."""
    assert elf.exported(library) == {(symbol.node, symbol.name) for symbol in SYMBOLS}
    assert elf.nodes(library) == {*NODES, "libibverbs.so.1"}


def test_programs_are_linked_with_public_symbols() -> None:
    """A name without a version means the newest public one."""
    newest = defaults(SYMBOLS)
    assert newest["ibv_open_device"].node == "IBVERBS_1.1"
    assert not [symbol for symbol in newest.values() if symbol.node.startswith(PRIVATE)]


def test_what_is_real_is_in_the_sources() -> None:
    """Each symbol that the table calls real is a function of a C file, and no other is."""
    text = "".join(path.read_text() for path in FOLDER.glob("*.c"))
    defined = set(
        re.findall(r"^(?:VERB )?[\w *]*?\b(_?(?:ibv|mult|mbps)_\w+)\([^;{]*\)\n\{", text, re.M)
    )
    assert defined == {symbol.name for symbol in SYMBOLS if symbol.kind == REAL}


def test_has_what_debian_exports(installed: Path) -> None:
    """Each symbol of Debian's library is in the table, in the same node."""
    theirs = elf.exported(installed)
    assert ("IBVERBS_1.1", "ibv_create_qp") in theirs
    assert not theirs - {(symbol.node, symbol.name) for symbol in SYMBOLS}
    assert not elf.nodes(installed) - {*NODES, "libibverbs.so.1"}


def test_has_what_drivers_need(installed: Path, library: Path) -> None:
    """Drivers of cards and librdmacm, which programs are linked with, find all their symbols."""
    users = [path for pattern in USERS for path in installed.parent.glob(pattern)]
    wanted = {
        (node, name)
        for path in users
        for node, name in elf.needed(path)
        if node.startswith("IBVERBS_")
    }
    assert wanted
    assert not wanted - elf.exported(library)


def test_has_what_the_header_declares() -> None:
    """Each function that Debian's header declares, and doesn't define, is in the table."""
    if not HEADER.exists() or not shutil.which("gcc"):
        pytest.skip("missing: libibverbs-dev, gcc")
    text = subprocess.run(
        ["gcc", "-E", "-P", HEADER], check=True, capture_output=True, text=True
    ).stdout
    text = re.sub(r"__attribute__ *\(\(.*?\)\)", "", text)
    declared = set(re.findall(r"^[\w *]+?\b(_?(?:ibv|mult|mbps)_\w+)\([^;{}()]*\)\s*;", text, re.M))
    assert {"ibv_create_qp", "_ibv_query_gid_ex", "mbps_to_ibv_rate"} <= declared
    assert not declared - {symbol.name for symbol in SYMBOLS}


@pytest.mark.parametrize("compiler", ["gcc", "aarch64-linux-gnu-gcc"])
def test_needs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    """It needs only symbols that both C libraries have, without versions, and no library."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} missing")
    monkeypatch.setenv("CC", compiler)
    library = tmp_path / "libibverbs.so.1"
    subprocess.run([BUILD, library], check=True)
    for path, own in ((library, set()), (library.with_name("libibverbs.so"), {"fdopen"})):
        found = elf.needed(path)
        assert {name for _, name in found} <= NEEDS | own
        assert {node for node, _ in found} <= {"", "Base"}
    assert not elf.dynamic(library, "NEEDED")


def test_names(library: Path) -> None:
    """The library answers to its name; the companion has the other name, and leads to it."""
    assert elf.dynamic(library, "SONAME") == ["libibverbs.so.1"]
    companion = library.with_name("libibverbs.so")
    assert elf.dynamic(companion, "SONAME") == ["libibverbs.so"]
    assert elf.dynamic(companion, "NEEDED") == ["libibverbs.so.1"]
    assert {node for node, _ in elf.exported(companion)} <= {"", "Base"}


@pytest.mark.parametrize(
    "function",
    [
        "ibv_node_type_str",
        "ibv_port_state_str",
        "ibv_event_type_str",
        "ibv_wc_status_str",
        "ibv_rate_to_mult",
        "ibv_rate_to_mbps",
        "mult_to_ibv_rate",
        "mbps_to_ibv_rate",
    ],
)
def test_words_and_numbers(installed: Path, library: Path, function: str) -> None:
    """Words and rates equal those of Debian's library."""
    calls = [getattr(ctypes.CDLL(str(path)), function) for path in (installed, library)]
    for call in calls:
        call.restype = ctypes.c_char_p if function.endswith("_str") else ctypes.c_int
    numbers = [*range(-2, 500), 2500, 14062, 25781, 103125, 1275000]
    theirs, ours = ([call(number) for number in numbers] for call in calls)
    assert len(set(theirs)) > 5
    assert ours == theirs


def test_reads_sysfs(library: Path, tmp_path: Path) -> None:
    """It reads a file of a folder without the end of its line, and writes no more than there is
    room for.
    """
    ours = ctypes.CDLL(str(library))
    text = ctypes.create_string_buffer(b"x" * 16, 16)
    (tmp_path / "one").write_text("0x1234\n")
    (tmp_path / "two").write_text("without")
    (tmp_path / "three").write_text("y" * 40)
    folder = str(tmp_path).encode()
    assert ours.ibv_read_sysfs_file(folder, b"one", text, 16) == 6
    assert text.value == b"0x1234"
    assert ours.ibv_read_sysfs_file(folder, b"two", text, 16) == 7
    assert text.value == b"without"
    assert ours.ibv_read_sysfs_file(folder, b"three", text, 8) == 8
    assert text.raw[:9] == b"yyyyyyyyx"
    assert ours.ibv_read_sysfs_file(folder, b"none", text, 16) == -1
    assert ours.ibv_read_sysfs_file(folder, b"n" * 5000, text, 16) == -1


def test_refuses_what_is_not_supported(library: Path) -> None:
    """A function of another kind fails as its callers expect, and says EOPNOTSUPP."""
    ours = ctypes.CDLL(str(library), use_errno=True)
    ours.ibv_import_device.restype = ctypes.c_void_p
    for function, answer, sets in (
        ("ibv_import_device", None, 95),
        ("ibv_dm_export_dmabuf_fd", -1, 95),
        ("ibv_dealloc_dmah", 95, 0),
        ("ibv_query_qp_data_in_order", 0, 0),
    ):
        ctypes.set_errno(0)
        assert getattr(ours, function)(None, None) == answer, function
        assert ctypes.get_errno() == sets, function


@pytest.mark.parametrize(
    "function",
    [
        "ibv_copy_ah_attr_from_kern",
        "ibv_copy_qp_attr_from_kern",
        "ibv_copy_path_rec_from_kern",
        "ibv_copy_path_rec_to_kern",
    ],
)
def test_copies_structures(installed: Path, library: Path, function: str) -> None:
    """The copy of each structure of the kernel's equals that of Debian's library, and leaves alone
    what that leaves alone.
    """
    copies = []
    chance = random.Random(function)
    source, before = chance.randbytes(512), chance.randbytes(512)
    for path in (installed, library):
        to = ctypes.create_string_buffer(before, len(before))
        getattr(ctypes.CDLL(str(path)), function)(to, ctypes.create_string_buffer(source, 512))
        copies.append(to.raw)
    assert copies[0] != before
    assert copies[1] == copies[0]
