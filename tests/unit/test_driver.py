"""The calls that Docker makes."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_address
from pathlib import Path

import pytest

from driver import names
from driver.driver import Driver, DriverConfig, EndpointAddresses
from driver.errors import Conflict, InvalidRequest, KernelError, NotFound
from driver.locks import KeyedLocks
from driver.model import Endpoint, Network, Subnet
from driver.store import Store
from plugin.app import CALLS
from testbed.patience import patience
from tests.unit.steps import Machine, SteppedKernel, Steps, stored

NET = "p3l8f1w0gk2c9d7h5m6n4b0aq"
NET2 = "q4l8f1w0gk2c9d7h5m6n4b0aq"
SANDBOX = "/var/run/docker/netns/1a2b3c4d5e6f"
POOL = Subnet(IPv4Network("10.0.4.0/24"), IPv4Interface("10.0.4.1/24"))
POOL2 = Subnet(IPv4Network("10.0.5.0/24"), IPv4Interface("10.0.5.1/24"))


def endpoint_id(number: int) -> str:
    return f"{number:012x}{'e' * 52}"


def address(number: int) -> IPv4Interface:
    return IPv4Interface(f"10.0.4.{number}/24")


EP = endpoint_id(1)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.driver.create_network(NET, {}, (POOL,))
    return made


# --- the plugin as a whole


@pytest.mark.parametrize("scope", ["global", "local"])
def test_capabilities(tmp_path: Path, scope: str) -> None:
    """The scope is the setting's, for allocation and for connectivity alike."""
    machine = Machine(tmp_path, DriverConfig(scope=scope))
    answer = CALLS["GetCapabilities"](machine.driver, b"")
    assert answer["Scope"] == answer["ConnectivityScope"] == scope


def test_own_address_outlives_restart(machine: Machine) -> None:
    """This host's address is stored; other nodes only wake the sync loop."""
    assert machine.driver.self_address() is None
    machine.driver.discover_new("192.0.2.11", is_self=True)
    machine.driver.discover_new("192.0.2.12", is_self=False)
    machine.driver.discover_delete("192.0.2.11")
    assert machine.wakes == 3
    machine.restart()
    assert machine.driver.self_address() == ip_address("192.0.2.11")


def test_bad_node_address(machine: Machine) -> None:
    """An invalid node address is refused, and the refusal contains it."""
    with pytest.raises(InvalidRequest, match="'nonsense'"):
        machine.driver.discover_new("nonsense", is_self=True)


BAD_IDS = ["", "x", "A" * 64, "e" * 63, "g" * 64, "n" * 24, "N" * 25, "n" * 25 + "\n", "../" * 8]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_bad_ids(machine: Machine, bad: str) -> None:
    """Every call refuses an ID that Docker can't have made, before it changes anything."""
    driver = machine.driver
    calls: list[Callable[[], object]] = [
        lambda: driver.allocate_network(bad, {}),
        lambda: driver.free_network(bad),
        lambda: driver.create_network(bad, {}, (POOL,)),
        lambda: driver.delete_network(bad),
        lambda: driver.create_endpoint(bad, EP, ipv4=address(7)),
        lambda: driver.create_endpoint(NET, bad, ipv4=address(7)),
        lambda: driver.delete_endpoint(bad, EP),
        lambda: driver.delete_endpoint(NET, bad),
        lambda: driver.endpoint_info(NET, bad),
        lambda: driver.join(bad, EP, SANDBOX),
        lambda: driver.join(NET, bad, SANDBOX),
        lambda: driver.leave(bad, EP),
        lambda: driver.leave(NET, bad),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest, match="ID"):
            call()
    assert machine.kernel.empty


@pytest.mark.parametrize("good", ["0123456789abcdef" * 4, "p3l8f1w0gk2c9d7h5m6n4b0aq"])
def test_good_ids(machine: Machine, good: str) -> None:
    """Both forms of Docker's IDs are accepted, for networks and for endpoints."""
    machine.driver.create_network(good, {}, (POOL,))
    machine.driver.create_endpoint(good, good, ipv4=address(7))
    machine.driver.delete_endpoint(good, good)


