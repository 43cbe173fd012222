"""`python -m bench.encrypted_networks`: what encryption costs, on FreeFlow and on Docker's overlay.

Two virtual machines are one Swarm, with a network of each driver in the clear and encrypted. Of
each network iperf3 measures the throughput and ping the round trip between two containers, and the
guests' own counters their processor time, on both hosts together. Rounds take turns, and medians
are printed.

On a machine whose processor cannot virtualise, the guests are emulated. Their processor then has
no instructions for AES, so IPsec is slower than on any real one: such figures compare nothing but
the versions of FreeFlow, and the table says so.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

import click

from testbed.host import PLUGIN
from testbed.images import TOP
from testbed.process import CommandError, wait_until
from testbed.vm import guests
from testbed.vm.guest import accelerator
from testbed.vm.guest_engine import IMAGE, MEMORY, RUN, GuestEngine, engine_disk, make_swarm

NETWORKS: Final = {
    "freeflow": (PLUGIN, ()),
    "freeflow, encrypted (WireGuard)": (PLUGIN, ("-o", "encrypted")),
    "overlay": ("overlay", ()),
    "overlay, encrypted (IPsec)": ("overlay", ("-o", "encrypted")),
}
UNDERLAY_MTU: Final = 1500
PINGS: Final = 50
_TICKS: Final = 100
"""Units of /proc/stat in a second."""


@dataclass(frozen=True)
class EncryptionCost:
    """One round on one network: megabits a second, milliseconds, processor seconds per gigabyte."""

    throughput: float
    round_trip: float
    processor: float


class NetworkPair:
    """Two containers, one on each host, on one network."""

    def __init__(
        self, engines: list[GuestEngine], number: int, driver: str, options: tuple[str, ...]
    ):
        self._engines = engines
        self.name = f"bench{number}"
        engines[0].docker("network", "create", "-d", driver, "--attachable", *options, self.name)
        for engine in engines:
            command = ("--network", self.name, *RUN, IMAGE, "sleep", "100000")
            engine.docker("run", "-d", "--name", self.name, *command)
        details = engines[1].api(f"containers/{self.name}/json")
        self.target = str(details["NetworkSettings"]["Networks"][self.name]["IPAddress"])
        server = ("exec", "-d", self.name, "iperf3", "-s")
        engines[1].docker(*server)
        wait_until(f"{self.name}: a container answers", self._answers, 120, 1)

    def _inside(self, *command: str) -> str:
        return self._engines[0].docker("exec", self.name, *command)

    def _answers(self) -> bool:
        try:
            return bool(self._inside("ping", "-c", "1", "-W", "2", self.target))
        except CommandError:
            return False

    def measure(self, seconds: int) -> EncryptionCost:
        pings = self._inside("ping", "-c", str(PINGS), "-i", "0.05", "-q", self.target)
        average = re.search(r"= [\d.]+/([\d.]+)/", pings)
        assert average is not None, pings
        before = sum(map(busy, self._engines))
        report = json.loads(self._inside("iperf3", "-J", "-c", self.target, "-t", str(seconds)))
        used = sum(map(busy, self._engines)) - before
        received = report["end"]["sum_received"]
        return EncryptionCost(
            throughput=received["bits_per_second"] / 1e6,
            round_trip=float(average[1]),
            processor=used / (received["bytes"] / 1e9),
        )


def busy(engine: GuestEngine) -> float:
    """The seconds that a guest's processors have worked."""
    first = engine.guest.run(["head", "-1", "/proc/stat"]).stdout.split()[1:9]
    user, nice, system, _idle, _wait, *interrupts = map(int, first)
    return (user + nice + system + sum(interrupts[:2])) / _TICKS


@click.command(help=__doc__)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=5, show_default=True, help="Of each iperf3.")
def main(rounds: int, seconds: int) -> None:
    disk = engine_disk(TOP / "build/plugin")
    with guests(2, memory=MEMORY, mtu=UNDERLAY_MTU, disk=disk) as made:
        engines = [GuestEngine(guest) for guest in made]
        make_swarm(engines)
        pairs = {
            name: NetworkPair(engines, number, driver, options)
            for number, (name, (driver, options)) in enumerate(NETWORKS.items())
        }
        found = defaultdict(list)
        for _ in range(rounds):
            for name, pair in pairs.items():
                found[name].append(pair.measure(seconds))
    if "kvm" not in accelerator():
        click.echo("The guests are emulated: compare only versions of FreeFlow, not the rows.")
    click.echo(f"{'network':34}{'Mbit/s':>10}{'ms':>10}{'CPU s/GB':>10}")
    for name, costs in found.items():
        middle = [
            statistics.median(getattr(cost, field) for cost in costs)
            for field in ("throughput", "round_trip", "processor")
        ]
        click.echo(f"{name:34}" + "".join(f"{value:10.2f}" for value in middle))


if __name__ == "__main__":
    main()
