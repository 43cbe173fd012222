"""The thread that refreshes the kernel's part each second."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from driver.kernel_refresh import KernelRefresh
from testbed.patience import patience


@dataclass
class FakeKernel:
    """Counts refreshes; the first `broken` of them fail."""

    looks: int = 0
    inside: list[tuple[str, Path]] = field(default_factory=list)
    broken: int = 0

    def refresh(self) -> None:
        self.looks += 1
        if self.looks <= self.broken:
            raise RuntimeError("a bug")

    def check_forwarding(self, endpoint_id: str, sandbox: Path) -> None:
        self.inside.append((endpoint_id, sandbox))


def test_containers_are_looked_into_now_and_then() -> None:
    """Each step refreshes the host; containers are checked every ten seconds."""
    now = [0.0]
    kernel = FakeKernel()
    made = KernelRefresh(kernel, lambda: [("e", Path("/n"))], lambda: now[0])
    for _ in range(21):
        made.once()
        now[0] += 1
    assert kernel.looks == 21
    assert kernel.inside == [("e", Path("/n"))] * 3


def test_it_outlives_what_a_look_meets() -> None:
    """A refresh that fails is followed by the next; `stop` ends the thread."""
    kernel = FakeKernel(broken=1)
    made = KernelRefresh(kernel, list, every=0.01)
    made.start()
    deadline = time.monotonic() + patience(5)
    while kernel.looks < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    made.stop()
    assert kernel.looks >= 3