# --- allocation, on the leader


def test_allocation_echoes_the_users_options(machine: Machine) -> None:
    """The answer contains the user's options and ours, since Docker replaces the options by it."""
    answer = machine.driver.allocate_network(NET2, {"mtu": "9000", "acceleration": "off"})
    assert answer["mtu"] == "9000"
    assert answer["acceleration"] == "off"
    assert set(answer) == {
        "mtu",
        "acceleration",
        "freeflow.format",
        "freeflow.vni",
        "freeflow.port",
        "freeflow.mtu",
        "freeflow.prefix6",
    }


def test_allocation_after_change_of_leader(tmp_path: Path) -> None:
    """A new leader without any state repeats the answer, and then avoids its VNI for other
    networks."""
    first = Machine(tmp_path / "first")
    answer = first.driver.allocate_network(NET2, {"vni": "77"})
    second = Machine(tmp_path / "second", DriverConfig(port=5000, mtu=1300))
    assert second.driver.allocate_network(NET2, answer) == answer
    with pytest.raises(Conflict, match=f"vni=77 is taken by network {NET2}"):
        second.driver.allocate_network(NET, {"vni": "77"})


def test_allocation_repeated_when_the_answer_got_lost(machine: Machine) -> None:
    """The same request gets the same answer, after restarts and allocations of other networks."""
    first = machine.driver.allocate_network(NET2, {"mtu": "1400"})
    machine.driver.allocate_network("z" * 25, {})
    machine.restart()
    assert machine.driver.allocate_network(NET2, {"mtu": "1400"}) == first


def test_freed_vni_is_free(machine: Machine) -> None:
    """The VNI of a network that was freed, once or twice, is available to others."""
    machine.driver.allocate_network(NET2, {"vni": "77"})
    machine.driver.free_network(NET2)
    machine.driver.free_network(NET2)
    assert machine.driver.allocate_network("z" * 25, {"vni": "77"})["freeflow.vni"] == "77"


def test_allocations_at_once_get_different_vnis(machine: Machine) -> None:
    """Parallel allocations never share a VNI, even if their hashes would."""

    def allocate(number: int) -> str:
        return machine.driver.allocate_network(f"{number:025d}", {})["freeflow.vni"]

    with ThreadPoolExecutor(8) as pool:
        vnis = list(pool.map(allocate, range(64)))
    assert len(set(vnis)) == 64


def test_unknown_option_at_allocation(machine: Machine) -> None:
    """An unknown option is refused in the answer to the user's command."""
    with pytest.raises(InvalidRequest, match="unknown option colour"):
        machine.driver.allocate_network(NET2, {"colour": "blue"})
    assert not machine.driver.store.allocations()


# --- networks


def test_network_as_allocated(machine: Machine, tmp_path: Path) -> None:
    """Every host has the network as the leader chose it, whatever the host's own settings are."""
    answer = machine.driver.allocate_network(NET2, {"mtu": "8950"})
    worker = Machine(tmp_path / "worker", DriverConfig(port=5000, mtu=1300))
    worker.driver.create_network(NET2, answer, (POOL, POOL2), ipv6=True, internal=True)
    (network,) = worker.driver.store.networks()
    assert str(network.vni) == answer["freeflow.vni"]
    assert str(network.prefix6) == answer["freeflow.prefix6"]
    assert (network.port, network.mtu, network.subnets) == (4799, 8950, (POOL, POOL2))
    assert (network.ipv6, network.internal, network.overlay) == (True, True, True)


def test_network_without_allocation(tmp_path: Path) -> None:
    """With SCOPE=local there is no allocation: the host chooses, and the network has no overlay."""
    machine = Machine(tmp_path, DriverConfig(scope="local"))
    machine.driver.create_network("a" * 64, {"acceleration": "off"}, (POOL,))
    (network,) = machine.driver.store.networks()
    assert (network.overlay, network.mtu, network.acceleration) == (False, 1500, False)
    machine.driver.create_endpoint("a" * 64, EP, ipv4=address(7))
    assert machine.kernel.bridges
    assert not machine.kernel.vxlans


