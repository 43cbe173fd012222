"""Containers without capabilities, on other networks, attack those on a FreeFlow network."""

from __future__ import annotations

import pytest

from testbed import Bed, Host, wait_until
from testbed.images import WORKLOAD_IMAGE
from tests.swarm.conftest import address, make_network, run_container, unique

CLAIM = """
import socket, sys, time
node, vni, mac, until = sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3].replace(":", "")), time.time() + 8
made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
made.bind(("0.0.0.0", 4799))
made.settimeout(0.02)
frame = (0x08000000).to_bytes(4, "big") + (vni << 8).to_bytes(4, "big")
frame += b"\\2\\x99\\0\\0\\0\\1" + mac + b"\\x88\\xb5" + bytes(46)
taken = 0
while time.time() < until:
    made.sendto(frame, (node, 4799))
    try:
        while made.recv(4000):
            taken += 1
    except TimeoutError:
        pass
print("taken", taken)
"""


@pytest.mark.parametrize("side", ["own host", "other host"])
def test_a_container_of_another_network_takes_nothing_over(
    bed: Bed, manager: Host, side: str
) -> None:
    """A container on Docker's bridge, without capabilities, that claims a remote container's
    address towards a node gets none of its traffic, and the remote container stays reachable.
    """
    other = next(host for host in bed.hosts if host is not manager)
    network = make_network(manager)
    near, far = run_container(manager, network), run_container(other, network)
    target = address(other, far, network)
    wait_until("the other host", lambda: _pings(manager, near, target), 30)
    status = manager.status()
    (own,) = [shown for shown in status["networks"] if shown["name"] == network]
    mac = other.inspect("inspect", far)["NetworkSettings"]["Networks"][network]["MacAddress"]
    place = manager if side == "own host" else other
    alien = unique("alien")
    place.docker(
        *("run", "-d", "--name", alien, "--network", "bridge", "--cap-drop", "ALL"),
        *("--user", "65534", WORKLOAD_IMAGE, "python3", "-c", CLAIM),
        *(manager.status()["host"]["address"], str(own["vni"]), mac),
    )
    lost = 0
    for _ in range(12):
        lost += not _pings(manager, near, target)
    place.docker("wait", alien)
    assert place.docker("logs", alien).strip() == "taken 0"
    assert lost == 0


def _pings(host: Host, container: str, to: str) -> bool:
    answer = host.exec(container, "ping", "-c1", "-W2", to, check=False)
    return " 1 received" in answer
