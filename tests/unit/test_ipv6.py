"""IPv6 addresses: their prefix, the user's choice, and replacing those that engines assign."""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv6Interface, IPv6Network, ip_interface, ip_network
from pathlib import Path

import pytest

from driver.driver import Driver, DriverConfig
from driver.errors import InvalidRequest, KernelError
from driver.ipv6_override import PATIENCE, Ipv6Override
from driver.model import Endpoint, Subnet
from driver.store import Store
from tests.unit.steps import SteppedKernel, Steps

SWARM = "p3l8f1w0gk2c9d7h5m6n4b0aq"
LOCAL = "ab" * 32
ENDPOINT = "9f" * 32
V4 = IPv4Interface("10.91.0.7/24")
POOL4 = Subnet(ip_network("10.91.0.0/24"), ip_interface("10.91.0.1/24"))
USERS = Subnet(ip_network("fd91::/64"), ip_interface("fd91::1/64"))
ENGINES = Subnet(ip_network("fd85:4f7:d486::/64"))


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    steps = Steps()
    return Driver(Store(tmp_path), SteppedKernel(steps), DriverConfig(), clock=lambda: 0.0)


def _endpoint(
    driver: Driver, network: str, asked: str | None, *subnets: Subnet, **options: str
) -> tuple[Endpoint, str | None]:
    """The stored endpoint, and the address in the answer."""
    flag = any(subnet.pool.version == 6 for subnet in subnets)
    driver.create_network(network, options, (POOL4, *subnets), ipv6=flag)
    added = driver.create_endpoint(
        network, ENDPOINT, ipv4=V4, ipv6=IPv6Interface(asked) if asked else None
    )
    stored = driver.store.endpoint(ENDPOINT)
    assert stored is not None
    return stored, str(added.ipv6) if added.ipv6 else None


def test_the_option_gives_derived_addresses(driver: Driver) -> None:
    """With -o ipv6=PREFIX the address is the prefix with the IPv4 address, and Docker gets it."""
    stored, added = _endpoint(driver, SWARM, None, ipv6="fd91::/64")
    assert added == "fd91::a5b:7/64"
    assert stored.ipv6 == IPv6Interface("fd91::10.91.0.7/64")
    assert stored.engine_ipv6 is None


def test_the_option_alone_takes_the_networks_own_prefix(driver: Driver) -> None:
    """With -o ipv6=on the prefix is the one chosen at allocation, on every host."""
    chosen = driver.allocate_network(SWARM, {"ipv6": "on"})
    prefix = IPv6Network(chosen["freeflow.prefix6"])
    assert prefix.subnet_of(IPv6Network("fd00::/8"))
    stored, added = _endpoint(driver, SWARM, None, **chosen)
    assert stored.ipv6 == IPv6Interface((prefix[int(V4.ip)], 64))
    assert added == str(stored.ipv6)


def test_the_users_prefix_is_told_to_all_hosts(driver: Driver) -> None:
    """The manager's answer contains the prefix of -o ipv6=PREFIX."""
    chosen = driver.allocate_network(SWARM, {"ipv6": "fd91::/64"})
    assert chosen["freeflow.prefix6"] == "fd91::/64"
    assert driver.allocate_network(SWARM, chosen) == chosen


def test_without_the_option_or_the_flag_there_is_no_ipv6(driver: Driver) -> None:
    """With neither -o ipv6 nor --ipv6, or with -o ipv6=off, there is no address."""
    assert _endpoint(driver, SWARM, None)[1] is None
    driver.delete_endpoint(SWARM, ENDPOINT)
    assert _endpoint(driver, SWARM, None, ipv6="off")[1] is None


def test_an_ipv6_subnet_of_the_users_is_refused(driver: Driver) -> None:
    """--ipv6 --subnet in a Swarm is refused, because Docker would allocate IPv4 addresses twice;
    the refusal shows the remedy.
    """
    with pytest.raises(InvalidRequest, match="-o ipv6=fd91::/64"):
        driver.create_network(SWARM, {}, (POOL4, USERS), ipv6=True)
    small = Subnet(ip_network("fd91::/112"), ip_interface("fd91::1/112"))
    with pytest.raises(InvalidRequest, match="-o ipv6=on"):
        driver.create_network(SWARM, {}, (POOL4, small), ipv6=True)
    assert driver.store.networks() == []