def test_network_makes_no_links(machine: Machine) -> None:
    """A network without endpoints has nothing in the kernel."""
    assert machine.kernel.empty


def test_network_again(machine: Machine) -> None:
    """Docker may create a network again, in use or not; its choices stay."""
    before = machine.driver.store.networks()
    machine.driver.create_network(NET, {}, (POOL,))
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    machine.driver.create_network(NET, {}, (POOL,))
    assert machine.driver.store.networks() == before


def test_network_changed_while_unused(machine: Machine) -> None:
    """Without endpoints, the newer request takes effect."""
    machine.driver.create_network(NET, {"freeflow.format": "1", "freeflow.vni": "9"}, (POOL2,))
    (network,) = machine.driver.store.networks()
    assert (network.vni, network.subnets) == (9, (POOL2,))


def test_network_changed_while_used(machine: Machine) -> None:
    """With endpoints, a change that concerns kernel objects is refused, and nothing changes."""
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    before = stored(machine.driver)
    with pytest.raises(Conflict, match="has endpoints on this host with vni"):
        machine.driver.create_network(NET, {"freeflow.format": "1", "freeflow.vni": "9"}, (POOL,))
    with pytest.raises(Conflict, match="subnets"):
        machine.driver.create_network(NET, {}, (POOL2,))
    assert stored(machine.driver) == before
    machine.driver.create_network(NET, {"acceleration": "off"}, (POOL,))
    assert not machine.driver.store.networks()[0].acceleration


def test_vni_of_another_network_in_use(machine: Machine) -> None:
    """Two networks in use never share a VNI on a host, because their containers would meet."""
    (network,) = machine.driver.store.networks()
    twin = {"freeflow.format": "1", "freeflow.vni": str(network.vni)}
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    with pytest.raises(Conflict, match=f"in use here by network {NET}"):
        machine.driver.create_network(NET2, twin, (POOL2,))
    machine.driver.delete_endpoint(NET, EP)
    machine.driver.create_network(NET2, twin, (POOL2,))


def test_delete_network(machine: Machine) -> None:
    """A deleted network leaves nothing, even if the removal of its endpoints was missed; deleting
    twice is no error.
    """
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    machine.driver.delete_network(NET)
    machine.driver.delete_network(NET)
    machine.driver.delete_network(NET2)
    machine.nothing_left()


# --- endpoints


def test_create_endpoint(machine: Machine) -> None:
    """An endpoint gets a MAC address from its IPv4 address, and its links exist when the call
    returns.
    """
    answer = machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    assert answer == EndpointAddresses(mac="02:42:0a:00:04:07", ipv6=None)
    machine.consistent()
    assert names.short(EP) in machine.kernel.veths


def test_only_what_was_left_empty(machine: Machine) -> None:
    """A MAC or IPv6 address in the request is not returned: Docker would call that a
    modification.
    """
    prefix = {"freeflow.format": "1", "freeflow.prefix6": "fd01::/64"}
    machine.driver.create_network(NET2, prefix, (POOL,), ipv6=True)
    answer = machine.driver.create_endpoint(
        NET2,
        EP,
        ipv4=address(7),
        ipv6=IPv6Interface("fd01::7/64"),
        mac="02:AA:00:00:00:07",
    )
    assert answer == EndpointAddresses(None, None)
    assert machine.kernel.filters[names.short(EP)].mac == "02:aa:00:00:00:07"
    assert machine.kernel.filters[names.short(EP)].ipv6 == IPv6Interface("fd01::7/64")


