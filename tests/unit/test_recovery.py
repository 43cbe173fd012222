"""Recovery: after the plugin died at any step, and whatever Docker did meanwhile."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from driver import names
from driver.driver import DriverConfig
from driver.errors import EngineError, FreeFlowError
from driver.model import LocalContainer, NetworkView, Subnet
from driver.recovery import GRACE, Collector, Recovered
from tests.unit.steps import Crash, FakeDirectory, Machine, stored

NET = "p3l8f1w0gk2c9d7h5m6n4b0aq"
LOCAL_NET = "ab" * 32
SANDBOX = "/var/run/docker/netns/1a2b3c4d5e6f"
POOL = Subnet(IPv4Network("10.0.4.0/24"), IPv4Interface("10.0.4.1/24"))


def endpoint_id(number: int) -> str:
    return f"{number:012x}{'e' * 52}"


def address(number: int) -> IPv4Interface:
    return IPv4Interface(f"10.0.4.{number}/24")


def container(number: int) -> LocalContainer:
    return LocalContainer(
        id=f"{number:064x}",
        name=f"c{number}",
        endpoint_id=endpoint_id(number),
        address=address(number),
    )


def view(network_id: str, *containers: LocalContainer, scope: str = "swarm") -> NetworkView:
    return NetworkView(
        id=network_id,
        name="net",
        driver="freeflow:latest",
        containers=containers,
        scope=scope,
        subnets=(POOL,),
    )


class Host(Machine):
    """A machine with an engine and a collector."""

    def __init__(self, directory: Path, config: DriverConfig | None = None) -> None:
        self.docker = FakeDirectory()
        super().__init__(directory, config)

    def restart(self) -> Recovered:
        result = super().restart()
        self.collector = Collector(self.driver, self.docker, lambda: self.now)
        return result

    def collect_for_long(self) -> None:
        """Run as many passes as the grace time takes, and one more for what the first ones kept."""
        for _ in range(4):
            self.collector.collect()
            self.now += GRACE / 2 + 1
        self.collector.collect()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def populate(host: Machine, *numbers: int) -> None:
    host.driver.create_network(NET, {}, (POOL,))
    for number in numbers:
        host.driver.create_endpoint(NET, endpoint_id(number), ipv4=address(number))
        host.driver.join(NET, endpoint_id(number), SANDBOX)


# --- at start


def test_nothing_to_do(host: Host) -> None:
    """A restart with everything in place changes nothing."""
    populate(host, 2, 3)
    before = stored(host.driver)
    result = host.restart()
    assert not result.changed
    assert not result.rebooted
    assert stored(host.driver) == before
    host.consistent()


def test_first_start(tmp_path: Path) -> None:
    """The first start is not taken for one after a reboot."""
    host = Host(tmp_path)
    host.lose_state()
    assert not host.restart().rebooted


def test_reboot(host: Host) -> None:
    """After a reboot no endpoint is left, and networks are still known, because Docker does not
    replay local ones.
    """
    populate(host, 2)
    result = host.reboot()
    assert result.rebooted
    assert result.endpoints_forgotten == [endpoint_id(2)]
    assert [network.id for network in host.driver.store.networks()] == [NET]
    host.consistent()
    assert not host.restart().rebooted


def test_container_died_meanwhile(host: Host) -> None:
    """An endpoint whose namespace disappeared while the plugin was away is forgotten, with its
    filter.
    """
    populate(host, 2, 3)
    host.kernel.namespace_dies(endpoint_id(2))
    assert host.restart().endpoints_forgotten == [endpoint_id(2)]
    host.consistent()
    host.kernel.namespace_dies(endpoint_id(3))
    host.restart()
    assert host.kernel.empty


def test_lost_parts_are_made_again(host: Host) -> None:
    """Whatever a living endpoint's network lost while the plugin was away is made again."""
    populate(host, 2)
    host.kernel.vxlans.clear()
    host.kernel.filters.clear()
    host.restart()
    host.consistent()


def test_one_failure_is_not_all(host: Host) -> None:
    """An endpoint that cannot be repaired is named, and the others are repaired."""
    populate(host, 2, 3)
    host.kernel.filters.clear()
    host.kernel.failing = {names.short(endpoint_id(2))}
    result = host.restart()
    assert len(result.failures) == 1
    assert endpoint_id(2) in result.failures[0]
    assert names.short(endpoint_id(3)) in host.kernel.filters


