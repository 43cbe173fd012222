"""Sessions as the router has them, without the rest of it, in a process of some host: `python3
session_probe.py FOLDER PORT SOURCE PEER…`.

It prints a line of JSON whenever something has changed. It sends a number in each session that
comes up; "greeted" lists the peers whose number has come. It also runs inside the plugin, so it
imports nothing of the tests.
"""

from __future__ import annotations

import json
import secrets
import select
import subprocess
import sys
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import structlog

from dataplane.router.identities import choose
from dataplane.router.library_wire import IPAddress
from dataplane.router.loop import EpollLoop
from dataplane.router.peer_wire import Message, PeerHello, Withdraw
from dataplane.router.sessions import Sessions


class Probe:
    """Such a process, seen from outside. `start` starts a command in the place of the probe, with
    its output in files.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        start: Callable[..., subprocess.Popen[bytes]],
        *arguments: object,
    ) -> None:
        self.name = name
        self._log = folder / f"{name}.json"
        with self._log.open("wb") as log, (folder / f"{name}.log").open("wb") as errors:
            self._process = start(
                ["python3", "-P", "-c", Path(__file__).read_text(), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=errors,
            )

    def all(self) -> list[Any]:
        """All lines that it has printed."""
        lines = self._log.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def says(self) -> Any:
        """Its last line."""
        said = self.all()
        return said[-1] if said else {"node": "", "reason": "nothing said yet", "peers": {}}

    def hears(self, *peers: object) -> bool:
        """Whether numbers have come from all of these peers, in their current sessions."""
        said = self.says()["peers"]
        return all(said.get(str(peer)) == "greeted" for peer in peers)

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait(60)


class Greeter:
    """Sends a number to each peer that comes up, and records the peers from which one has come."""

    def __init__(self) -> None:
        self.sessions: Sessions | None = None
        self.greeted: set[IPAddress] = set()

    def up(self, peer: IPAddress, hello: PeerHello) -> None:
        assert self.sessions is not None
        self.sessions.send(peer, Withdraw(len(hello.node)))

    def down(self, peer: IPAddress, reason: str) -> None:
        self.greeted.discard(peer)

    def message(self, peer: IPAddress, message: Message) -> None:
        self.greeted.add(peer)

    def eased(self, peer: IPAddress) -> None:
        return


def main() -> None:
    folder, port, source, *peers = sys.argv[1:]
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    epoll = select.epoll()
    loop = EpollLoop(epoll)
    identities = choose(Path(folder))
    greeter = Greeter()
    sessions = Sessions(
        loop, identities, greeter, instance=secrets.token_hex(16), port=int(port), build="probe"
    )
    greeter.sessions = sessions
    sessions.start()
    sessions.introduce(data_path=source, rdma=False)
    sessions.want({ip_address(peer) for peer in peers}, ip_address(source))
    last = ""
    while True:
        for descriptor, events in epoll.poll(loop.timeout(1), 64):
            loop.serve(descriptor, events)
        loop.fire()
        identity = identities.current()
        said = json.dumps(
            {
                "node": identity.own.node if identity else "",
                "cluster": identity.own.cluster if identity else "",
                "role": identity.own.role if identity else "",
                "expires": identity.own.expires if identity else 0,
                "reason": sessions.reason,
                "peers": {
                    str(peer): reason or ("greeted" if peer in greeter.greeted else "up")
                    for peer, reason in sessions.reasons().items()
                },
                "ended": sessions.counts().ended,
                "begun": sessions.counts().begun,
            }
        )
        if said != last:
            print(said, flush=True)
            last = said


if __name__ == "__main__":
    main()