def test_derived_ipv6(machine: Machine) -> None:
    """On a network with IPv6, an endpoint without an IPv6 address gets the derived one."""
    generic = {"freeflow.format": "1", "freeflow.prefix6": "fd00:1:2:3::/64"}
    machine.driver.create_network(NET2, generic, (POOL,), ipv6=True)
    answer = machine.driver.create_endpoint(NET2, EP, ipv4=address(7))
    assert answer.ipv6 == IPv6Interface("fd00:1:2:3::a00:407/64")


def test_no_ipv6_unless_asked(machine: Machine) -> None:
    """A network without --ipv6 allocates no IPv6 addresses."""
    assert machine.driver.create_endpoint(NET, EP, ipv4=address(7)).ipv6 is None


def test_without_addresses(machine: Machine) -> None:
    """With null IPAM an endpoint has a MAC address and no other; several of them do not replace
    each other.
    """
    first = machine.driver.create_endpoint(NET, EP, ipv4=None)
    second = machine.driver.create_endpoint(NET, endpoint_id(2), ipv4=None)
    assert first.mac
    assert second.mac
    assert first.mac != second.mac
    assert len(machine.kernel.veths) == 2


def test_endpoint_again(machine: Machine) -> None:
    """The same request gets the same answer and changes nothing, also after a restart and after
    Join.
    """
    first = machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    machine.driver.join(NET, EP, SANDBOX)
    before = stored(machine.driver)
    machine.now += 100
    assert machine.driver.create_endpoint(NET, EP, ipv4=address(7)) == first
    machine.restart()
    assert machine.driver.create_endpoint(NET, EP, ipv4=address(7)) == first
    assert stored(machine.driver) == before


def test_endpoint_with_other_values(machine: Machine) -> None:
    """A known endpoint with another address is refused with its present one, and does not
    change.
    """
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    before = stored(machine.driver)
    with pytest.raises(Conflict, match=re.escape("10.0.4.7/24")):
        machine.driver.create_endpoint(NET, EP, ipv4=address(8))
    with pytest.raises(Conflict):
        machine.driver.create_endpoint(NET, EP, ipv4=address(7), mac="02:aa:00:00:00:07")
    machine.driver.create_network(NET2, {}, (POOL2,))
    with pytest.raises(Conflict, match=NET):
        machine.driver.create_endpoint(NET2, EP, ipv4=address(7))
    machine.driver.delete_network(NET2)
    assert stored(machine.driver) == before
    machine.consistent()


def test_unknown_network(machine: Machine) -> None:
    """An endpoint on an unknown network is refused with the remedy, and the sync loop is woken."""
    wakes = machine.wakes
    with pytest.raises(NotFound, match=f"network {NET2}: .*create it anew"):
        machine.driver.create_endpoint(NET2, EP, ipv4=address(7))
    assert machine.wakes > wakes


@pytest.mark.parametrize(
    "mac", ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "x"]
)
def test_bad_mac(machine: Machine, mac: str) -> None:
    """A multicast MAC address, or an empty one, is refused with an example."""
    with pytest.raises(InvalidRequest, match=f"MAC address '{mac}'.*for example --mac-address"):
        machine.driver.create_endpoint(NET, EP, ipv4=address(7), mac=mac)
    assert machine.kernel.empty


def test_address_given_again(machine: Machine) -> None:
    """When Docker gives an address to a new endpoint, the endpoint that had it no longer exists for
    Docker.
    """
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    machine.driver.create_endpoint(NET, endpoint_id(2), ipv4=address(7))
    assert [row.id for row in machine.driver.store.endpoints()] == [endpoint_id(2)]
    machine.consistent()


def test_same_short_id(machine: Machine) -> None:
    """Two IDs that would share interface names cause an error, not a confused link."""
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    with pytest.raises(Conflict, match="first twelve characters"):
        machine.driver.create_endpoint(NET, EP[:12] + "f" * 52, ipv4=address(8))
    with pytest.raises(Conflict, match="first twelve characters"):
        machine.driver.create_network(NET[:12] + "0" * 13, {}, (POOL2,))
    machine.consistent()


