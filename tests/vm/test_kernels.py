"""The eBPF programs on kernels of several ages.

`tests/kernel/test_ebpf_programs.py` tries the machine's own kernel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from testbed.images import TOP
from testbed.vm import KERNELS, Guest, KernelAbsentError, guests
from testbed.vm.guest import SOURCES
from testbed.vm.guest_images import kernel

OBJECT = TOP / "build/overlay.bpf.o"
ENCRYPTED = "tests/kernel/test_wireguard.py"
OLDEST = "5.10"
STAGES = {
    "5.10": ["same-host", "receive"],
    "6.1": ["same-host", "receive", "tunnel"],
    "6.12": ["same-host", "receive", "tunnel"],
}


@pytest.fixture(scope="module")
def by_kernel() -> Iterator[dict[str, Guest | str]]:
    """A guest for each kernel, or the reason why there is none."""
    absent: dict[str, Guest | str] = {}
    for name in KERNELS:
        try:
            kernel(name)
        except KernelAbsentError as error:
            absent[name] = str(error)
    present = [name for name in KERNELS if name not in absent]
    with guests(kernels=present, memory=512) as made:
        yield absent | dict(zip(present, made, strict=True))


@pytest.mark.skipif(not OBJECT.exists(), reason=f"missing: {OBJECT} (make ebpf)")
@pytest.mark.parametrize("name", KERNELS)
def test_every_program_is_accepted_and_the_stages_are_known(
    by_kernel: dict[str, Guest | str], name: str
) -> None:
    """The verifier accepts every program, and trying them says which stages the kernel supports."""
    guest = by_kernel[name]
    if isinstance(guest, str):
        pytest.skip(f"kernel {name}: {guest}")
    assert guest.release.startswith(f"{name}.")
    # The current file, not the one that the guests saw when they booted.
    guest.push(OBJECT, "/tmp/overlay.bpf.o")
    command = ["python3", "-m", "dataplane.ebpf", "/tmp/overlay.bpf.o"]
    done = guest.run(command, env=SOURCES, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    probed = json.loads(done.stdout)
    assert set(probed["programs"].values()) == {"accepted"}
    assert probed["stages"] == STAGES[name]


@pytest.mark.skipif(not OBJECT.exists(), reason=f"missing: {OBJECT} (make ebpf)")
# From 6.6 on, the tests in namespaces cover this in seconds; here it takes a minute.
@pytest.mark.parametrize("name", [kernel for kernel in KERNELS if kernel != "6.12"])
def test_packets_take_the_fast_path(by_kernel: dict[str, Guest | str], name: str) -> None:
    """On each older kernel bytes arrive over the highest stage that it supports, between containers
    of one host and of two.
    """
    guest = by_kernel[name]
    if isinstance(guest, str):
        pytest.skip(f"kernel {name}: {guest}")
    guest.push(OBJECT, "/tmp/overlay.bpf.o")
    chosen = "tests/kernel/test_fastpath.py::test_every_kernel_carries_all_bytes"
    said = guest.run(
        ["python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", chosen],
        env={**SOURCES, "FREEFLOW_PROGRAMS": "/tmp/overlay.bpf.o"},
        cwd="/src",
        timeout=240,
        check=False,
    )
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-1000:]
    assert "1 passed" in said.stdout


# The oldest alone is not long, because each takes a minute.
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[] if each == OLDEST else pytest.mark.long) for each in KERNELS],
)
def test_wireguard_encrypts(by_kernel: dict[str, Guest | str], name: str) -> None:
    """With the kernel's WireGuard no byte of a container is in the clear, and nothing is lost while
    keys change, plugins restart and nodes leave.
    """
    guest = by_kernel[name]
    if isinstance(guest, str):
        pytest.skip(f"kernel {name}: {guest}")
    said = guest.run(
        ["python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", ENCRYPTED],
        env=SOURCES,
        cwd="/src",
        timeout=400,
        check=False,
    )
    assert said.returncode == 0, said.stdout[-6000:] + said.stderr[-1000:]
    assert "6 passed" in said.stdout
