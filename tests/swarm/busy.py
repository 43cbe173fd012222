"""Many busy connections between two hosts of a Swarm, of a service on each."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from testbed import Host, wait_until
from testbed.bed import in_parallel
from testbed.host import PLUGIN
from testbed.patience import within
from tests.swarm.conftest import plugin_answers

PROGRAM: Final = Path(__file__).parent / "programs/echoes.py"
COUNT: Final = 50
FILE: Final = "/tmp/load"
LONGEST: Final = 15.0
"""Seconds of a quiet machine within which each question is answered, or its connection lost."""
METRICS: Final = "127.0.0.1:9477"
EASY: Final = {
    "RELAY_BUSY": "10",
    "RELAY_MESSAGES": "200",
    "RELAY_PAUSE": "5",
    "METRICS_ADDR": METRICS,
}
"""Settings with which a busy machine's connections enter the relay, too."""
USUAL: Final = {
    "RELAY_BUSY": "200",
    "RELAY_MESSAGES": "5000",
    "RELAY_PAUSE": "60",
    "METRICS_ADDR": "",
}


@dataclass(frozen=True)
class Load:
    """What `programs/echoes.py` says."""

    verdict: str
    done: int
    lost: int
    longest: float


def command(address: str, count: int = COUNT, renewal: float = 0) -> str:
    """The shell command that asks a redis server all the time."""
    return f"exec python3 -c {shlex.quote(PROGRAM.read_text())} {address} {count} {renewal} {FILE}"


def load(host: Host, container: str) -> Load:
    """What the program of a container says now. It must not have had a wrong answer, nor one that
    is overdue.
    """

    def words() -> list[str]:
        return host.exec(container, "cat", FILE).split()

    verdict, done, lost, longest = wait_until("the load", words, 30)
    said = Load(verdict, int(done), int(lost), float(longest))
    assert said.verdict == "right", said
    assert said.longest < within(LONGEST), said
    return said


def goes_on(host: Host, container: str, what: str) -> Load:
    """Wait until so many more answers have come that each connection had some."""
    before = load(host, container)

    def more() -> Load | None:
        now = load(host, container)
        return now if now.done > before.done + 10 * COUNT else None

    return wait_until(f"answers {what}", more, 30, 0.5) or before


def configure(hosts: Sequence[Host], settings: Mapping[str, str]) -> None:
    """Change the plugin's settings on some hosts."""

    def change(host: Host) -> None:
        host.docker("plugin", "disable", "-f", PLUGIN)
        host.docker(
            "plugin", "set", PLUGIN, *(f"{name}={value}" for name, value in settings.items())
        )
        host.docker("plugin", "enable", PLUGIN)
        wait_until(f"the plugin of {host.name}", lambda: plugin_answers(host), 30)

    in_parallel([lambda h=host: change(h) for host in hosts])  # type: ignore[misc]


def paths(host: Host, container: str) -> Counter[str]:
    """The paths of a container's connections, "overlay" also with the fast path."""
    listed = json.loads(host.freeflow("connections", "--json"))["connections"]
    return Counter(
        each["path"].partition("+")[0] for each in listed if each["container"] == container
    )


def task(host: Host, service: str) -> str:
    """The container of a service's only task on a host, once it runs; "" before."""
    wanted = f"label=com.docker.swarm.service.name={service}"
    return host.docker("ps", "--format", "{{.Names}}", "--filter", wanted).strip()


def metric(host: Host, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    address, _, port = METRICS.partition(":")
    script = f"exec 3<>/dev/tcp/{address}/{port}; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    total = 0.0
    for line in host.run("bash", "-c", script).splitlines():
        sample, _, value = line.rpartition(" ")
        if sample.partition("{")[0] == name and all(word in sample for word in wanted):
            total += float(value)
    return total
