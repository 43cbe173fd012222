"""A Swarm of two virtual machines: what the kernel of the test bed lacks, RDMA and IPVS, beside the installed plugin."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.testbed.host import PLUGIN
from tests.testbed.images import TOP
from tests.testbed.process import wait_until
from tests.testbed.vm import guests
from tests.testbed.vm.engine import IMAGE, MEMORY, RUN, Engine, engine_disk, make_swarm

BUILT = TOP / "build/plugin"
WEB = "hostname >/tmp/index.html; exec busybox httpd -f -p 80 -h /tmp"

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (BUILT / "config.json").exists(), reason="needs make plugin"),
]


@pytest.fixture(scope="module")
def swarm() -> Iterator[list[Engine]]:
    """A manager and a worker with RDMA devices, and a service `web`, a task on each, on a network of either driver."""
    with guests(2, memory=MEMORY, disk=engine_disk(BUILT)) as made:
        for guest in made:
            guest.rxe_up()
        engines = [Engine(guest) for guest in made]
        make_swarm(engines)
        manager = engines[0]
        manager.docker("network", "create", "-d", PLUGIN, "--attachable", "ours")
        manager.docker("network", "create", "-d", "overlay", "--attachable", "theirs")
        manager.docker(
            *("service", "create", "-d", "--no-resolve-image", "--name", "web", "--mode", "global"),
            *("--network", "ours", "--network", "theirs", *RUN, IMAGE, "sh", "-c", WEB),
        )
        wait_until("a task on each host", lambda: len(manager.tasks("web")) == len(engines), 300, 1)
        yield engines


def vips(manager: Engine) -> dict[str, str]:
    """The service's VIP on each network, by the network's driver."""
    found = {}
    for each in manager.api("services/web")["Endpoint"]["VirtualIPs"]:
        network = manager.api(f"networks/{each['NetworkID']}")
        found[network["Driver"]] = each["Addr"].split("/")[0]
    return found


def test_a_service_on_two_hosts_is_answered_from_both_beside_ipvs(swarm: list[Engine]) -> None:
    """From a task of each host: FreeFlow's VIP, and that of Docker's own overlay, which is IPVS', reach both tasks."""
    addresses = vips(swarm[0])
    assert set(addresses) == {PLUGIN, "overlay"}
    tasks = {each[:12] for engine in swarm for each in engine.containers()}
    for engine in swarm:
        container = engine.containers()[0]
        for driver, vip in addresses.items():
            script = f"for i in 1 2 3 4 5 6 7 8; do busybox wget -T 10 -qO- http://{vip}/; done"
            answers = engine.docker("exec", container, "sh", "-c", script).split()
            assert len(answers) == 8
            assert set(answers) == tasks, f"{driver} on {engine.guest.name}"
    balanced = swarm[0].guest.sh("nsenter --net=$(ls /run/docker/netns/lb_*) ipvsadm -Ln")
    assert balanced.count("Masq") == len(swarm)


def test_the_plugin_is_well_and_sees_its_peer(swarm: list[Engine]) -> None:
    """`freeflow status` and `doctor`, on both hosts."""
    for engine, other in (swarm, swarm[::-1]):
        status = json.loads(engine.freeflow("status", "--json"))
        assert [network["name"] for network in status["networks"]] == ["ours"]
        assert str(other.guest.address) in json.dumps(status["networks"][0]["peers"])
        assert "nothing is wrong" in engine.freeflow("doctor")


def test_the_plugin_sees_the_hosts_rdma_device(swarm: list[Engine]) -> None:
    """Its container has the device as the host has it, of any number that the host gives it later."""
    plugin = "/proc/$(pgrep -o -f 'python3 -P -m plugin')/root"
    listed = (
        swarm[0].guest.sh(f"ls {plugin}/host/dev/infiniband {plugin}/sys/class/infiniband").split()
    )
    assert {"uverbs0", "rdma_cm", "rxe0"} <= set(listed)
