"""A Swarm of two virtual machines, with what the test bed's kernel lacks: RDMA and IPVS."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from testbed.host import PLUGIN
from testbed.images import TOP
from testbed.process import wait_until
from testbed.vm import Process, guests
from testbed.vm.guest_engine import IMAGE, MEMORY, RUN, GuestEngine, engine_disk, make_swarm

BUILT = TOP / "build/plugin"
PROGRAMS = TOP / "tests/vm/programs"
LIBRARY = (
    *("--mount", "type=bind,src=/run/freeflow,dst=/run/freeflow"),
    *("--env", "LD_PRELOAD=/run/freeflow/libfreeflow.so"),
)
"""The options of an accelerated container, as in docs/acceleration.md."""
SIZE = 2_000_003
WEB = "hostname >/tmp/index.html; exec busybox httpd -f -p 80 -h /tmp"

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (BUILT / "config.json").exists(), reason="needs make plugin"),
]


@pytest.fixture(scope="module")
def swarm() -> Iterator[list[GuestEngine]]:
    """A manager and a worker with RDMA devices, and a service `web` on a network of each driver,
    with a task on each host.
    """
    with guests(2, memory=MEMORY, disk=engine_disk(BUILT)) as made:
        for guest in made:
            guest.rxe_up()
        engines = [GuestEngine(guest) for guest in made]
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


def vips(manager: GuestEngine) -> dict[str, str]:
    """The service's VIP on each network, by driver."""
    addresses = {}
    for vip in manager.api("services/web")["Endpoint"]["VirtualIPs"]:
        network = manager.api(f"networks/{vip['NetworkID']}")
        addresses[network["Driver"]] = vip["Addr"].split("/")[0]
    return addresses


def test_a_service_on_two_hosts_is_answered_from_both_beside_ipvs(swarm: list[GuestEngine]) -> None:
    """From a task of each host, FreeFlow's VIP and that of Docker's overlay, by IPVS, reach both
    tasks.
    """
    addresses = vips(swarm[0])
    assert set(addresses) == {PLUGIN, "overlay"}
    tasks = {container[:12] for engine in swarm for container in engine.containers()}
    for engine in swarm:
        container = engine.containers()[0]
        for driver, vip in addresses.items():
            script = f"for i in 1 2 3 4 5 6 7 8; do busybox wget -T 10 -qO- http://{vip}/; done"
            answers = engine.docker("exec", container, "sh", "-c", script).split()
            assert len(answers) == 8
            assert set(answers) == tasks, f"{driver} on {engine.guest.name}"
    balanced = swarm[0].guest.sh("nsenter --net=$(ls /run/docker/netns/lb_*) ipvsadm -Ln")
    assert balanced.count("Masq") == len(swarm)


def test_the_plugin_is_well_and_sees_its_peer(swarm: list[GuestEngine]) -> None:
    """`freeflow status` and `doctor` find nothing, on both hosts."""
    for engine, other in (swarm, swarm[::-1]):
        status = json.loads(engine.freeflow("status", "--json"))
        assert [network["name"] for network in status["networks"]] == ["ours"]
        assert str(other.guest.address) in json.dumps(status["networks"][0]["peers"])
        # An emulated engine on a busy machine is late now and then, and doctor says so.
        wait_until(
            f"{engine.guest.name}: nothing is wrong",
            lambda engine=engine: "nothing is wrong" in engine.freeflow("doctor", check=False),  # type: ignore[misc]
            240,
            2,
        )


def test_the_plugin_sees_the_hosts_rdma_device(swarm: list[GuestEngine]) -> None:
    """The plugin's container has the host's device, whatever number the host gives it later."""
    plugin = "/proc/$(pgrep -o -f 'python3 -P -m plugin')/root"
    listed = (
        swarm[0].guest.sh(f"ls {plugin}/host/dev/infiniband {plugin}/sys/class/infiniband").split()
    )
    assert {"uverbs0", "rdma_cm", "rxe0"} <= set(listed)


