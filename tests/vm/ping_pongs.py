"""Queue pairs between containers of two hosts: `ibv_rc_pingpong` of rdma-core, unchanged, which
checks what it receives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dataplane.control import QueuePairFact
from testbed.process import wait_until
from tests.dataplane.places import ROOT
from tests.vm.cluster import LIBRARY, Host

BUILT_VERBS: Final = ROOT / "build/verbs"
FOLDER: Final = "/run/freeflow/verbs"
FILES: Final[dict[str, Path]] = {
    f"{FOLDER}/{path.name}": path for path in BUILT_VERBS.glob("libibverbs.so*")
}
"""For `cluster`."""
PORT: Final = 18515
"""Where the program's server listens."""
ENDLESS: Final = 10_000_000
"""Rounds that take longer than any test."""


def queue_pairs(hosts: list[Host]) -> list[QueuePairFact]:
    """All of them."""
    return [fact for host in hosts for fact in host.router.verbs().queue_pairs]


class PingPong:
    """Two programs that send each other messages by queue pairs. `options` are the program's."""

    def __init__(self, hosts: list[Host], rounds: int, *options: str) -> None:
        self._hosts = hosts
        a, b = (host.containers[0] for host in hosts)
        preload = f"LD_PRELOAD={LIBRARY}:{FOLDER}/libibverbs.so.1"
        command = ["env", preload, "ibv_rc_pingpong", "-g", "0", "-c", "-n", str(rounds), *options]
        self.server = b.start(command, accelerated=False)
        b.wait_listening(PORT)
        self.client = a.start([*command, str(b.ipv4)], accelerated=False)

    @classmethod
    def endless(cls, hosts: list[Host]) -> PingPong:
        """Two that sleep between messages, which the hosts' devices carry by now."""
        made = cls(hosts, ENDLESS, "-e")
        wait_until("rdma", lambda: [one.path for one in queue_pairs(hosts)] == ["rdma"] * 2, 120)
        made.moves()
        return made

    def moves(self) -> None:
        """Wait until further messages are exchanged."""
        before = self._operations()
        wait_until("messages", lambda: self._operations() > before, 120)

    def _operations(self) -> int:
        """As the programs' libraries say, once a second."""
        return min((one.operations for one in queue_pairs(self._hosts)), default=0)

    def check(self, patience: float = 240) -> None:
        """Both programs end, and have received what was sent."""
        self.client.check(patience)
        self.server.check(patience)

    def fails(self, patience: float = 60) -> None:
        """Both programs end, because their peers are gone."""
        for end in (self.client, self.server):
            assert end.wait(patience) > 0
            assert "transport retry counter exceeded" in end.output + end.errors

    def stop(self) -> None:
        """Kill one end. The other one hears of it."""
        self.client.kill()
        assert self.server.wait(60) > 0