def test_an_address_counted_in_the_engines_own_subnet_is_replaced(driver: Driver) -> None:
    """--ipv6 alone, with engines that choose a subnet per host: the network's prefix is used,
    without a route to theirs."""
    stored, _ = _endpoint(driver, SWARM, "fd85:4f7:d486::1/64", ENGINES)
    network = driver.store.network(SWARM)
    assert network is not None
    assert stored.ipv6 == IPv6Interface((network.prefix6[int(V4.ip)], 64))
    assert stored.engine_ipv6 == IPv6Interface("fd85:4f7:d486::1/64")
    assert driver.join(SWARM, ENDPOINT, "/var/run/docker/netns/x").connected_routes == ()


def test_an_address_that_was_asked_for(driver: Driver) -> None:
    """With driver-opt ip6 that address replaces the derived one, and Docker gets it."""
    driver.create_network(SWARM, {"ipv6": "fd91::/64"}, (POOL4,))
    added = driver.create_endpoint(SWARM, ENDPOINT, ipv4=V4, driver_options={"ip6": "fd91::1:0:99"})
    assert added.ipv6 == IPv6Interface("fd91::1:0:99/64")
    stored = driver.store.endpoint(ENDPOINT)
    assert stored is not None
    assert (stored.ipv6, stored.engine_ipv6) == (added.ipv6, None)


def test_an_address_that_was_asked_for_replaces_the_engines(driver: Driver) -> None:
    """With driver-opt ip6 and --ipv6 that address replaces the engine's."""
    driver.create_network(
        SWARM,
        {"freeflow.format": "1", "freeflow.prefix6": "fd91::/64"},
        (POOL4, ENGINES),
        ipv6=True,
    )
    driver.create_endpoint(
        SWARM,
        ENDPOINT,
        ipv4=V4,
        ipv6=IPv6Interface("fd85:4f7:d486::1/64"),
        driver_options={"ip6": "fd91::1:0:99"},
    )
    stored = driver.store.endpoint(ENDPOINT)
    assert stored is not None
    assert stored.ipv6 == IPv6Interface("fd91::1:0:99/64")
    assert stored.engine_ipv6 == IPv6Interface("fd85:4f7:d486::1/64")


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("fd92::1:0:99", "not in fd91::/64"),
        ("fd91::10.91.0.8", "belongs to the container with the IPv4 address 10.91.0.8"),
        ("fd91::", "belongs to"),
        ("here", "for example driver-opt=ip6="),
        ("10.0.0.1", "for example driver-opt=ip6="),
    ],
)
def test_an_address_that_nobody_may_ask_for(driver: Driver, wanted: str, reason: str) -> None:
    """An address outside the prefix, another container's, or an invalid one is refused with the
    reason, and nothing is left."""
    driver.create_network(SWARM, {"ipv6": "fd91::/64"}, (POOL4,))
    with pytest.raises(InvalidRequest, match=reason):
        driver.create_endpoint(SWARM, ENDPOINT, ipv4=V4, driver_options={"ip6": wanted})
    assert driver.store.endpoints() == []


def test_the_own_address_may_be_asked_for(driver: Driver) -> None:
    """Requesting the derived address is no conflict; without IPv6 the error says how to get it."""
    driver.create_network(SWARM, {"ipv6": "fd91::/64"}, (POOL4,))
    added = driver.create_endpoint(
        SWARM, ENDPOINT, ipv4=V4, driver_options={"ip6": "fd91::10.91.0.7"}
    )
    assert added.ipv6 == IPv6Interface("fd91::10.91.0.7/64")
    driver.create_network(LOCAL, {}, (POOL4,))
    with pytest.raises(InvalidRequest, match="-o ipv6=on"):
        driver.create_endpoint(LOCAL, "8e" * 32, ipv4=V4, driver_options={"ip6": "fd91::9"})