def test_leftover_links_of_a_network(host: Host) -> None:
    """Bridge and VXLAN device without endpoints are removed at start."""
    host.kernel.bridges.add("dead" * 3)
    host.kernel.vxlans.add("beef" * 3)
    host.restart()
    assert host.kernel.empty


# --- between any two steps

Call = Callable[[Machine], object]

LIFE: Final[tuple[tuple[str, Call], ...]] = (
    ("allocate", lambda m: m.driver.allocate_network(NET, {"mtu": "1400"})),
    ("network", lambda m: m.driver.create_network(NET, {"mtu": "1400"}, (POOL,))),
    ("endpoint 2", lambda m: m.driver.create_endpoint(NET, endpoint_id(2), ipv4=address(2))),
    ("join 2", lambda m: m.driver.join(NET, endpoint_id(2), SANDBOX)),
    ("endpoint 3", lambda m: m.driver.create_endpoint(NET, endpoint_id(3), ipv4=address(3))),
    ("join 3", lambda m: m.driver.join(NET, endpoint_id(3), SANDBOX + "3")),
    ("discover", lambda m: m.driver.discover_new("192.0.2.1", is_self=True)),
    ("leave 2", lambda m: m.driver.leave(NET, endpoint_id(2))),
    ("delete 2", lambda m: m.driver.delete_endpoint(NET, endpoint_id(2))),
    ("leave 3", lambda m: m.driver.leave(NET, endpoint_id(3))),
    ("delete 3", lambda m: m.driver.delete_endpoint(NET, endpoint_id(3))),
    ("delete network", lambda m: m.driver.delete_network(NET)),
    ("free", lambda m: m.driver.free_network(NET)),
)


def count_steps(directory: Path) -> int:
    machine = Machine(directory)
    before = machine.steps.done
    for _, call in LIFE:
        call(machine)
    return machine.steps.done - before


def die_at(host: Host, step: int) -> tuple[int, dict[str, object]]:
    """Run until the plugin dies at this step; return the call that it died in, and the answers
    before.
    """
    host.crash_in(step)
    answers: dict[str, object] = {}
    for number, (name, call) in enumerate(LIFE):
        try:
            answers[name] = call(host)
        except Crash:
            return number, answers
    raise AssertionError(f"no step {step}")


def promised(answers: dict[str, object], dying: str) -> set[str]:
    """The endpoints that were promised to Docker and that it did not remove."""
    return {
        endpoint_id(number)
        for number in (2, 3)
        if f"endpoint {number}" in answers
        and f"delete {number}" not in answers
        and dying not in (f"delete {number}", "delete network")
    }


def check_promises(host: Host, answers: dict[str, object], dying: str) -> None:
    host.consistent()
    snapshot = stored(host.driver)
    assert {row.id for row in snapshot.endpoints} >= promised(answers, dying)
    for row in snapshot.endpoints:
        number = int(row.id[:12], 16)
        if f"join {number}" in answers and dying != f"leave {number}":
            expected = None if f"leave {number}" in answers else SANDBOX + "3" * (number == 3)
            assert row.sandbox_key == expected
    if "network" in answers and "delete network" not in answers and dying != "delete network":
        assert [network.id for network in snapshot.networks] == [NET]
    if "discover" in answers:
        assert str(host.driver.self_address()) == "192.0.2.1"


def each_step(tmp_path: Path) -> list[tuple[int, Host]]:
    steps = count_steps(tmp_path / "count")
    assert steps > 45, "the calls have fewer steps than they must have"
    return [(step, Host(tmp_path / str(step))) for step in range(1, steps + 1)]


def test_killed_and_repeated(tmp_path: Path) -> None:
    """After a kill between any two steps of any call, promises hold, the repeated call succeeds,
    and nothing is left at the end.
    """
    for step, host in each_step(tmp_path):
        number, answers = die_at(host, step)
        host.restart()
        check_promises(host, answers, LIFE[number][0])
        for name, call in LIFE[number:]:
            call(host)
            answers[name] = "repeated"
        host.nothing_left()


def test_killed_and_torn_down(tmp_path: Path) -> None:
    """After a kill between any two steps of any call, removing everything leaves nothing."""
    for step, host in each_step(tmp_path):
        die_at(host, step)
        host.restart()
        for number in (2, 3):
            host.driver.leave(NET, endpoint_id(number))
            host.driver.delete_endpoint(NET, endpoint_id(number))
        host.driver.delete_network(NET)
        host.driver.free_network(NET)
        host.nothing_left()


def test_killed_and_forgotten(tmp_path: Path) -> None:
    """After a kill between any two steps of any call, and if Docker never calls again, collection
    leaves nothing.
    """
    for step, host in each_step(tmp_path):
        die_at(host, step)
        host.restart()
        host.collect_for_long()
        host.nothing_left()