def test_kernel_failure_leaves_nothing(machine: Machine) -> None:
    """If the kernel refuses an endpoint, everything made for it is removed, and the others stay."""
    machine.kernel.failing = {names.short(EP)}
    for _ in range(2):
        with pytest.raises(KernelError, match="no memory"):
            machine.driver.create_endpoint(NET, EP, ipv4=address(7))
        assert machine.kernel.empty
        assert not machine.driver.store.endpoints()
    machine.driver.create_endpoint(NET, endpoint_id(2), ipv4=address(8))
    with pytest.raises(KernelError):
        machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    machine.consistent()
    machine.kernel.failing = set()
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    machine.consistent()


def test_last_endpoint_takes_the_links(machine: Machine) -> None:
    """Bridge and VXLAN device are removed with the last endpoint, not earlier, and the network
    stays known.
    """
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    machine.driver.create_endpoint(NET, endpoint_id(2), ipv4=address(8))
    machine.driver.delete_endpoint(NET, EP)
    machine.consistent()
    assert machine.kernel.bridges
    machine.driver.delete_endpoint(NET, endpoint_id(2))
    assert machine.kernel.empty
    assert machine.driver.store.networks()


def test_delete_unknown_endpoint(machine: Machine) -> None:
    """Removing an unknown endpoint succeeds, on known and unknown networks."""
    machine.driver.delete_endpoint(NET, EP)
    machine.driver.delete_endpoint(NET2, EP)
    machine.driver.leave(NET, EP)
    machine.driver.leave(NET2, EP)
    assert machine.driver.endpoint_info(NET, EP) == {}


def test_delete_on_wrong_network(machine: Machine) -> None:
    """An endpoint isn't removed under the name of another network."""
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    with pytest.raises(InvalidRequest, match=f"belongs to network {NET}"):
        machine.driver.delete_endpoint(NET2, EP)
    machine.consistent()
    assert machine.driver.endpoint_info(NET2, EP) == {}
    assert machine.driver.endpoint_info(NET, EP)["freeflow.mac"] == "02:42:0a:00:04:07"


# --- joining


def test_join(machine: Machine) -> None:
    """Join names the container's end, keeps the sandbox over a restart, and returns no gateway."""
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    answer = machine.driver.join(NET, EP, SANDBOX)
    assert (answer.src_name, answer.dst_prefix) == (names.container_veth(EP), "eth")
    assert answer.connected_routes == ()
    assert machine.joined == [EP]
    machine.restart()
    assert machine.driver.store.endpoints()[0].sandbox_key == SANDBOX


def test_join_again(machine: Machine) -> None:
    """A repeated Join gets the same answer."""
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    assert machine.driver.join(NET, EP, SANDBOX) == machine.driver.join(NET, EP, SANDBOX)


def test_join_unknown(machine: Machine) -> None:
    """Joining an unknown endpoint or network is refused with the remedy."""
    with pytest.raises(NotFound, match="start the container again"):
        machine.driver.join(NET, EP, SANDBOX)
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    machine.driver.create_network(NET2, {}, (POOL2,))
    with pytest.raises(NotFound, match=f"endpoint {EP}"):
        machine.driver.join(NET2, EP, SANDBOX)


def test_leave(machine: Machine) -> None:
    """After Leave the sandbox is forgotten and the links stay until DeleteEndpoint, because Docker
    still moves one.
    """
    machine.driver.create_endpoint(NET, EP, ipv4=address(7))
    machine.driver.join(NET, EP, SANDBOX)
    for _ in range(2):
        machine.driver.leave(NET, EP)
    assert machine.driver.store.endpoints()[0].sandbox_key is None
    machine.consistent()
    machine.driver.delete_endpoint(NET, EP)
    assert machine.kernel.empty