def test_on_a_network_of_one_host_the_engine_counts(driver: Driver) -> None:
    """SCOPE=local: the addresses of the only engine are unique."""
    stored, _ = _endpoint(driver, LOCAL, "fd91::2/64", USERS)
    assert (stored.ipv6, stored.engine_ipv6) == (IPv6Interface("fd91::2/64"), None)
    assert driver.join(LOCAL, ENDPOINT, "/var/run/docker/netns/x").connected_routes == ()
    with pytest.raises(InvalidRequest, match="use --ip6"):
        driver.create_endpoint(
            LOCAL,
            "8e" * 32,
            ipv4=IPv4Interface("10.91.0.8/24"),
            ipv6=IPv6Interface("fd91::3/64"),
            driver_options={"ip6": "fd91::9"},
        )


def test_a_repeated_call_is_the_same_call(driver: Driver) -> None:
    """CreateEndpoint twice, with the engine's address each time, is no conflict."""
    first, _ = _endpoint(driver, SWARM, "fd85:4f7:d486::2/64", ENGINES)
    second, _ = _endpoint(driver, SWARM, "fd85:4f7:d486::2/64", ENGINES)
    assert first == second


@pytest.mark.parametrize(
    "value", ["yes", "fd91::/48", "fd91::1/64", "ff02::/64", "fe80::/64", "10.0.0.0/24", ""]
)
def test_a_bad_prefix_is_refused(driver: Driver, value: str) -> None:
    """Only on, off and /64 prefixes of unicast addresses are accepted; the refusal shows an
    example."""
    with pytest.raises(InvalidRequest, match="for example -o ipv6="):
        driver.allocate_network(SWARM, {"ipv6": value})


class Sandbox:
    """Answers like the kernel: false until the address is there, or an error."""

    def __init__(self, *answers: bool | KernelError) -> None:
        self.answers = list(answers)
        self.asked = 0

    def __call__(self, path: Path, mac: str, engines: IPv6Interface, ours: IPv6Interface) -> bool:
        self.asked += 1
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, KernelError):
            raise answer
        return answer


def _override(sandbox: Sandbox, now: list[float]) -> Ipv6Override:
    # The test acts as the thread.
    return Ipv6Override(sandbox, lambda endpoint: Path("/x"), lambda: now[0], background=False)


COUNTED = Endpoint(
    ENDPOINT,
    SWARM,
    "02:42:0a:5b:00:07",
    V4,
    IPv6Interface("fd91::10.91.0.7/64"),
    "/var/run/docker/netns/x",
    engine_ipv6=IPv6Interface("fd91::2/64"),
)


def test_an_address_is_exchanged_when_it_comes() -> None:
    """The exchange is tried until the engine's address is there, errors included, and then no
    more."""
    sandbox, now = Sandbox(False, KernelError("no such namespace"), True), [0.0]
    ipv6_override = _override(sandbox, now)
    ipv6_override.endpoint_joined(COUNTED)
    for _ in range(5):
        ipv6_override.once()
    assert sandbox.asked == 3


def test_a_container_that_never_starts_is_given_up() -> None:
    """After a minute there are no more attempts."""
    sandbox, now = Sandbox(*[False] * 100), [0.0]
    ipv6_override = _override(sandbox, now)
    ipv6_override.endpoint_joined(COUNTED)
    ipv6_override.once()
    now[0] = PATIENCE + 1
    ipv6_override.once()
    ipv6_override.once()
    assert sandbox.asked == 2


def test_other_endpoints_are_no_work() -> None:
    """An endpoint with its own address causes no attempt."""
    sandbox, now = Sandbox(), [0.0]
    ipv6_override = _override(sandbox, now)
    ipv6_override.resume([Endpoint(ENDPOINT, SWARM, "02:42:0a:5b:00:07", V4)])
    ipv6_override.once()
    assert sandbox.asked == 0