def test_the_plugin_says_which_rdma_device_it_uses(swarm: list[GuestEngine]) -> None:
    """`freeflow doctor` on both hosts names the device and its GID, and reaches the other host's
    device.
    """
    manager = swarm[0]
    for engine, other in (swarm, swarm[::-1]):
        # Only managers know the names of other nodes.
        peer = other.guest.name if engine is manager else other.guest.address
        link = f"host {peer}: link up over rdma"
        device = rf"rdma: rxe0 port 1, RoCE v2 {engine.guest.address} \(GID \d+\)"

        def said(engine: GuestEngine = engine, link: str = link, device: str = device) -> bool:
            report = json.loads(engine.freeflow("doctor", "--json", check=False))
            known = any(re.fullmatch(device, note) for note in report["notes"])
            return report["findings"] == [] and link in report["notes"] and known

        wait_until(f"{engine.guest.name}: {device}, {link}", said, 240, 2)


def wait_for_rdma(engine: GuestEngine, remote: str, count: int) -> None:
    """Wait until `freeflow connections` shows this many connections on `rdma` to an address."""

    def listed() -> list[dict[str, Any]]:
        connections = json.loads(engine.freeflow("connections", "--json"))["connections"]
        return [connection for connection in connections if remote in connection["remote"]]

    try:
        wait_until(
            f"{engine.guest.name}: {count} on rdma",
            lambda: sum(connection["path"] == "rdma" for connection in listed()) == count,
            120,
            1,
        )
    except TimeoutError as error:
        report = engine.freeflow("doctor", "--json", check=False)
        raise TimeoutError(f"{error}\n{json.dumps(listed())}\n{report}") from error


def relayed(engine: GuestEngine) -> int:
    """The bytes that a host's relay has moved in both directions; nothing was broken."""
    rdma = json.loads(engine.freeflow("status", "--json"))["router"]["rdma"]
    assert rdma["broken"] == 0
    moved: int = rdma["relay"]["bytes_out"] + rdma["relay"]["bytes_in"]
    return moved


def test_containers_of_two_hosts_speak_over_rdma(swarm: list[GuestEngine]) -> None:
    """redis and echoed bytes use RDMA, with sessions of the Swarm's own certificates and no other
    setting.
    """
    programs = ("--mount", f"type=bind,src=/src/{PROGRAMS.relative_to(TOP)},dst=/programs")

    def container(engine: GuestEngine) -> str:
        name = f"on-{engine.guest.name}"
        options = ("--network", "ours", *RUN, *LIBRARY, *programs)
        engine.docker("run", "-d", "--name", name, *options, IMAGE, "sleep", "3600")
        return name

    def start(engine: GuestEngine, name: str, *command: str) -> Process:
        return engine.guest.start(["docker", "exec", "-i", name, *command], stdin=True)

    with ThreadPoolExecutor(len(swarm)) as pool:
        ours, theirs = pool.map(container, swarm)
    one, other = swarm
    here, there = (
        engine.api(f"containers/{name}/json")["NetworkSettings"]["Networks"]["ours"]["IPAddress"]
        for engine, name in ((one, ours), (other, theirs))
    )
    start(other, theirs, "redis-server", "--protected-mode", "no", "--save", "")
    echo = start(other, theirs, "python3", "-ES", "/programs/echo.py", "server", there, "7200")
    for port in (6379, 7200):
        listening = f"until ss -Htln sport = :{port} | grep -q .; do sleep 0.2; done"
        other.docker("exec", theirs, "sh", "-c", listening)
    # Fifty requests a second, because more would leave an emulated processor no time.
    start(one, ours, *("redis-cli", "-h", there, "-r", "-1", "-i", "0.02", "incr", "asked"))
    asking = ("client", there, "7200", str(SIZE), "7")
    client = start(one, ours, "python3", "-ES", "/programs/echo.py", *asking)
    wait_for_rdma(one, f"{there}:", 2)
    wait_for_rdma(other, f"{here}:", 2)
    one.docker("exec", ours, "pkill", "-x", "redis-cli")
    before = relayed(one)
    client.write(b"now\n")
    assert client.check(150) == "the same\n"
    assert echo.wait(60) == 0
    wait_until("what the relays say", lambda: relayed(one) - before >= 2 * SIZE, 30, 1)
    for engine, name in ((one, ours), (other, theirs)):
        engine.docker("rm", "-f", name)
