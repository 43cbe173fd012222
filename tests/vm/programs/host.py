"""A guest as a host: containers on an overlay that it shares with its peers, and the router with its relay, as the plugin runs them.

    host.py up --number 1 --peers 2,3 [--containers a,b] [--settings JSON]      until it is killed
    host.py statistics | connections                                            what the router says, as JSON

Container X of guest N is the network namespace X, 10.78.0.N0 and up. A program in it is accelerated with LD_PRELOAD: the library is
where a container has it, and the guest is nobody else's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from dataplane.client import CONTROL, RouterClient
from dataplane.control import EndpointFact, Learn, NetworkFact, Settings
from dataplane.errors import DataplaneError
from plugin.router import RouterProcess

NETWORK = "n1"
SUBNET = "10.78.0"
PORT = 4799
MTU = 4150
RELAY = Path("/opt/freeflow/freeflow-relay")


def sh(script: str) -> None:
    subprocess.run(["sh", "-euc", script], check=True)


def overlay(number: int, peers: list[int], containers: list[str]) -> None:
    """The overlay as the driver makes it: a bridge and a VXLAN device in a namespace of their own."""
    sh(
        f"""
        modprobe -a vxlan veth bridge
        ip netns add overlay
        ip link add vx0 type vxlan id 42 dstport {PORT} local 10.99.0.{number} dev eth0
        ip link set vx0 netns overlay
        ip -n overlay link add br0 type bridge
        ip -n overlay link set vx0 mtu {MTU} master br0 up
        ip -n overlay link set br0 mtu {MTU} up
        """
    )
    for peer in peers:
        sh(f"bridge -n overlay fdb append 00:00:00:00:00:00 dev vx0 dst 10.99.0.{peer}")
    for place, name in enumerate(containers):
        sh(
            f"""
            ip netns add {name}
            ip link add v{name} netns overlay mtu {MTU} type veth peer name eth0 mtu {MTU} netns {name}
            ip -n overlay link set v{name} master br0 up
            ip -n {name} addr add {SUBNET}.{number}{place}/24 dev eth0
            ip -n {name} link set lo up
            ip -n {name} link set eth0 up
            """
        )


def facts(number: int, peers: list[int], containers: list[str], settings: Settings) -> Learn:
    places = [Path("/run/netns") / name for name in containers]
    return Learn(
        endpoints=tuple(
            EndpointFact(
                id=f"{path.name:0<12}",
                network=NETWORK,
                addresses=(f"{SUBNET}.{number}{place}",),
                namespace=path.stat().st_ino,
                path=str(path),
                container=path.name,
            )
            for place, path in enumerate(places)
        ),
        networks=(
            NetworkFact(
                id=NETWORK,
                subnets=(f"{SUBNET}.0/24",),
                peers=tuple(f"10.99.0.{peer}" for peer in peers),
            ),
        ),
        settings=settings,
        underlay=f"10.99.0.{number}",
    )


def up(given: argparse.Namespace) -> None:
    peers = [int(each) for each in given.peers.split(",") if each]
    containers = given.containers.split(",")
    overlay(given.number, peers, containers)
    settings = msgspec.json.decode(given.settings, type=Settings)
    learned = facts(given.number, peers, containers, settings)
    started = threading.Event()
    command = [
        sys.executable,
        "-m",
        "dataplane.router",
        "--socket=/run/freeflow/router.sock",
        f"--control={CONTROL}",
        f"--relay={RELAY}",
        *([f"--swarm={given.swarm}"] if given.swarm else []),
        "--watch-stdin",
    ]
    RouterProcess(command, started.set).start()
    print("up", flush=True)
    while True:
        started.wait(1)
        started.clear()
        try:
            RouterClient().learn(learned)
        except DataplaneError:
            time.sleep(0.2)
            started.set()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["up", "statistics", "connections"])
    parser.add_argument("--number", type=int, default=1)
    parser.add_argument("--peers", default="")
    parser.add_argument("--containers", default="a,b")
    parser.add_argument("--settings", default="{}")
    parser.add_argument("--swarm", default="")
    given = parser.parse_args()
    if given.what == "up":
        up(given)
    client = RouterClient(timeout=30)
    found = client.statistics() if given.what == "statistics" else client.connections()
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()