def test_killed_while_recovering(tmp_path: Path) -> None:
    """After another kill between any two steps of the recovery, promises still hold."""
    for step, host in each_step(tmp_path):
        number, answers = die_at(host, step)
        for host.next_crash in range(1, 100):
            try:
                host.restart()
            except Crash:
                continue
            break
        else:
            raise AssertionError("the recovery never ends")
        host.next_crash = 0
        host.restart()
        check_promises(host, answers, LIFE[number][0])


def test_killed_during_reboot_recovery(tmp_path: Path) -> None:
    """A start after a reboot that dies half-way leaves no endpoints from before the reboot."""
    for step in range(1, 6):
        host = Host(tmp_path / str(step))
        populate(host, 2, 3)
        host.kernel.reboot()
        host.boot_id = "boot-2"
        host.next_crash = step
        with suppress(Crash):
            host.restart()
        host.next_crash = 0
        host.restart()
        assert not host.driver.store.endpoints()
        host.consistent()


# --- Docker went on without us


def test_endpoint_removed_unseen(host: Host) -> None:
    """An endpoint that Docker does not list is removed after the grace time, not before."""
    populate(host, 2, 3)
    host.docker.views = {NET: view(NET, container(3))}
    host.collector.collect()
    host.now += GRACE - 1
    assert not host.collector.collect().changed
    host.now += 2
    assert host.collector.collect().endpoints_forgotten == [endpoint_id(2)]
    assert [row.id for row in host.driver.store.endpoints()] == [endpoint_id(3)]
    host.consistent()


def test_endpoint_seen_again(host: Host) -> None:
    """An endpoint that Docker lists again meanwhile gets a new grace time."""
    populate(host, 2)
    for _ in range(5):
        host.docker.views = {NET: view(NET)}
        host.collector.collect()
        host.now += GRACE - 1
        assert not host.collector.collect().changed
        host.docker.views = {NET: view(NET, container(2))}
        host.collector.collect()
        host.now += 2
    assert host.driver.store.endpoints()


def test_engine_silent(host: Host) -> None:
    """While Docker does not answer, nothing is removed, however long."""
    populate(host, 2)
    host.docker.down = True
    for _ in range(5):
        host.now += GRACE
        with pytest.raises(EngineError):
            host.collector.collect()
    host.consistent()
    assert host.driver.store.endpoints()


def test_network_removed_unseen(host: Host) -> None:
    """A network that Docker does not know is forgotten after the grace time; one that it lists
    stays.
    """
    populate(host)
    host.driver.create_network(LOCAL_NET, {}, (POOL,))
    host.docker.views = {LOCAL_NET: view(LOCAL_NET, scope="local")}
    assert not host.collector.collect().changed
    host.now += GRACE
    assert host.collector.collect().networks_forgotten == [NET]
    assert [network.id for network in host.driver.store.networks()] == [LOCAL_NET]


def test_allocation_of_a_former_leader(host: Host) -> None:
    """FreeNetwork only reaches the current leader: others forget the allocation when the network is
    gone.
    """
    host.driver.allocate_network(NET, {})
    host.docker.views = {NET: view(NET)}
    host.collect_for_long()
    assert host.driver.store.allocations()
    host.docker.views = {}
    host.collect_for_long()
    assert not host.driver.store.allocations()


def test_links_nobody_knows(host: Host) -> None:
    """Links that neither the store nor Docker knows are removed after the grace time, with their
    network's.
    """
    populate(host, 2)
    host.lose_state()
    host.restart()
    host.collector.collect()
    assert host.kernel.veths
    host.collect_for_long()
    host.nothing_left()


# --- our own record was lost


