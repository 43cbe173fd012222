"""What healthy probes answer, of the hosts of `fake_swarm.py`, and the plugin of this host."""

from __future__ import annotations

from typing import Any

from dataplane.control import Connections
from tests.unit.fake_swarm import Answer, FakeSwarm
from tests.unit.statuses import status

HOSTS = {f"h{number}": (f"10.0.1.{number}", f"10.0.1.{100 + number}") for number in (1, 2, 3)}
NODES = [f"node-{name}" for name in HOSTS]


class FakePlugin:
    """`plugin.cli.client.Client` on a host without other facts."""

    def __init__(self, engine: FakeSwarm) -> None:
        self.engine = engine

    def connections(self) -> Connections:
        return Connections(connections=(), reasons={})

    def status(self) -> Any:
        return status()


def hello(to: str, _call: str, _arguments: dict[str, Any]) -> Any:
    mac = f"02:42:0a:00:01:{int(to.rpartition('.')[2]):02x}"
    interface = {"name": "eth0", "ipv4": to, "ipv6": [], "mac": mac, "mtu": 1450}
    return {"interfaces": [interface], "library": True, "verbs": False}


def _resolve(_to: str, _call: str, arguments: dict[str, Any]) -> Any:
    ones, twos = ([each[role] for each in HOSTS.values()] for role in (0, 1))
    answers = (["10.0.1.99"], ones, twos, twos)
    return dict(zip(arguments["names"], answers, strict=True))


def probe_answers() -> dict[str, Answer]:
    """By call."""
    return {
        "hello": hello,
        "resolve": _resolve,
        "identities": lambda *_: {
            "answers": dict.fromkeys((f"{node}/one" for node in NODES), 1),
            "failures": [],
        },
        "mtu_edges": lambda *_: {"mtu": 1450, "exact": True, "refused": True, "passing": 1450},
        "datagrams": lambda *_: {"lost": []},
        "transfer": lambda *_: {"there": True, "back": True},
        "move": lambda *_: {"connections": 1, "moved": 1, "right": True},
        "round_trips": lambda *_: {"median": 0.1, "p99": 0.2, "least": 0.1},
        "throughput": lambda *_: {"bits_per_second": 1e9, "bytes": 1},
    }
