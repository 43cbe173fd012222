"""Many containers on one host, started at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from testbed import Bed, Host, wait_until
from tests.swarm.conftest import address, make_network, run_container


@pytest.mark.parametrize("many", [50, pytest.param(200, marks=pytest.mark.long)])
def test_many_containers_on_one_host(bed: Bed, manager: Host, many: int) -> None:
    """Many containers join one network on one host, a container of another host reaches the last,
    and no call of Docker fails.
    """
    network = make_network(manager, "--subnet", "10.90.0.0/22")
    host = bed.hosts[3]
    before = {call["name"]: call for call in host.status()["calls"]}

    def start(_: int) -> str:
        return host.docker(
            *("run", "-d", "--network", network, "workload:latest", "sleep", "infinity"),
            timeout=280,
        ).strip()

    with ThreadPoolExecutor(16) as pool:
        boxes = list(pool.map(start, range(many)))
    assert len(set(boxes)) == many
    status = host.status()
    assert sum(len(n["endpoints"]) for n in status["networks"]) == many
    for call in status["calls"]:
        earlier = before.get(call["name"], {"errors": 0})
        assert call["errors"] == earlier["errors"], call
    client = run_container(manager, network)
    target = address(host, boxes[-1], network)
    wait_until(
        "the last container",
        lambda: (
            " 0% packet loss" in manager.exec(client, "ping", "-c1", "-W1", target, check=False)
        ),
        20,
    )
    host.docker("rm", "-f", *boxes, timeout=280)
    wait_until(
        "no endpoints",
        lambda: not sum(len(n["endpoints"]) for n in host.status()["networks"]),
        60,
    )
