"""What the relay's process may do."""

from __future__ import annotations

import errno
import signal
import subprocess
from pathlib import Path

import pytest

from testbed import relays as client
from testbed.relays import TCP, connect, link, relay, result
from tests.dataplane.places import ROOT, compile_c

CONFINE = ROOT / "dataplane" / "relay" / "confine.c"
HERE = Path(__file__).parent
IPC_LOCK = 14


@pytest.fixture(scope="module")
def confined(folder: Path) -> Path:
    """A program that is confined as the relay is, and makes one system call."""
    return compile_c(HERE / "confined.c", folder / "confined", str(CONFINE), "-lseccomp")


def status(pid: int) -> dict[str, str]:
    """What /proc says about a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize(
    "call", ["execve", "ptrace", "setns", "unshare", "mount", "bpf", "connect"]
)
def test_calls_of_an_attacker_end_the_process(confined: Path, call: str) -> None:
    """The kernel ends a relay that starts a program, enters a namespace or connects to a host."""
    assert subprocess.run([confined, call], check=False).returncode == -signal.SIGSYS


@pytest.mark.parametrize("call", ["pidfd_getfd", "inet", "unlink", "create", "unknown"])
def test_calls_that_are_not_needed_do_not_exist(confined: Path, call: str) -> None:
    """Other calls that the relay does not make fail, and the relay goes on."""
    said = subprocess.run([confined, call], check=True, capture_output=True, text=True)
    assert int(said.stdout) == errno.ENOSYS


@pytest.mark.parametrize("call", ["netlink", "look"])
def test_calls_of_device_libraries_work(confined: Path, call: str) -> None:
    """The libraries that open a device can do so."""
    said = subprocess.run([confined, call], check=True, capture_output=True, text=True)
    assert int(said.stdout) == 0


def test_a_relay_is_confined_and_works(shipped: Path, end: Path) -> None:
    """A relay without capabilities and with a filter carries bytes over TCP."""
    with relay(shipped) as a, relay(shipped) as b:
        for each in (a, b):
            assert not each.open(transport=TCP, encryption=1).error
            found = status(each.process.pid)
            assert (
                int(found["CapEff"], 16) | int(found["CapPrm"], 16) | 1 << IPC_LOCK == 1 << IPC_LOCK
            )
            assert (found["Seccomp"], found["NoNewPrivs"]) == ("2", "1")
        link(a, b)
        one, two = connect(a, b)
        sender = one.popen(end, "send=3000000", "message=9000")
        assert result(two.popen(end, "peer_seed=1"))["received"] == 3_000_000
        result(sender)


def test_the_transport_of_tests_is_not_shipped(shipped: Path, plain: Path) -> None:
    """Only builds for tests can open another process's memory, and have the code for it."""
    assert b"the loopback transport" in plain.read_bytes()
    assert b"the loopback transport" not in shipped.read_bytes()
    with relay(shipped) as a:
        assert a.open(transport=client.LOOPBACK).error
