"""One host of a test in virtual machines: a relay and its connections, controlled line by line.

    python3 -m tests.relay.host RELAY END

reads {"do": name, "with": arguments} and answers each with one line of JSON.

It imports only the standard library and the router's layout, since guests have nothing else.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testbed import relays as client


class Host:
    """The commands; results are JSON."""

    def __init__(self, relay: client.Relay, program: Path) -> None:
        self.relay = relay
        self.program = program
        self.ends: list[client.End] = []

    def open(self, device: str, gid_index: int, transport: int = client.VERBS) -> Any:
        answer = self.relay.open(device, transport=transport, gid_index=gid_index)
        return [answer.error, answer.text, answer.state]

    def link(self, number: int = 1) -> Any:
        self.relay.number("LINK", number, self.relay.transport)
        answer = self.relay.expect("LINKED", number=number)
        return [answer.error, answer.text, base64.b64encode(answer.words).decode()]

    def connect(self, address: str, number: int = 1) -> Any:
        answer = self.relay.connect(number, base64.b64decode(address))
        return [answer.error, answer.text]

    def place(self, ring: int = client.RING, link: int = 1) -> Any:
        """A new arena; its end's index, number and place."""
        end = client.give_arena(self.relay, ring)
        client.give_bells(end)
        answer = client.place(end, link)
        self.ends.append(end)
        place = base64.b64encode(answer.words).decode()
        return [answer.error, answer.text, len(self.ends) - 1, end.number, place]

    def pair(self, end: int, peer: int, place: str) -> Any:
        self.relay.accept("PAIR", self.ends[end].number, peer, base64.b64decode(place))
        answer = self.relay.expect("PAIRED", number=self.ends[end].number)
        return [answer.error, answer.text]

    def start(self, end: int, *options: str) -> Any:
        self.ends[end].popen(self.program, *options)

    def result(self, end: int) -> Any:
        return client.result(self.ends[end].started[-1], 240)

    def word(self, end: int, direction: int, offset: int, size: int = 8) -> Any:
        return self.ends[end].word(direction, offset, size)

    def tell(self, kind: str, number: int, state: int = 0) -> None:
        self.relay.number(kind, number, state)

    def tell_end(self, kind: str, end: int, state: int = 0) -> None:
        self.relay.number(kind, self.ends[end].number, state)

    def expect(self, kind: str, seconds: float = 60) -> Any:
        answer = self.relay.expect(kind, seconds=seconds)
        return [answer.number, answer.error, answer.text, answer.state]

    def counts(self) -> Any:
        return self.relay.counts()

    def kill(self) -> None:
        self.relay.kill()


def main() -> None:
    """Execute commands until the end of input."""
    with client.relay(Path(sys.argv[1])) as relay:
        host = Host(relay, Path(sys.argv[2]))
        for line in sys.stdin:
            asked = json.loads(line)
            call: Callable[..., Any] = getattr(host, asked["do"])
            try:
                answer = {"is": call(*asked["with"])}
            except AssertionError as error:
                answer = {"failed": str(error)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
