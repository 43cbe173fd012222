"""Sessions as the router has them, with nothing else: run inside the plugin, `python3 session_probe.py FOLDER PORT SOURCE PEER…`.

Prints a line of JSON whenever something has changed. Each session that comes up greets with a message, which is counted
when it arrives.
"""

from __future__ import annotations

import json
import secrets
import select
import sys
from ipaddress import ip_address
from pathlib import Path

import structlog

from dataplane.router.identity import choose
from dataplane.router.loop import EpollLoop
from dataplane.router.peer_wire import Hello, Message, Withdraw
from dataplane.router.peers import Sessions
from dataplane.router.wire import IPAddress


class Greeter:
    """Says a number to each peer that comes up, and remembers from whom it heard one."""

    def __init__(self) -> None:
        self.sessions: Sessions | None = None
        self.greeted: set[IPAddress] = set()

    def up(self, peer: IPAddress, hello: Hello) -> None:
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
        identity = identities.look()
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
