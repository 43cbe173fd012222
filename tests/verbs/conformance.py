"""rdma-core's own tests of devices, which come with Debian's pyverbs, on our device.

Each test of the modules in `MODULES` runs and passes, but those in `LEFT_OUT`. A test that skips
itself counts as one that fails.

They run in processes of the system's Python, since Debian packages pyverbs for that one: this file
is its program as well, and imports nothing of the project.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any, Final

MODULES: Final = (
    "test_device",
    "test_cq",
    "test_cqex",
    "test_cq_events",
    "test_pd",
    "test_mr",
    "test_qp",
    "test_qpex",
    "test_atomic",
    "test_relaxed_ordering",
    "test_parent_domain",
    "test_fork",
    "test_addr",
    "test_rdmacm",
)
"""Those that are not here are about other things: test_flow and test_rss_traffic need raw packets,
test_odp on-demand paging, test_tag_matching tag matching, test_shared_pd descriptors of a device's
kernel driver, and those with mlx5, efa or cuda in their name such cards.
rdma_rxe of Linux 6.1 passes none of these either.
"""
BY_ADDRESS: Final = ("test_rdmacm",)
"""Those that connect by the container's address."""
ADDRESS: Final = "10.0.4.1"
_NO_DEVICE_MEMORY: Final = "there is no memory on the device: max_dm_size is 0"
_NO_XRC: Final = "XRC is not supported"
_NO_RAW: Final = "there are no raw packets"
_HOW: Final = ("no_attr", "with_attr", "ex_no_attr", "ex_with_attr")
_NO_ALLOCATORS: Final = "programs can't allocate the memory of queues, which is no device's"
_NO_GPU: Final = "needs the memory of a graphics card"
LEFT_OUT: Final = {
    "test_device.DMTest": _NO_DEVICE_MEMORY,
    "test_device.SharedDMTest": _NO_DEVICE_MEMORY,
    "test_cqex.CqExTestCase.test_xrc_traffic_cq_ex": _NO_XRC,
    "test_mr.DeviceMemoryAPITest": _NO_DEVICE_MEMORY,
    "test_mr.DeviceMemoryTest": _NO_DEVICE_MEMORY,
    "test_mr.DmaBufMRTest": _NO_GPU,
    "test_mr.DmaBufTestCase": _NO_GPU,
    **{f"test_qp.QPTest.test_create_raw_qp_{how}": _NO_RAW for how in _HOW},
    "test_qp.QPTest.test_query_raw_qp": _NO_RAW,
    "test_qpex.QpExTestCase.test_qp_ex_rc_atomic_write": "ATOMIC WRITE is not supported",
    "test_qpex.QpExTestCase.test_qp_ex_xrc_send": _NO_XRC,
    "test_qpex.QpExTestCase.test_qp_ex_xrc_send_imm": _NO_XRC,
    "test_atomic.AtomicTest.test_xrc_atomic_cmp_and_swap": _NO_XRC,
    "test_atomic.AtomicTest.test_xrc_atomic_fetch_and_add": _NO_XRC,
    **{
        f"test_parent_domain.ParentDomainTrafficTest.test_{test}": _NO_ALLOCATORS
        for test in (
            "default_allocators_rc_traffic",
            "huge_page_traffic",
            "mem_align_rc_traffic",
            "mem_align_srq_excq_rc_traffic",
            "mem_align_ud_traffic",
        )
    },
    "test_relaxed_ordering.RoTestCase.test_ro_xrc_traffic": _NO_XRC,
}
"""Modules, classes and tests, each with the reason. rdma_rxe of Linux 6.1 passes none of them: it
lacks the same.
"""
SAYS_LEFT_OUT: Final = "left out"
"""The outcome of those."""
ROOT: Final = Path(os.environ.get("PYVERBS_ROOT", "/"))
"""Where Debian's package is unpacked."""
PACKAGES: Final = ROOT / "usr/lib/python3/dist-packages"
SOURCES: Final = ROOT / "usr/share/doc/rdma-core/tests"
PYTHON: Final = Path("/usr/bin/python3")
_ARGUMENTS: Final = """
from args_parser import parser
parser.args = dict(
    dev=None, pci_dev=None, port=1, gid=None, gpu=0, gtt=False, list_tests=False, verbosity=0
)
"""
"""What their `__init__.py` becomes: theirs loads all modules, also those for certain cards."""


def unpack(folder: Path) -> None:
    """Write the tests into a folder, as Debian compresses most of them."""
    to = folder / "tests"
    to.mkdir()
    for source in SOURCES.iterdir():
        data = source.read_bytes()
        if source.suffix == ".gz":
            (to / source.stem).write_bytes(gzip.decompress(data))
        else:
            (to / source.name).write_bytes(data)
    (to / "__init__.py").write_text(_ARGUMENTS)


def environment(folder: Path) -> dict[str, str]:
    """What a process needs to find the unpacked tests and pyverbs."""
    return {"PYTHONPATH": f"{PACKAGES}:{folder}:{folder / 'tests'}"}


def reason(test: str) -> str | None:
    """Why a test is left out; None: it is not."""
    module, _, rest = test.partition(".")
    case = rest.partition(".")[0]
    return LEFT_OUT.get(module) or LEFT_OUT.get(f"{module}.{case}") or LEFT_OUT.get(test)


def outcome(test: unittest.TestCase) -> str | None:
    """Run a test. None: it has passed; otherwise what it said."""
    result = unittest.TestResult()
    test.run(result)
    said = [*result.errors, *result.failures, *result.skipped]
    return "\n".join(why for _, why in said) or None


def tests_of(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    """All tests of a suite and of those in it."""
    found: list[unittest.TestCase] = []
    for each in suite:
        found += tests_of(each) if isinstance(each, unittest.TestSuite) else [each]
    return found


def run(module: ModuleType) -> dict[str, str | None]:
    """The outcomes of a module's tests."""
    said = {}
    for test in tests_of(unittest.defaultTestLoader.loadTestsFromModule(module)):
        name = test.id().removeprefix("tests.")
        said[name] = SAYS_LEFT_OUT if reason(name) else outcome(test)
    return said


def tell_address(base: ModuleType) -> None:
    """Have the tests connect by the container's address, which they look for with a program that
    knows nothing of the device.
    """

    def add(self: Any, device: str, port: int, index: int) -> None:
        self.args.append([device, port, index, ADDRESS, None])

    base.RDMATestCase._get_ip_mac = add


def main() -> None:
    """Print what the tests of a module came to."""
    name = f"tests.{sys.argv[1]}"
    __import__(name)
    tell_address(sys.modules["tests.base"])
    print(json.dumps(run(sys.modules[name])))


if __name__ == "__main__":
    main()