def test_lost_state_is_learned_again(host: Host) -> None:
    """With lost state and living containers, networks and endpoints are recovered, and no link
    changes.
    """
    host.driver.create_network(
        NET, {"freeflow.format": "1", "freeflow.vni": "77"}, (POOL,), ipv6=True
    )
    host.driver.create_endpoint(NET, endpoint_id(2), ipv4=address(2))
    host.driver.create_endpoint(
        NET,
        endpoint_id(3),
        ipv4=address(3),
        ipv6=IPv6Interface("fd01::3/64"),
        mac="02:aa:00:00:00:03",
    )
    for number in (2, 3):
        host.driver.join(NET, endpoint_id(number), SANDBOX)
    before = stored(host.driver)
    host.lose_state()
    host.restart()
    assert set(host.kernel.veths) == {names.short(endpoint_id(2)), names.short(endpoint_id(3))}
    assert host.kernel.bridges
    assert host.kernel.vxlans
    host.docker.sandboxes = {container(2).id: SANDBOX}
    listed = (
        container(2),
        replace(
            container(3),
            sandbox_key=SANDBOX,
            mac="02:aa:00:00:00:03",
            ipv6=IPv6Interface("fd01::3/64"),
        ),
    )
    options = {"freeflow.format": "1", "freeflow.vni": "77"}
    host.docker.views = {NET: replace(view(NET, *listed), options=options, ipv6=True)}
    result = host.collector.collect()
    assert result.networks_restored == [NET]
    assert sorted(result.endpoints_adopted) == [endpoint_id(2), endpoint_id(3)]
    assert stored(host.driver) == before
    assert host.joined[-2:] == [endpoint_id(2), endpoint_id(3)]
    host.consistent()
    assert not host.collector.collect().changed


def test_work_before_the_lost_state_is_learned(host: Host) -> None:
    """A new container that ends before Docker could be asked does not take the links of living
    ones.
    """
    populate(host, 2)
    host.lose_state()
    host.restart()
    populate(host, 3)
    host.driver.delete_endpoint(NET, endpoint_id(3))
    host.driver.delete_network(NET)
    assert host.kernel.bridges
    assert host.kernel.vxlans
    host.docker.views = {NET: view(NET, container(2))}
    host.collector.collect()
    host.consistent()
    host.driver.delete_endpoint(NET, endpoint_id(2))
    assert host.kernel.empty


def test_living_links_that_cannot_be_learned(host: Host) -> None:
    """A living container whose endpoint cannot be recovered keeps its links, however long."""
    populate(host, 2)
    host.lose_state()
    host.restart()
    unreadable = replace(view(NET, container(2)), options={"freeflow.format": "99"})
    host.docker.views = {NET: unreadable}
    host.collect_for_long()
    host.collect_for_long()
    assert host.kernel.veths
    assert host.kernel.bridges
    assert host.kernel.vxlans
    host.docker.views = {NET: view(NET, container(2))}
    host.collector.collect()
    host.consistent()
    assert host.driver.store.endpoints()


def test_local_network_is_learned_again(tmp_path: Path) -> None:
    """A network that Swarm will not send again is recovered from the engine's list, even without
    containers.
    """
    host = Host(tmp_path, DriverConfig(scope="local"))
    host.docker.views = {LOCAL_NET: view(LOCAL_NET, scope="local")}
    assert host.collector.collect().networks_restored == [LOCAL_NET]
    host.driver.create_endpoint(LOCAL_NET, endpoint_id(2), ipv4=address(2))


def test_swarm_networks_come_by_themselves(host: Host) -> None:
    """A manager lists all networks of the Swarm: those without containers here are not added."""
    host.docker.views = {NET: view(NET)}
    assert not host.collector.collect().changed
    assert not host.driver.store.networks()


def test_network_that_cannot_be_learned(host: Host) -> None:
    """A network that cannot be recovered is named, and the others are recovered."""
    bad = replace(view(NET, scope="local"), options={"colour": "blue"})
    host.docker.views = {NET: bad, LOCAL_NET: view(LOCAL_NET, scope="local")}
    result = host.collector.collect()
    assert result.networks_restored == [LOCAL_NET]
    assert len(result.failures) == 1
    assert "colour" in result.failures[0]


# --- any order of everything


NETS: Final = (NET, "q4l8f1w0gk2c9d7h5m6n4b0aq")
NUMBERS: Final = st.integers(2, 6)


