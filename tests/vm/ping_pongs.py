"""Queue pairs between containers of two hosts: `ibv_rc_pingpong` of rdma-core, unchanged, which
checks what it receives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dataplane.control import QueuePairFact
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


def queue_pairs(hosts: list[Host]) -> list[QueuePairFact]:
    """All of them."""
    return [fact for host in hosts for fact in host.router.verbs().queue_pairs]


class PingPong:
    """Two programs that send each other messages by queue pairs. `options` are the program's."""

    def __init__(self, hosts: list[Host], rounds: int, *options: str) -> None:
        a, b = (host.containers[0] for host in hosts)
        preload = f"LD_PRELOAD={LIBRARY}:{FOLDER}/libibverbs.so.1"
        command = ["env", preload, "ibv_rc_pingpong", "-g", "0", "-c", "-n", str(rounds), *options]
        self.server = b.start(command, accelerated=False)
        b.wait_listening(PORT)
        self.client = a.start([*command, str(b.ipv4)], accelerated=False)

    def check(self, patience: float = 240) -> None:
        """Both programs end, and have received what was sent."""
        self.client.check(patience)
        self.server.check(patience)
