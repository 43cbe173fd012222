"""The virtual machines themselves: they have real RDMA, and reach nothing from which they are cut
off.
"""

from __future__ import annotations

import hashlib
import random

import pytest

from testbed.process import CommandError, wait_until
from testbed.vm import Guest, GuestGoneError, guests

WRITE = "/src/tests/vm/programs/write.py"
SIZE = 300_007  # No multiple of a chunk's size.


@pytest.mark.parametrize("version", [4, 6])
def test_memory_is_written_across_guests_byte_for_byte(pair: list[Guest], version: int) -> None:
    """RDMA WRITE works between two guests, over RoCE v2 with addresses of both versions."""
    a, b = pair
    content = random.Random(version).randbytes(SIZE)
    mine, theirs = (str(g.address if version == 4 else g.address6) for g in pair)
    reader = a.start(["python3", WRITE, "rxe0", mine, str(SIZE)])
    a.wait_listening(18600)
    b.run(["python3", WRITE, "rxe0", theirs, str(SIZE), mine], stdin=content)
    assert reader.check().strip() == hashlib.sha256(content).hexdigest()


def test_the_tools_of_rdma_work_between_guests(pair: list[Guest]) -> None:
    """`ibv_rc_pingpong` with events works, and so does `rping` with the connection manager."""
    a, b = pair
    pingpong = ["ibv_rc_pingpong", "-e", "-d", "rxe0", "-g", "1", "-n", "50"]
    server = a.start(pingpong)
    a.wait_listening(18515)
    assert "50 iters" in b.run([*pingpong, str(a.address)]).stdout
    assert "50 iters" in server.check()
    server = a.start(["rping", "-s", "-a", str(a.address), "-C", "5", "-v"])
    b.sh(f"until rping -c -a {a.address} -C 5 2>/tmp/rping; do sleep 0.2; done", timeout=30)
    assert server.check().count("server ping data: rdma-ping") == 5


def test_a_cut_guest_is_unreachable_until_healed(pair: list[Guest]) -> None:
    """Frames are lost while the underlay is cut, and the NIC's carrier can be removed."""
    a, b = pair
    ping = ["ping", "-c", "1", "-W", "1", str(b.address)]
    a.cut_underlay()
    assert a.run(ping, check=False).returncode == 1
    a.heal_underlay()
    wait_until("the other guest", lambda: a.run(ping))
    b.set_carrier(False)
    assert "DOWN" in b.run(["rdma", "link", "show", "rxe0/1"]).stdout
    b.set_carrier(True)
    wait_until("the device", lambda: "ACTIVE" in b.run(["rdma", "link", "show", "rxe0/1"]).stdout)


def test_commands_are_those_of_the_guest() -> None:
    """Exit codes, output, input, signals and files pass unchanged; a guest that is off says so, and
    returns empty.
    """
    with guests(1) as (guest,):
        done = guest.run(["sh", "-c", "cat; echo oops >&2; exit 3"], stdin="in\n", check=False)
        assert (done.returncode, done.stdout, done.stderr) == (3, "in\n", "oops\n")
        with pytest.raises(CommandError, match="no-such-program"):
            guest.run(["no-such-program"])
        with pytest.raises(CommandError, match=r"waited [\d.]+ s"):
            guest.run(["sleep", "60"], timeout=0.2)
        content = random.Random(1).randbytes(3_000_000)
        guest.push(content, "/root/new/file", 0o640)
        assert guest.pull("/root/new/file") == content
        assert guest.run(["stat", "-c", "%a", "file"], cwd="/root/new").stdout == "640\n"
        tree = guest.start(["sh", "-c", "sleep 60 & wait"])
        tree.kill()
        assert tree.wait() == -9
        left = guest.start(["sleep", "60"])
        guest.power_off()
        with pytest.raises(GuestGoneError):
            left.wait()
        guest.reboot()
        assert guest.run(["ls", "/root"]).stdout == ""
