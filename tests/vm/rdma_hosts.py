"""Guests as hosts with RDMA between them, for tests: see `programs/host.py`, which runs in each."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tests.testbed.vm import Guest, Process, guests
from tests.testbed.vm.guest import SOURCES

HOST: Final = "/src/tests/vm/programs/host.py"
KEY: Final = "a secret of guests that are one wire apart"
LIBRARY: Final = "/run/freeflow/libfreeflow.so"
RELAY: Final = "/opt/freeflow/freeflow-relay"
PATIENCE: Final = 60.0


class Host:
    """One guest with its router."""

    def __init__(self, guest: Guest, every: Sequence[int], settings: dict[str, Any]) -> None:
        self.guest = guest
        self._every = every
        self._settings = {"session_key": KEY, **settings}
        self._host: Process | None = None

    def address(self, place: int = 0) -> str:
        """Of its container of this place."""
        return f"10.78.0.{self.guest.number}{place}"

    def install(self, library: Path, relay: Path) -> None:
        """What the plugin brings along."""
        self.guest.push(library, LIBRARY)
        self.guest.push(relay, RELAY)

    def up(self) -> None:
        """Containers, and the router; linked some time later."""
        others = ",".join(str(each) for each in self._every if each != self.guest.number)
        self._host = self.guest.start(
            [
                "python3",
                HOST,
                "up",
                "--number",
                str(self.guest.number),
                "--peers",
                others,
                "--settings",
                json.dumps(self._settings),
            ],
            env=SOURCES,
        )

    def ask(self, what: str) -> dict[str, Any]:
        """`statistics` or `connections`."""
        found: dict[str, Any] = json.loads(
            self.guest.run(["python3", HOST, what], env=SOURCES).stdout
        )
        return found

    def rdma(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("statistics")["rdma"]
        return found

    def wait_linked(self, count: int = 1, patience: float = PATIENCE) -> None:
        """Until it has links with so many others."""
        until = time.monotonic() + patience
        while True:
            done = self.guest.run(["python3", HOST, "statistics"], env=SOURCES, check=False)
            rdma = json.loads(done.stdout)["rdma"] if done.returncode == 0 else None
            links = [peer["link"] for peer in rdma["peers"]] if rdma and not rdma["why"] else []
            if links.count("up") >= count:
                return
            assert time.monotonic() < until, (done.stderr, rdma, self.log())
            time.sleep(0.5)

    def paths(self) -> list[str]:
        """Of the connections of its containers."""
        return [each["path"] for each in self.ask("connections")["connections"]]

    def log(self) -> str:
        """What host and router have said."""
        return "" if self._host is None else self._host.output + self._host.errors

    def pid(self, name: str) -> int:
        """Of the router or the relay."""
        pattern = {"router": "dataplane.router", "relay": RELAY}[name]
        return int(self.guest.run(["pgrep", "-f", "-n", pattern]).stdout.split()[0])

    def _inside(self, container: str, command: Sequence[str]) -> list[str]:
        preload = f"LD_PRELOAD={LIBRARY}"
        return ["ip", "netns", "exec", container, "env", preload, *command]

    def start(self, command: Sequence[str], container: str = "a", **more: Any) -> Process:
        """Start a program with the library in a container."""
        return self.guest.start(self._inside(container, command), **more)

    def run(self, command: Sequence[str], container: str = "a", **more: Any) -> str:
        """Run one to its end."""
        return self.guest.run(self._inside(container, command), **more).stdout


@contextlib.contextmanager
def rdma_hosts(
    library: Path, relay: Path, count: int = 2, memory: int = 768, **settings: Any
) -> Iterator[list[Host]]:
    """Guests with an RDMA device each, linked."""
    with guests(count, memory=memory) as made:
        every = [guest.number for guest in made]
        hosts = [Host(guest, every, settings) for guest in made]
        for host in hosts:
            host.guest.rxe_up()
            host.install(library, relay)
            host.up()
        for host in hosts:
            host.wait_linked(count - 1)
        yield hosts
