"""The tasks behind a VIP, by the engine's list and the answers of DNS."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Network

from hypothesis import given
from hypothesis import strategies as st

from driver.model import LocalContainer, Network, NetworkView, Service, Subnet, Task
from driver.vip_table import (
    KEEP_REFUSING,
    NetworkState,
    next_state,
    own_addresses,
    unknown,
    unlisted,
)

NET = "p3l8f1w0gk2c9d7h5m6n4b0aq"
NETWORK = Network(
    NET,
    vni=7,
    port=4799,
    mtu=1450,
    prefix6=IPv6Network("fd00::/64"),
    subnets=(Subnet(IPv4Network("10.0.4.0/24")),),
)
VIP, VIP2 = IPv4Address("10.0.4.2"), IPv4Address("10.0.4.3")


def at(number: int) -> IPv4Address:
    return IPv4Address(f"10.0.4.{number}")


def service(name: str, vip: IPv4Address | None, *tasks: int) -> Service:
    return Service(name, vip, tuple(Task(f"{name}.{n}", at(n), f"{n}") for n in tasks))


def view(*services: Service, containers: tuple[int, ...] = ()) -> NetworkView:
    here = tuple(
        LocalContainer(f"c{n}", f"c{n}", f"e{n}", IPv4Interface(f"10.0.4.{n}/24"))
        for n in containers
    )
    return NetworkView(NET, "n", "freeflow:latest", services=services, containers=here)


def active(*numbers: int) -> frozenset[IPv4Address]:
    return frozenset(at(number) for number in numbers)


def after(
    before: NetworkState,
    listed: NetworkView,
    answers: dict[str, frozenset[IPv4Address]],
    now: float = 0.0,
    by_list: frozenset[str] = frozenset(),
) -> NetworkState:
    return next_state(NETWORK, listed, answers, before, now, by_list)


START = NetworkState()


def test_listed_and_active() -> None:
    """A VIP leads to the tasks that both the engine lists and DNS gives, in order."""
    state = after(START, view(service("web", VIP, 9, 7, 8)), {"web": active(7, 9, 99)})
    assert state.table == {VIP: (at(7), at(9))}
    assert (state.seen, state.error) == (0.0, None)


def test_nobody_could_be_asked() -> None:
    """Without an answer all listed tasks count: better one too many than none."""
    state = after(START, view(service("web", VIP, 7, 8)), {})
    assert state.table == {VIP: (at(7), at(8))}


def test_without_an_answer_nothing_is_added() -> None:
    """A task that took no connections doesn't come back while nobody can be asked. A new one, which
    may not be healthy yet, waits for an answer, unless none is to be expected."""
    first = after(START, view(service("web", VIP, 7, 8)), {"web": active(7)})
    listed = view(service("web", VIP, 7, 8, 9))
    second = after(first, listed, {})
    assert second.table == {VIP: (at(7),)}
    assert after(second, listed, {}, by_list=frozenset({"web"})).table == {VIP: (at(7), at(9))}


def test_a_task_that_is_no_longer_listed_goes() -> None:
    """What the engine no longer lists is no task, whatever DNS says."""
    first = after(START, view(service("web", VIP, 7, 8)), {"web": active(7, 8)})
    assert after(first, view(service("web", VIP, 8)), {"web": active(7, 8)}).table == {
        VIP: (at(8),)
    }


def test_foreign_addresses() -> None:
    """Addresses outside the network's pools aren't led to, wherever they come from."""
    foreign = Service("web", VIP, (Task("web.1", IPv4Address("192.0.2.1"), "e"),))
    assert after(START, view(foreign), {}).table == {VIP: ()}
    assert own_addresses(NETWORK, [IPv4Address("192.0.2.1"), at(9), at(7)]) == (at(7), at(9))


def test_services_without_a_vip() -> None:
    """A service with dnsrr has no entry."""
    assert after(START, view(service("db", None, 7)), {"db": active(7)}).table == {}


def test_service_without_active_tasks() -> None:
    """A service whose tasks all take no connections has a VIP that leads nowhere: it refuses."""
    state = after(START, view(service("web", VIP, 7)), {"web": frozenset()}, now=5.0)
    assert state.table == {VIP: ()}
    assert state.idle == {service("web", VIP, 7): 5.0}


def test_vanished_service_refuses_for_a_while() -> None:
    """A VIP whose service vanished refuses for a minute, then it is nobody's."""
    state = after(START, view(service("web", VIP, 7)), {"web": active(7)})
    state = after(state, view(), {}, now=10.0)
    assert state.table == {VIP: ()}
    state = after(state, view(), {}, now=10.0 + KEEP_REFUSING - 1)
    assert state.table == {VIP: ()}
    assert after(state, view(), {}, now=10.0 + KEEP_REFUSING).table == {}