class Life(RuleBasedStateMachine):
    """Docker, the plugin and the kernel for a while, with the plugin dying at any step.

    `there` is what was promised to Docker (endpoint to network and sandbox), `unsure` what was in
    progress when the plugin died.
    """

    def __init__(self) -> None:
        super().__init__()
        self.there: dict[str, tuple[str, str | None]] = {}
        self.networks: set[str] = set()

        self.unsure: set[str] = set()
        self.directory = tempfile.TemporaryDirectory()
        self.host = Host(Path(self.directory.name))

    def teardown(self) -> None:
        self.host.steps.crash_at = 0
        self.host.restart()
        for identifier, (network, _) in self.there.items():
            self.host.driver.delete_endpoint(network, identifier)
        for network in NETS:
            self.host.driver.delete_network(network)
        self.host.docker.views = {}
        self.host.collect_for_long()
        self.host.nothing_left()
        assert self.host.store is not None
        self.host.store.close()
        self.directory.cleanup()

    def attempt(self, call: Callable[[], object], *touched: str) -> bool:
        """Whether Docker got an answer that is no error."""
        try:
            call()
        except Crash:
            self.unsure.update(touched)
            self.host.restart()
            return False
        except FreeFlowError:
            return False
        return True

    def list_in_docker(self) -> None:
        self.host.docker.views = {
            network: view(
                network,
                *(
                    container(int(identifier[:12], 16))
                    for identifier, (where, _) in self.there.items()
                    if where == network
                ),
            )
            for network in self.networks
        }

    @rule(steps=st.integers(1, 12))
    def arm(self, steps: int) -> None:
        self.host.crash_in(steps)

    @rule(network=st.sampled_from(NETS))
    def create_network(self, network: str) -> None:
        if self.attempt(lambda: self.host.driver.create_network(network, {}, (POOL,))):
            self.networks.add(network)

    @rule(network=st.sampled_from(NETS))
    def delete_network(self, network: str) -> None:
        if any(where == network for where, _ in self.there.values()):
            return
        self.networks.discard(network)
        self.attempt(lambda: self.host.driver.delete_network(network))

    @rule(number=NUMBERS, network=st.sampled_from(NETS))
    def create_endpoint(self, number: int, network: str) -> None:
        identifier = endpoint_id(number)
        if network not in self.networks or identifier in self.there:
            return
        if self.attempt(
            lambda: self.host.driver.create_endpoint(network, identifier, ipv4=address(number)),
            identifier,
        ):
            self.there[identifier] = (network, None)
            self.unsure.discard(identifier)

    @rule(number=NUMBERS, key=st.sampled_from(["a", "b"]))
    def join(self, number: int, key: str) -> None:
        identifier = endpoint_id(number)
        if identifier not in self.there:
            return
        network, _ = self.there[identifier]
        if self.attempt(lambda: self.host.driver.join(network, identifier, key), identifier):
            self.there[identifier] = (network, key)
            self.unsure.discard(identifier)

    @rule(number=NUMBERS)
    def leave(self, number: int) -> None:
        identifier = endpoint_id(number)
        if identifier not in self.there:
            return
        network, _ = self.there[identifier]
        if self.attempt(lambda: self.host.driver.leave(network, identifier), identifier):
            self.there[identifier] = (network, None)
            self.unsure.discard(identifier)

    @rule(number=NUMBERS)
    def delete_endpoint(self, number: int) -> None:
        identifier = endpoint_id(number)
        if identifier not in self.there:
            return
        network, _ = self.there.pop(identifier)
        self.attempt(lambda: self.host.driver.delete_endpoint(network, identifier))

    @rule(number=NUMBERS)
    def docker_forgets(self, number: int) -> None:
        """A removal that never reaches the plugin."""
        self.there.pop(endpoint_id(number), None)

    @rule(number=NUMBERS)
    def container_dies_with_us(self, number: int) -> None:
        self.host.kernel.namespace_dies(endpoint_id(number))
        self.there.pop(endpoint_id(number), None)
        self.host.restart()

    @rule()
    def restart(self) -> None:
        self.host.restart()

    @rule()
    def reboot(self) -> None:
        self.there.clear()
        self.host.reboot()

    @precondition(lambda self: self.host.steps.crash_at <= self.host.steps.done)
    @rule()
    def lose_state(self) -> None:
        self.host.lose_state()
        self.host.restart()
        self.there = {key: (network, None) for key, (network, _) in self.there.items()}
        self.list_in_docker()
        self.host.collector.collect()

    @rule(seconds=st.sampled_from([1.0, GRACE / 2, GRACE + 1]))
    def collect(self, seconds: float) -> None:
        self.host.now += seconds
        self.list_in_docker()
        self.attempt(self.host.collector.collect)

    @invariant()
    def promises_hold(self) -> None:
        if not self.host.driver.keep_links:
            self.host.consistent()
        rows = {row.id: row for row in self.host.driver.store.endpoints()}
        for identifier, (network, key) in self.there.items():
            assert identifier in rows
            assert rows[identifier].network_id == network
            if identifier not in self.unsure:
                assert rows[identifier].sandbox_key == key
        known = {network.id for network in self.host.driver.store.networks()}
        assert {network for network, _ in self.there.values()} <= known


Life.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestLife = Life.TestCase
TestLife.__doc__ = "In any order of calls, deaths, restarts, reboots and losses promises hold, and nothing is left."
