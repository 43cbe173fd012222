"""When the services are listed again, and what counts as a hint."""

from __future__ import annotations

import itertools
import struct
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

import pytest

from driver.hints import FORGET, MEMORY, Hints
from driver.kernel import announce, arp
from driver.model import ArpFrame, LocalContainer, NetworkView, Service, Subnet, Task
from driver.refresh_budget import BUDGET, FOLLOW_UPS, INTERVAL, RefreshBudget
from driver.vip_table import NetworkState
from tests.unit.steps import FakeDirectory, SteppedKernel, Steps

NETWORK = "n" * 25
SHORT = NETWORK[:12]
VIP, TASK, CONTAINER, GATEWAY, OTHER, NOBODY = (IPv4Address(f"10.1.0.{n}") for n in range(2, 8))
VIEW = NetworkView(
    NETWORK,
    "net",
    "freeflow:latest",
    services=(Service("web", VIP, (Task("web.1", TASK, "e1"),)),),
    others=frozenset({OTHER}),
    containers=(LocalContainer("c1", "web.2", "e2", IPv4Interface(f"{CONTAINER}/24")),),
    subnets=(Subnet(IPv4Network("10.1.0.0/24"), IPv4Interface(f"{GATEWAY}/24")),),
)


class Listener:
    """Hints over a network in a known state; `hinted` are those given."""

    def __init__(self) -> None:
        self.now = 100.0
        self.hinted: list[str] = []
        self.states = {NETWORK: NetworkState(view=VIEW, table={VIP: (TASK,)})}
        self.hints = Hints(
            SteppedKernel(Steps()),
            FakeDirectory(),
            lambda: self.states,
            self.hinted.append,
            lambda: self.now,
        )

    def hears(self, sender: IPv4Address, target: IPv4Address, network: str = SHORT) -> int:
        """The number of hints that this frame causes."""
        before = len(self.hinted)
        self.hints.heard(frozenset({ArpFrame(network, sender, target)}))
        return len(self.hinted) - before


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.mark.parametrize("target", [VIP, TASK, CONTAINER, GATEWAY, OTHER])
def test_questions_for_known_addresses_are_no_hints(
    listener: Listener, target: IPv4Address
) -> None:
    """Everyday ARP costs the engine nothing."""
    assert listener.hears(CONTAINER, target) == 0
    assert listener.hears(target, target) == 0


def test_a_question_for_an_address_that_nobody_has_is_a_hint_once(listener: Listener) -> None:
    """A client that keeps trying a dead address causes one request to the engine in five
    minutes."""
    assert listener.hears(CONTAINER, NOBODY) == 1
    listener.now += FORGET - 1
    assert listener.hears(CONTAINER, NOBODY) == 0
    listener.now += 2
    assert listener.hears(CONTAINER, NOBODY) == 1


def test_each_announcement_of_an_unknown_address_is_a_hint(listener: Listener) -> None:
    """A task announces itself when it joins, and again when Docker has added it to its service."""
    assert listener.hears(NOBODY, NOBODY) == 1
    assert listener.hears(NOBODY, NOBODY) == 1


def test_networks_without_endpoints_here_are_not_hinted_at(listener: Listener) -> None:
    """ARP on an unknown device is ignored."""
    assert listener.hears(CONTAINER, NOBODY, "x" * 12) == 0


def test_memory_of_addresses_is_limited(listener: Listener) -> None:
    """A container that requests all addresses doesn't fill the plugin's memory."""
    first = int(IPv4Address("10.1.0.0"))
    for number in range(MEMORY + 100):
        listener.hears(CONTAINER, IPv4Address(first + 256 + number))
    assert len(listener.hints._asked) == MEMORY


def test_a_container_of_the_network_that_changes_is_a_hint(listener: Listener) -> None:
    """Docker adds a task to its service when it starts or becomes healthy."""
    listener.hints.container_changed("c1")
    listener.hints.container_changed("elsewhere")
    assert listener.hinted == [NETWORK]


def test_an_announcement_is_understood_as_such() -> None:
    """An announcement that one host sends is one for the host that receives it."""
    frame = announce.gratuitous_arp("02:42:0a:01:00:07", NOBODY)[14:]
    assert arp.parse(frame, f"ffb{SHORT}") == ArpFrame(SHORT, NOBODY, NOBODY)
    heard = arp.parse(frame, f"ffb{SHORT}")
    assert heard is not None
    assert heard.is_announcement


@pytest.mark.parametrize(
    ("frame", "interface"),
    [
        (b"", "ffbx"),
        (b"\0" * 27, "ffbx"),
        (struct.pack("!HHBBH", 1, 0x86DD, 6, 4, 1) + b"\0" * 20, "ffbx"),
        (announce.gratuitous_arp("02:42:0a:01:00:07", NOBODY)[14:], "eth0"),
    ],
)
def test_other_frames_are_ignored(frame: bytes, interface: str) -> None:
    """Invalid and foreign frames are ignored."""
    assert arp.parse(frame, interface) is None


def _taken(budget: RefreshBudget, begin: float, end: float, step: float = 0.25) -> list[float]:
    times = []
    now = begin
    while now < end:
        if budget.take(now):
            times.append(now - begin)
        now += step
    return times


def test_services_are_listed_at_once_and_then_rarely() -> None:
    """Without hints the services are listed once a minute."""
    assert _taken(RefreshBudget(0.0), 0.0, 3 * INTERVAL - 1) == [0.0, INTERVAL, 2 * INTERVAL]


def test_a_hint_is_followed_up() -> None:
    """Gossip that arrives shortly after the hint isn't missed."""
    budget = RefreshBudget(0.0)
    assert budget.take(0.0)
    budget.hint(10.0)
    assert _taken(budget, 10.0, 20.0) == list(FOLLOW_UPS)


def test_hints_without_end_are_answered_at_a_bounded_rate() -> None:
    """A flood of hints neither defers the due listing nor causes more than one a second for
    long."""
    budget = RefreshBudget(0.0)
    times = []
    for tick in range(6000):
        now = tick / 100
        budget.hint(now)
        if budget.take(now):
            times.append(now)
    assert BUDGET + 50 < len(times) <= BUDGET + 61
    assert max(later - sooner for sooner, later in itertools.pairwise(times)) < 1.1


def test_what_dns_says_may_come_early() -> None:
    """A task that DNS knows causes a listing at once, within the same budget."""
    budget = RefreshBudget(0.0)
    assert budget.take(0.0)
    assert budget.take_early(1.0)
    assert not budget.take(1.1)
    allowed = sum(budget.take_early(2.0) for _ in range(100))
    assert BUDGET - 2 <= allowed <= BUDGET