def test_routes_to_other_subnets(machine: Machine) -> None:
    """The other subnets of a network are connected routes: all are on one link."""
    pool6 = Subnet(IPv6Network("fd01::/64"))
    machine.driver.create_network(NET2, {}, (POOL, POOL2, pool6))
    machine.driver.create_endpoint(NET2, EP, ipv4=address(7))
    assert machine.driver.join(NET2, EP, SANDBOX).connected_routes == (POOL2.pool,)


def test_routes_with_null_ipam(machine: Machine) -> None:
    """Null IPAM's 0.0.0.0/0 never becomes a route: it would be the default route."""
    everything = Subnet(IPv4Network("0.0.0.0/0"))
    machine.driver.create_network(NET2, {}, (everything,))
    machine.driver.create_endpoint(NET2, EP, ipv4=None)
    assert machine.driver.join(NET2, EP, SANDBOX).connected_routes == ()


# --- side by side


class MeetingKernel(SteppedKernel):
    """A kernel whose `attach` waits until two calls are in it."""

    def __init__(self) -> None:
        super().__init__(Steps())
        self.meeting = threading.Barrier(2, timeout=patience(5))

    def attach(self, network: Network, endpoint: Endpoint) -> None:
        self.meeting.wait()
        super().attach(network, endpoint)


def test_endpoints_of_one_network_side_by_side(tmp_path: Path) -> None:
    """One endpoint does not wait for another endpoint's links, even on the same network."""
    driver = Driver(Store(tmp_path), MeetingKernel(), DriverConfig(), clock=time.time)
    driver.create_network(NET, {}, (POOL,))
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(
            lambda n: driver.create_endpoint(NET, endpoint_id(n), ipv4=address(n)), (2, 3)
        )
        assert len(list(answers)) == 2


class SlowKernel(SteppedKernel):
    """Lets other threads run between any two steps."""

    def __init__(self) -> None:
        super().__init__(Steps())
        self.steps = lambda: time.sleep(0.0002)  # type: ignore[assignment]


def test_coming_and_going_side_by_side(tmp_path: Path) -> None:
    """However endpoints are created and deleted concurrently, the last one deleted never removes
    the links of a new one."""
    kernel = SlowKernel()
    driver = Driver(Store(tmp_path), kernel, DriverConfig(), clock=time.time)
    driver.create_network(NET, {}, (POOL,))

    def live(number: int) -> None:
        for turn in range(25):
            identifier = endpoint_id(number * 1000 + turn)
            driver.create_endpoint(NET, identifier, ipv4=address(number + 2))
            assert names.short(NET) in kernel.bridges
            assert names.short(NET) in kernel.vxlans
            driver.join(NET, identifier, SANDBOX)
            driver.leave(NET, identifier)
            assert names.short(NET) in kernel.bridges
            driver.delete_endpoint(NET, identifier)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(live, range(6))) == [None] * 6
    assert kernel.empty
    assert not driver.store.endpoints()


def test_hundred_containers_at_once(tmp_path: Path) -> None:
    """The driver itself takes less than 5 ms of a processor for a container's start, with a hundred
    at once.
    """
    driver = Driver(Store(tmp_path), SteppedKernel(Steps()), DriverConfig(), clock=time.time)
    driver.create_network(NET, {}, (POOL,))

    def start(number: int) -> None:
        driver.create_endpoint(NET, endpoint_id(number), ipv4=address(number))
        driver.join(NET, endpoint_id(number), SANDBOX)

    with ThreadPoolExecutor(16) as pool:
        # Not the time on the clock: that says how busy the machine is.
        began = time.process_time()
        assert list(pool.map(start, range(2, 102))) == [None] * 100
        took = time.process_time() - began
    assert took / 100 < 0.005
    assert len(driver.store.endpoints()) == 100


def test_locks_are_forgotten() -> None:
    """A lock exists only while it is used, also after an error, so locks of old IDs do not
    accumulate.
    """
    locks = KeyedLocks()
    with locks.hold("a"), locks.hold("b"):
        assert len(locks) == 2
    with pytest.raises(ValueError, match="x"), locks.hold("a"):
        raise ValueError("x")
    assert len(locks) == 0