def test_vanished_service_comes_back() -> None:
    """A service that comes back under its VIP is led to again."""
    state = after(START, view(service("web", VIP, 7)), {"web": active(7)})
    state = after(state, view(), {}, now=10.0)
    state = after(state, view(service("web", VIP, 8)), {"web": active(8)}, now=20.0)
    assert state.table == {VIP: (at(8),)}
    assert state.vanished == {}


def test_vip_that_became_anothers_address() -> None:
    """An address that was a VIP isn't refused once a task or a container has it."""
    state = after(START, view(service("web", VIP, 7)), {"web": active(7)})
    assert after(state, view(containers=(2,)), {}).table == {}
    assert after(state, view(service("db", VIP2, 2)), {"db": active(2)}).table == {VIP2: (at(2),)}


def test_unchanged_table_is_the_same_object() -> None:
    """An unchanged table is the same object, so that nothing is written for it."""
    listed = view(service("web", VIP, 7))
    first = after(START, listed, {"web": active(7)})
    assert after(first, listed, {"web": active(7)}, now=1.0).table is first.table


def test_services_that_rest() -> None:
    """A service rests after some time without active tasks, until its list of tasks changes."""
    listed = view(service("web", VIP, 7))
    state = after(START, listed, {"web": frozenset()}, now=0.0)
    state = after(state, listed, {"web": frozenset()}, now=6.0)
    assert state.resting(before=5.0) == {service("web", VIP, 7)}
    assert state.resting(before=0.0) == frozenset()
    state = after(state, view(service("web", VIP, 7, 8)), {"web": frozenset()}, now=7.0)
    assert state.resting(before=5.0) == frozenset()


def test_hints_that_the_list_is_old() -> None:
    """DNS that gives tasks which aren't listed, or doesn't know a listed service, is told."""
    listed = view(service("web", VIP, 7), service("api", VIP2, 9), service("db", None, 5))
    answers = {"web": active(7, 8) | {IPv4Address("192.0.2.1")}}
    assert unlisted(NETWORK, listed, answers) == active(8)
    assert unknown(listed, answers) == {"api"}
    state = after(START, listed, answers)
    assert state.unlisted == active(8)
    assert state.unknown == {"api"}


numbers = st.lists(st.integers(5, 12), max_size=5, unique=True)
rounds = st.lists(st.tuples(numbers, st.none() | numbers), min_size=1, max_size=8)


@given(rounds)
def test_never_to_what_is_not_listed(steps: list[tuple[list[int], list[int] | None]]) -> None:
    """Whatever engine and DNS say, a VIP leads only to listed tasks, and to all that are listed and
    active."""
    state = START
    for now, (listed, answer) in enumerate(steps):
        answers = {} if answer is None else {"web": active(*answer)}
        state = after(state, view(service("web", VIP, *listed)), answers, float(now))
        led = set(state.table[VIP])
        assert led <= active(*listed)
        assert state.table[VIP] == tuple(sorted(led))
        if answer is not None:
            assert led == active(*listed) & active(*answer)
