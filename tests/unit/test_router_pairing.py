"""Which requests get a slot, with which partner, and what becomes of the slot: the registry, with
fakes.
"""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from msgspec.structs import replace

from dataplane.control import (
    EndpointFact,
    Limits,
    NetworkFact,
    RouterSettings,
    RouterSnapshot,
    Rule,
)
from dataplane.errors import DataplaneError, WrongMessage
from dataplane.router import layout
from dataplane.router import library_wire as wire
from dataplane.router.agenda import Agenda
from dataplane.router.arena_table import SLOT_AGE
from dataplane.router.knowledge import Knowledge
from dataplane.router.pairing import EARLY
from dataplane.router.reasons import Reason
from dataplane.router.registry import NOTES
from dataplane.router.request_table import REQUEST_AGE
from tests.unit.router_world import AWAY, VIP, World, at, facts, knowledge


@pytest.fixture
def world() -> World:
    return World()


def the_pair(world: World) -> tuple[int, int, wire.Grant, wire.Grant]:
    """Two processes and the two grants of a connection between them."""
    a, b = world.process(1), world.process(2)
    world.connect(a, b, 5000)
    return a, b, world.grants(a)[-1], world.grants(b)[-1]


# --- hello


def test_welcome(world: World) -> None:
    """A process of an endpoint's container is told its rule, and that acceleration is on."""
    process = world.process(1)
    ((welcome, _),) = world.heard(process, wire.Welcome)
    assert (welcome.enabled, welcome.operations, welcome.spin) == (True, 4, 50)


def test_welcome_of_unknown_namespaces(world: World) -> None:
    """A process of another namespace is told late that acceleration is off, since its container may
    just have started; its requests are refused for now.
    """
    process = world.process(77)
    assert world.heard(process, wire.Welcome) == []
    world.pairing.welcome_late(process)
    ((welcome, _),) = world.heard(process, wire.Welcome)
    assert not welcome.enabled
    world.ask(process, 1, "10.0.4.1:5000", "10.0.4.2:80")
    assert [refuse.passes for refuse, _ in world.heard(process, wire.Refuse)] == [True]


def test_a_container_that_is_listed_late(world: World) -> None:
    """A connection that has sent its request long before its container was known, as after a
    restart of the engine, is refused for now, and gets its slot when it asks again.
    """
    client, server = world.process(9), world.process(2)
    cookie = world.open_and_ask(client, "10.0.4.9:5000", "10.0.4.2:80")
    assert world.heard(client, wire.Refuse) == []
    world.pairing.welcome_late(client)
    assert [refuse.passes for refuse, _ in world.heard(client, wire.Refuse)] == [True]
    came = EndpointFact(id="e9", network="n1", addresses=("10.0.4.9",), namespace=9)
    facts = world.facts
    world.pairing.replace_snapshot(Knowledge(replace(facts, endpoints=(*facts.endpoints, came))))
    assert [welcome.enabled for welcome, _ in world.heard(client, wire.Welcome)] == [False, True]
    world.open_and_ask(server, "10.0.4.2:80", "10.0.4.9:5000")
    world.ask(client, cookie, "10.0.4.9:5000", "10.0.4.2:80")
    assert [len(world.grants(each)) for each in (client, server)] == [1, 1]


def test_a_network_that_is_listed_late(world: World) -> None:
    """Where a known container may have further networks that the driver has not told of yet, it is
    refused for now; where it can't have them, for good.
    """
    process = world.process(1)
    for expected in (("0.0.0.0/0",), ("172.20.0.0/16",), ("172.21.0.0/16",), ()):
        world.pairing.replace_snapshot(Knowledge(replace(world.facts, expected=expected)))
        world.open_and_ask(process, "172.20.0.2:5000", "172.20.0.3:80")
    refused = [refuse for refuse, _ in world.heard(process, wire.Refuse)]
    assert [each.passes for each in refused] == [True, True, False, False]


def test_a_container_that_just_came(world: World) -> None:
    """A process that said HELLO before its container was known is welcomed when the driver tells of
    the container.
    """
    process = world.process(9)
    facts = RouterSnapshot(
        endpoints=(EndpointFact(id="e", network="n", addresses=("10.1.1.1",), namespace=9),),
        networks=(NetworkFact(id="n", subnets=("10.1.1.0/24",)),),
    )
    world.pairing.replace_snapshot(Knowledge(facts))
    world.pairing.welcome_late(process)
    ((welcome, _),) = world.heard(process, wire.Welcome)
    assert welcome.enabled


def test_asks_before_the_container_is_known(world: World) -> None:
    """Requests from before the container is known are answered once it is, up to a number; more are
    refused for now.
    """
    early, other = world.process(9), world.process(2)
    kernel = world.kernel
    for port in range(5000, 5000 + EARLY + 1):
        kernel.sockets[9, at(f"10.0.4.9:{port}"), at("10.0.4.2:80")] = port
        world.ask(early, port, f"10.0.4.9:{port}", "10.0.4.2:80")
    assert [refuse.passes for refuse, _ in world.heard(early, wire.Refuse)] == [True]
    came = EndpointFact(id="e9", network="n1", addresses=("10.0.4.9",), namespace=9)
    facts = world.facts
    world.pairing.replace_snapshot(Knowledge(replace(facts, endpoints=(*facts.endpoints, came))))
    world.open_and_ask(other, "10.0.4.2:80", "10.0.4.9:5000")
    assert len(world.grants(early)) == 1
    assert len(world.pairing.processes[early].waiting) == EARLY - 1


def test_new_settings_reach_processes(world: World) -> None:
    """Processes are told once of a changed rule, and of acceleration that is turned off, if it
    concerns them.
    """
    process = world.process(2)
    for _ in range(2):
        world.pairing.replace_snapshot(knowledge(RouterSettings(rule=Rule(operations=9))))
    world.pairing.replace_snapshot(knowledge(off=True))
    found = [(each.enabled, each.operations) for each, _ in world.heard(process, wire.Welcome)]
    assert found == [(True, 4), (True, 9), (False, 4)]


@pytest.mark.parametrize("hello", [wire.Hello(1, layout.VERSION), wire.Hello(2, 99)])
def test_another_version(world: World, hello: wire.Hello) -> None:
    """A library of another version is told to stay on TCP, whatever is set later, and its requests
    are refused at once.
    """
    assert world.pairing.connected(300, 1, 1)
    world.pairing.hello(300, hello)
    world.pairing.replace_snapshot(world.pairing.knowledge)
    ((welcome, _),) = world.heard(300, wire.Welcome)
    assert (welcome.version, welcome.enabled) == (wire.PROTOCOL_VERSION, False)
    world.open_and_ask(300, "10.0.4.1:5000", "10.0.4.2:80")
    assert world.refusals(300) == [Reason.OFF]


def test_order_of_messages(world: World) -> None:
    """HELLO is the first message, and comes once."""
    process = world.process(1, hello=False)
    with pytest.raises(WrongMessage, match="before HELLO"):
        world.ask(process, 1, "10.0.4.1:5000", "10.0.4.2:80")
    with pytest.raises(WrongMessage, match="second HELLO"):
        world.pairing.hello(world.process(1), wire.Hello(wire.PROTOCOL_VERSION, layout.VERSION))


def test_rules_of_several_networks() -> None:
    """A container on several networks has the most patient of their rules, and the shortest
    spin.
    """
    networks = (
        NetworkFact(id="a", rule=Rule(operations=2, age=900, spin=50)),
        NetworkFact(id="b", rule=Rule(operations=8, age=10, spin=0)),
        NetworkFact(id="c", rule=Rule(operations=99), acceleration=False),
    )
    endpoints = tuple(
        EndpointFact(id=n, network=n, addresses=(f"10.0.{i}.1",), namespace=1)
        for i, n in enumerate("abc")
    )
    rule = Knowledge(RouterSnapshot(networks=networks, endpoints=endpoints)).rule(1)
    assert (rule.operations, rule.age, rule.spin) == (8, 900, 0)


def test_a_snapshot_that_contradicts_itself() -> None:
    """A snapshot with an endpoint of an unknown network, or an invalid address, is refused as a
    whole.
    """
    endpoint = EndpointFact(id="e", network="n", addresses=("10.0.0.1",), namespace=1)
    with pytest.raises(DataplaneError):
        Knowledge(RouterSnapshot(endpoints=(endpoint,)))
    with pytest.raises(DataplaneError):
        Knowledge(RouterSnapshot(networks=(NetworkFact(id="n", vips={"x": ()}),)))


def test_a_container_leaves_its_network() -> None:
    """When a container is disconnected, its connections on that network are told once to fall back
    to TCP; others are not.
    """
    world = World()
    a, b, c = world.process(1), world.process(2), world.process(3)
    world.connect(a, b, 5000)
    world.connect(a, c, 5001, to=81)
    (grant, memory), _ = world.heard(a, wire.Grant)
    whole = facts()
    part = RouterSnapshot(
        endpoints=tuple(each for each in whole.endpoints if each.namespace != 2),
        networks=whole.networks,
        settings=whole.settings,
    )
    world.pairing.replace_snapshot(Knowledge(part))
    world.pairing.replace_snapshot(Knowledge(part))
    assert world.memory.left == [(memory, grant.slot)]
    world.pairing.replace_snapshot(knowledge(off=True))
    assert len(world.memory.left) == 2


# --- asks


def test_both_must_ask(world: World) -> None:
    """One end's request has no answer. The other end's has two: each side's own grant, of one slot
    and one incarnation.
    """
    a, b = world.process(1), world.process(2)
    world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    assert not world.grants(a)
    world.open_and_ask(b, "10.0.4.2:80", "10.0.4.1:5000")
    ((one, memory),), ((other, memory2),) = world.heard(a, wire.Grant), world.heard(b, wire.Grant)
    assert (one.arena, one.slot, one.incarnation) == (other.arena, other.slot, other.incarnation)
    assert {one.side, other.side} == {0, 1}
    assert one.token != other.token
    assert memory == memory2 == 1000
    assert world.memory.prepared == [(1000, one.slot, one.incarnation)]


def test_connections_share_an_arena(world: World) -> None:
    """Later connections of two processes take slots of the same arena, whose memory comes with each
    grant.
    """
    a, b, *_ = the_pair(world)
    world.connect(b, a, 6000)
    assert [memory for _, memory in world.heard(a, wire.Grant)] == [1000, 1000]
    assert [memory for _, memory in world.heard(b, wire.Grant)] == [1000, 1000]
    first, second = world.grants(a)
    assert (first.arena, first.token, first.side) == (second.arena, second.token, second.side)
    assert first.slot != second.slot
    assert first.incarnation != second.incarnation


def test_many_connections_of_two_processes(world: World) -> None:
    """The 65th connection of two processes gets a second arena."""
    a, b = world.process(1), world.process(2)
    for port in range(5000, 5000 + layout.SLOTS + 1):
        world.connect(a, b, port)
    grants = world.grants(a)
    assert len({(grant.arena, grant.slot) for grant in grants}) == layout.SLOTS + 1
    assert len({grant.arena for grant in grants}) == 2
    assert world.memory.arenas == {1000, 1001}


def test_other_processes_get_other_memory(world: World) -> None:
    """No arena is shared by more than two processes."""
    a, b, c = world.process(1), world.process(2), world.process(2)
    world.connect(a, b, 5000)
    world.connect(a, c, 5001, to=81)
    first, second = world.grants(a)
    assert first.arena != second.arena


def test_within_one_process(world: World) -> None:
    """A process may have both ends; each side has its own token."""
    process = world.process(1)
    world.connect(process, process, 5000)
    (one, memory), (other, again) = world.heard(process, wire.Grant)
    assert (one.side, other.side) == (0, 1)
    assert one.token != other.token
    assert (memory, again) == (1000, 1000)
    world.release(process, one)
    world.release(process, other)
    world.pairing.gone(process)
    assert not world.memory.arenas


def test_ipv6(world: World) -> None:
    """IPv6 connections are matched like IPv4 ones."""
    a, b = world.process(1), world.process(2)
    world.open_and_ask(a, "[fd00::1]:5000", "[fd00::2]:80")
    world.open_and_ask(b, "[fd00::2]:80", "[fd00::1]:5000")
    assert len(world.grants(a)) == len(world.grants(b)) == 1


@pytest.mark.parametrize("server_first", [False, True])
def test_vip(world: World, server_first: bool) -> None:
    """A client that sees its service's VIP is matched with the task that sees the client."""
    a, b = world.process(1), world.process(3)
    world.translate(1, "10.0.4.1:5000", f"{VIP}:80", "10.0.4.3:80")
    ends = [(a, "10.0.4.1:5000", f"{VIP}:80"), (b, "10.0.4.3:80", "10.0.4.1:5000")]
    for end in reversed(ends) if server_first else ends:
        world.open_and_ask(*end)
    assert len(world.grants(a)) == len(world.grants(b)) == 1


def test_vip_and_task_from_one_port(world: World) -> None:
    """One source port may serve two connections, to a task and to its VIP. They can't be told
    apart, so both stay on TCP.
    """
    a, b = world.process(1), world.process(2)
    world.socket(1, "10.0.4.1:5000", f"{VIP}:80")
    world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    world.open_and_ask(b, "10.0.4.2:80", "10.0.4.1:5000")
    assert not world.grants(a)
    assert all(each.ambiguous for each in world.pairing.processes[a].waiting.values())


@pytest.mark.parametrize("forger_first", [False, True])
def test_a_task_with_a_forged_socket(world: World, forger_first: bool) -> None:
    """A task that makes a socket with a client's address is not granted the client's connection to
    another task.
    """
    a, forger, server = world.process(1), world.process(2), world.process(3)
    world.translate(1, "10.0.4.1:5000", f"{VIP}:80", "10.0.4.3:80")
    if forger_first:
        world.open_and_ask(forger, "10.0.4.2:80", "10.0.4.1:5000")
    world.open_and_ask(a, "10.0.4.1:5000", f"{VIP}:80")
    if not forger_first:
        world.open_and_ask(forger, "10.0.4.2:80", "10.0.4.1:5000")
    assert not world.grants(a)
    assert not world.grants(forger)
    world.open_and_ask(server, "10.0.4.3:80", "10.0.4.1:5000")
    assert len(world.grants(a)) == len(world.grants(server)) == 1
    assert not world.grants(forger)


def test_a_forged_socket_and_a_server_on_another_host(world: World) -> None:
    """The same holds if the connection leads to a task on another host: it is refused as remote."""
    a, forger = world.process(1), world.process(2)
    world.translate(1, "10.0.4.1:5000", f"{AWAY}:80", "10.0.4.66:80")
    world.open_and_ask(forger, "10.0.4.2:80", "10.0.4.1:5000")
    world.open_and_ask(a, "10.0.4.1:5000", f"{AWAY}:80")
    assert world.refusals(a) == [Reason.REMOTE]
    assert not world.grants(forger)


def test_an_untracked_connection_to_a_vip(world: World) -> None:
    """If the kernel doesn't know to which task a connection to a VIP leads, it stays on TCP, and
    the reason says so.
    """
    a, b = world.process(1), world.process(2)
    world.open_and_ask(b, "10.0.4.2:80", "10.0.4.1:5000")
    cookie = world.open_and_ask(a, "10.0.4.1:5000", f"{VIP}:80")
    assert not world.grants(a)
    assert world.pairing.containers[1].notes[cookie][0] == Reason.UNTRACKED


def test_vip_with_tasks_elsewhere(world: World) -> None:
    """A connection to a VIP with tasks on several hosts is granted if it leads to a task here, and
    refused if not.
    """
    a, b = world.process(1), world.process(2)
    world.translate(1, "10.0.4.1:5000", f"{AWAY}:80", "10.0.4.66:80")
    world.open_and_ask(a, "10.0.4.1:5000", f"{AWAY}:80")
    assert world.refusals(a) == [Reason.REMOTE]
    world.translate(1, "10.0.4.1:5001", f"{AWAY}:80", "10.0.4.2:80")
    world.open_and_ask(a, "10.0.4.1:5001", f"{AWAY}:80")
    world.open_and_ask(b, "10.0.4.2:80", "10.0.4.1:5001")
    assert len(world.grants(a)) == 1


@pytest.mark.parametrize("peer", ["10.0.4.2:80", "10.0.4.66:80", "8.8.8.8:80", f"{AWAY}:80"])
def test_no_address_is_told_of_without_a_connection(world: World, peer: str) -> None:
    """Without a connection, a process can't find out which addresses are on this host, on the
    network or elsewhere.
    """
    a = world.process(1)
    world.ask(a, 4711, "10.0.4.1:5000", peer)
    assert world.refusals(a) == [Reason.NOT_FOUND]


def test_no_other_port_of_a_vip(world: World) -> None:
    """A VIP leads to the same port of its tasks, and to no other."""
    a, b = world.process(1), world.process(2)
    world.translate(1, "10.0.4.1:5000", f"{VIP}:80", "10.0.4.2:81")
    world.open_and_ask(a, "10.0.4.1:5000", f"{VIP}:80")
    world.open_and_ask(b, "10.0.4.2:81", "10.0.4.1:5000")
    assert not world.grants(a)


REFUSED = [
    ("10.0.4.1:5000", "10.0.4.66:80", Reason.REMOTE),
    ("10.0.4.1:5000", "8.8.8.8:80", Reason.FOREIGN),
    ("127.0.0.1:5000", "127.0.0.1:80", Reason.FOREIGN),
    ("10.0.4.2:5000", "10.0.4.1:80", Reason.FOREIGN),
    ("10.0.5.1:5000", "10.0.4.2:80", Reason.FOREIGN),
]


@pytest.mark.parametrize(("local", "remote", "reason"), REFUSED)
def test_refused(world: World, local: str, remote: str, reason: Reason) -> None:
    """A request is refused with a reason if its other end can't be in a container of the same
    network on this host.
    """
    process = world.process(1)
    world.open_and_ask(process, local, remote)
    assert world.refusals(process) == [reason]
    assert not world.pairing.processes[process].waiting


def passes(world: World, process: int) -> list[tuple[int, bool]]:
    """The refusals of a process, and whether it is told that the reason may be gone later."""
    return [(refuse.reason, refuse.passes) for refuse, _ in world.heard(process, wire.Refuse)]


def test_refusals_that_pass() -> None:
    """A process is told which reasons may be gone later, and which hold for good."""
    world = World(Limits(waiting=1))
    a = world.process(1)
    world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    world.open_and_ask(a, "10.0.4.1:5001", "10.0.4.2:80")
    world.open_and_ask(a, "10.0.4.1:5002", "10.0.4.66:80")
    world.open_and_ask(a, "10.0.4.1:5003", "8.8.8.8:80")
    assert passes(world, a) == [
        (Reason.LIMIT, True),
        (Reason.REMOTE, True),
        (Reason.FOREIGN, False),
    ]


def test_a_note_that_repeats_the_refusal(world: World) -> None:
    """A library that notes what it was told does not replace what the router knows better."""
    a = world.process(1)
    cookie = world.open_and_ask(a, "10.0.4.1:5000", f"{VIP}:80")
    notes = world.pairing.containers[1].notes
    assert notes[cookie][0] == Reason.UNTRACKED
    world.pairing.note(a, wire.Note(Reason.REMOTE, cookie))
    assert notes[cookie][0] == Reason.UNTRACKED
    world.pairing.note(a, wire.Note(Reason.OPTION, cookie))
    assert notes[cookie][0] == Reason.OPTION


def test_refused_when_off(world: World) -> None:
    """On a network without acceleration every request is refused, also those that wait."""
    a = world.process(1)
    world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    world.pairing.replace_snapshot(knowledge(off=True))
    world.open_and_ask(a, "10.0.4.1:5001", "10.0.4.2:80")
    assert world.refusals(a) == [Reason.OFF, Reason.OFF]
    assert world.pairing.counts.refused[Reason.OFF] == 2


def test_nobody_asks_for_another(world: World) -> None:
    """The kernel must know the very socket in the process's own container."""
    a, b = world.process(1), world.process(2)
    cookie = world.socket(1, "10.0.4.1:5000", "10.0.4.2:80")
    world.ask(a, cookie + 1, "10.0.4.1:5000", "10.0.4.2:80")
    world.ask(a, cookie, "10.0.4.1:5001", "10.0.4.2:80")
    # The other end's container doesn't have it either.
    world.ask(b, cookie, "10.0.4.2:80", "10.0.4.1:5000")
    assert world.refusals(a) == [Reason.NOT_FOUND, Reason.NOT_FOUND]
    assert world.refusals(b) == [Reason.NOT_FOUND]


def test_networks_are_apart(world: World) -> None:
    """The same addresses on another network are different addresses."""
    facts = RouterSnapshot(
        endpoints=tuple(
            EndpointFact(id=f"{n}{i}", network=n, addresses=(f"10.0.4.{i}",), namespace=space)
            for n, i, space in (("a", 1, 11), ("a", 2, 12), ("b", 1, 21), ("b", 2, 22))
        ),
        networks=tuple(NetworkFact(id=n, subnets=("10.0.4.0/24",)) for n in "ab"),
    )
    world.pairing.replace_snapshot(Knowledge(facts))
    a, b = world.process(11), world.process(22)
    world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    world.open_and_ask(b, "10.0.4.2:80", "10.0.4.1:5000")
    assert not world.grants(a)
    c = world.process(12)
    world.open_and_ask(c, "10.0.4.2:80", "10.0.4.1:5000")
    assert len(world.grants(a)) == len(world.grants(c)) == 1


def test_asking_twice(world: World) -> None:
    """A second request of a socket replaces the first if that waits, and is refused if the socket
    has a slot.
    """
    a, b = world.process(1), world.process(2)
    cookie = world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    world.ask(a, cookie, "10.0.4.1:5000", "10.0.4.2:80")
    assert len(world.pairing.processes[a].waiting) == 1
    world.open_and_ask(b, "10.0.4.2:80", "10.0.4.1:5000")
    assert len(world.grants(a)) == 1
    world.ask(a, cookie, "10.0.4.1:5000", "10.0.4.2:80")
    assert world.refusals(a) == [Reason.SHARED]


def test_ports_are_used_again(world: World) -> None:
    """A request of a closed socket does not block the next request with its addresses."""
    a, b = world.process(1), world.process(2)
    world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    second = world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    world.open_and_ask(b, "10.0.4.2:80", "10.0.4.1:5000")
    (grant,) = world.grants(a)
    assert grant.cookie == second


def test_an_ask_ends_with_its_process(world: World) -> None:
    """A request is not granted after its process has ended."""
    a, b = world.process(1), world.process(2)
    world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    world.pairing.gone(a)
    world.open_and_ask(b, "10.0.4.2:80", "10.0.4.1:5000")
    assert not world.grants(b)


def test_an_ask_ends_with_a_note(world: World) -> None:
    """A request is not granted after its process has noted that the connection stays on TCP."""
    a, b = world.process(1), world.process(2)
    cookie = world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    world.pairing.note(a, wire.Note(Reason.OPTION, cookie))
    world.open_and_ask(b, "10.0.4.2:80", "10.0.4.1:5000")
    assert not world.grants(a)
    assert world.pairing.containers[1].notes[cookie][0] == Reason.OPTION
    with pytest.raises(WrongMessage):
        world.pairing.note(a, wire.Note(Reason.SHORT, cookie))


def test_an_ask_ends_with_its_socket(world: World) -> None:
    """A request whose socket was closed without a note is removed after a while; one whose socket
    is open stays.
    """
    a = world.process(1)
    world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    world.open_and_ask(a, "10.0.4.1:5001", "10.0.4.2:80")
    del world.kernel.sockets[1, at("10.0.4.1:5000"), at("10.0.4.2:80")]
    world.pairing.sweep(10)
    assert len(world.pairing.processes[a].waiting) == 2
    world.now += REQUEST_AGE + 1
    world.pairing.sweep(10)
    (left,) = world.pairing.processes[a].waiting.values()
    assert left.message.local.port == 5001


# --- slots


def test_a_slot_is_free_when_both_have_released(world: World) -> None:
    """A slot is used again, with another incarnation, after both sides' RELEASE and not before."""
    a, b, one, other = the_pair(world)
    world.connect(a, b, 5001)
    world.release(a, one)
    world.connect(a, b, 5002)
    assert len({grant.slot for grant in world.grants(a)}) == 3
    world.release(b, other)
    assert world.memory.reclaimed == [(1000, one.slot)]
    world.connect(a, b, 5003)
    again = world.grants(a)[-1]
    assert (again.arena, again.slot) == (one.arena, one.slot)
    assert again.incarnation not in {each.incarnation for each in world.grants(a)[:-1]}


def test_an_arena_without_connections_is_not_used_again(world: World) -> None:
    """A side that has released its last slot has unmapped the arena, so the next connection gets
    another arena.
    """
    a, b, one, other = the_pair(world)
    world.release(a, one)
    world.connect(a, b, 5001)
    assert world.grants(a)[-1].arena != one.arena
    assert world.memory.arenas == {1000, 1001}
    world.release(b, other)
    assert world.memory.arenas == {1001}


def test_nobody_releases_for_another(world: World) -> None:
    """RELEASE needs the side's token and container; one for an old incarnation or an unknown arena
    is ignored.
    """
    a, b, one, _ = the_pair(world)
    outsider = world.process(3)
    for process, token in ((a, 1), (b, one.token), (outsider, one.token)):
        with pytest.raises(WrongMessage, match="token"):
            world.pairing.release(
                process, wire.Release(one.slot, one.arena, one.incarnation, token)
            )
    for slot, arena, incarnation in ((one.slot, one.arena, 99), (5, one.arena, 1), (0, 99, 1)):
        world.pairing.release(a, wire.Release(slot, arena, incarnation, one.token))
    assert len(world.pairing.containers[1].ends) == 1


def test_releasing_twice(world: World) -> None:
    """A side's second RELEASE does not count for the other side."""
    a, _, one, _ = the_pair(world)
    world.release(a, one)
    world.release(a, one)
    assert not world.memory.reclaimed


def test_death_of_one_process(world: World) -> None:
    """A process's end releases its side; the arena stays until the other side has released it."""
    a, b, _, other = the_pair(world)
    world.pairing.gone(a)
    assert world.memory.arenas == {1000}
    world.release(b, other)
    assert not world.memory.arenas
    world.pairing.gone(b)
    assert not world.pairing.containers


def test_death_of_both_processes(world: World) -> None:
    """When both processes have ended nothing is left."""
    a, b, *_ = the_pair(world)
    world.pairing.weigh()
    world.pairing.gone(b)
    world.pairing.gone(a)
    assert not world.memory.arenas
    assert not world.pairing.arenas
    assert not world.pairing.containers


def test_a_child_speaks_for_its_parent(world: World) -> None:
    """A process of the same container that shows the side's token keeps the side alive after its
    parent, and can release.
    """
    a, b, one, other = the_pair(world)
    child = world.process(1)
    world.pairing.fetch(child, wire.Fetch(0, one.arena, one.token, other.side))
    world.pairing.gone(a)
    world.release(b, other)
    assert world.memory.arenas == {1000}
    world.release(child, one)
    # Nobody can ask for a slot of it any more: its pair is incomplete.
    world.pairing.gone(child)
    assert not world.memory.arenas
    world.connect(world.process(1), b, 5009)
    assert world.grants(b)[-1].arena != one.arena


def test_a_slot_that_both_have_forgotten(world: World) -> None:
    """A slot is freed when two checks in a row find neither of its sockets, whatever its processes
    say.
    """
    a, b, *_ = the_pair(world)
    sockets = dict(world.kernel.sockets)
    for there in (False, True, False):
        world.kernel.sockets = sockets if there else {}
        world.now += SLOT_AGE * 8
        world.pairing.sweep(10)
        assert not world.memory.reclaimed
    world.now += SLOT_AGE * 16
    world.pairing.sweep(10)
    assert world.memory.reclaimed == [(1000, 0)]
    assert not world.pairing.containers[1].ends
    assert {a, b} <= world.pairing.processes.keys()


def test_looks_become_rare(world: World) -> None:
    """A connection that waits for long is checked less and less often."""
    looks: list[int] = []
    agenda: Agenda[int] = Agenda(first=5, most=40)
    agenda.add(1, now=0)
    for now in range(200):
        agenda.check(now, 10, lambda _, at=now: looks.append(at) or True)  # type: ignore[misc, func-returns-value]
    assert looks == [5, 15, 35, 75, 115, 155, 195]
    agenda.check(300, 10, lambda _: False)
    assert len(agenda) == 0


def test_not_all_at_once(world: World) -> None:
    """One call checks a limited number of items, however many are due."""
    agenda: Agenda[int] = Agenda(first=5, most=40)
    for number in range(10):
        agenda.add(number, now=0)
    agenda.check(6, 3, lambda _: False)
    assert len(agenda) == 7


def test_no_memory(world: World) -> None:
    """Without memory for an arena both ends are refused."""
    world.memory.refuses = True
    a, b = world.process(1), world.process(2)
    world.connect(a, b, 5000)
    assert world.refusals(a) == world.refusals(b) == [Reason.MEMORY]


def test_an_answer_that_cannot_be_sent(world: World) -> None:
    """After the end of a process that took no answers nothing is left."""
    a, b = world.process(1), world.process(2)
    world.post.full.add(b)
    world.connect(a, b, 5000)
    world.pairing.gone(b)
    world.pairing.gone(a)
    assert not world.memory.arenas


# --- bells


def ring(world: World, process: int) -> list[tuple[int, int | None]]:
    return [(each.index, descriptor) for each, descriptor in world.heard(process, wire.Ring)]


def hear(world: World, process: int) -> list[tuple[int, int | None]]:
    return [(each.index, descriptor) for each, descriptor in world.heard(process, wire.Hear)]


def test_bell_0(world: World) -> None:
    """The first grant of an arena brings bell 0 of either side; a ringing end is handed out only
    after the router has closed its hearing end.
    """
    a, b, one, other = the_pair(world)
    (first,), (second,) = ring(world, a), ring(world, b)
    assert {first[1], second[1]} == world.memory.bells
    assert {-each for each in world.memory.bells} == world.memory.handed
    for process in (a, b):
        kinds = [type(message) for message, _ in world.post.sent[process]]
        assert kinds.index(wire.Grant) < kinds.index(wire.Ring)
    assert one.arena == other.arena


def test_bells(world: World) -> None:
    """A side gets a bell on request. The other side has it rung and gets it, on every request; it
    is closed with the arena.
    """
    a, b, one, other = the_pair(world)
    world.pairing.bell(a, wire.Bell(3, one.arena, one.token, one.side))
    ((index, hears),) = hear(world, a)
    assert index == 3
    assert hears is not None
    assert hears in world.memory.handed
    fetch = wire.Fetch(3, other.arena, other.token, one.side)
    world.pairing.fetch(b, fetch)
    world.pairing.fetch(b, fetch)
    assert ring(world, b)[1:] == [(3, -hears)] * 2
    assert world.memory.rung == [-hears] * 2
    world.pairing.gone(a)
    world.pairing.gone(b)
    assert not world.memory.bells


def test_an_unknown_bell(world: World) -> None:
    """A request for an unknown bell, or for a bell of an unknown arena, is answered at once."""
    a, b, _, other = the_pair(world)
    world.pairing.fetch(b, wire.Fetch(3, other.arena, other.token, 1 - other.side))
    world.pairing.fetch(b, wire.Fetch(4, 99, 1, 0))
    assert ring(world, b)[1:] == [(3, None), (4, None)]
    world.pairing.bell(a, wire.Bell(5, 99, 1, 0))
    assert hear(world, a) == [(5, None)]


def test_a_bell_is_replaced(world: World) -> None:
    """A side may request a bell with the same index again; the old one is closed."""
    a, _, one, _ = the_pair(world)
    before = set(world.memory.bells)
    for _ in range(2):
        world.pairing.bell(a, wire.Bell(3, one.arena, one.token, one.side))
    (_, first), (_, second) = hear(world, a)
    assert first is not None
    assert second is not None
    assert world.memory.bells == before | {-second}
    assert world.pairing.containers[1].bells == 2


def test_nobody_rings_for_another(world: World) -> None:
    """BELL and FETCH need the side's token, the right side, and a valid index."""
    a, b, one, other = the_pair(world)
    heard = len(world.heard(b, wire.Ring))
    wrong: list[tuple[int, wire.Bell]] = [
        (a, wire.Bell(layout.BELLS, one.arena, one.token, one.side)),
        (a, wire.Bell(0, one.arena, one.token, other.side)),
        (a, wire.Bell(0, one.arena, other.token, other.side)),
        (world.process(3), wire.Bell(0, one.arena, one.token, one.side)),
    ]
    for process, bell in wrong:
        with pytest.raises(WrongMessage):
            world.pairing.bell(process, bell)
    for fetch in (
        wire.Fetch(layout.BELLS, one.arena, one.token, other.side),
        wire.Fetch(0, one.arena, one.token, one.side),
        wire.Fetch(0, one.arena, one.token, 7),
        wire.Fetch(0, one.arena, other.token, one.side),
    ):
        with pytest.raises(WrongMessage):
            world.pairing.fetch(a, fetch)
    assert len(world.heard(b, wire.Ring)) == heard


# --- limits


def test_limit_of_connections() -> None:
    """Connections of a container at its limit stay on TCP; other containers are not affected."""
    world = World(Limits(connections=1))
    a, b, c = world.process(1), world.process(2), world.process(3)
    world.connect(a, b, 5000)
    world.connect(a, c, 5001)
    assert world.refusals(a) == [Reason.LIMIT]
    world.release(a, world.grants(a)[0])
    world.connect(a, c, 5002)
    assert len(world.grants(c)) == 1


def test_limit_that_is_reached_while_waiting() -> None:
    """If one end's container has reached its limit meanwhile, both ends are refused."""
    world = World(Limits(connections=1))
    a, b, c = world.process(1), world.process(2), world.process(3)
    world.open_and_ask(a, "10.0.4.1:5001", "10.0.4.3:80")
    world.connect(a, b, 5000)
    world.open_and_ask(c, "10.0.4.3:80", "10.0.4.1:5001")
    assert world.refusals(a) == world.refusals(c) == [Reason.LIMIT]
    assert not world.pairing.processes[a].waiting


def test_limit_of_waiting_asks() -> None:
    """A limited number of requests may wait."""
    world = World(Limits(waiting=2))
    a = world.process(1)
    for port in (5000, 5001, 5002):
        world.open_and_ask(a, f"10.0.4.1:{port}", "10.0.4.2:80")
    assert world.refusals(a) == [Reason.LIMIT]


def test_limit_of_memory() -> None:
    """Shared memory that is in use counts for both containers until it is freed."""
    world = World(Limits(memory=20_000))
    a, b, c, d = (world.process(each) for each in (1, 2, 3, 4))
    world.connect(a, b, 5000)
    world.connect(a, d, 5001)
    world.memory.weight = 10_000
    world.pairing.weigh()
    assert [world.pairing.containers[n].holds(20_000) for n in (1, 2, 4)] == [
        20_000,
        10_000,
        10_000,
    ]
    world.connect(a, c, 5002)
    # Both ends are told.
    assert world.refusals(a) == world.refusals(c) == [Reason.LIMIT]
    world.pairing.gone(b)
    world.pairing.gone(d)
    for grant in world.grants(a):
        world.release(a, grant)
    assert world.pairing.containers[1].holds(20_000) == 0
    world.connect(a, c, 5003)
    assert len(world.grants(c)) == 1


def test_share_of_memory() -> None:
    """What two containers share counts up to half of the limit for others; at that limit the two
    share no more.
    """
    world = World(Limits(memory=20_000))
    a, b, c = (world.process(each) for each in (1, 2, 3))
    world.connect(a, b, 5000)
    world.memory.weight = 10_000_000
    world.pairing.weigh()
    world.connect(a, b, 5001)
    assert world.refusals(a) == world.refusals(b) == [Reason.LIMIT]
    world.memory.weight = 4096
    world.connect(a, c, 5002)
    assert len(world.grants(c)) == 1


def test_memory_of_slots_in_use() -> None:
    """Memory that a process touches in unused slots isn't charged to the other side."""
    world = World()
    a, b = world.process(1), world.process(2)
    world.connect(a, b, 5000)
    world.memory.weight = layout.ARENA_SIZE
    world.pairing.weigh()
    most = layout.BULK_OFFSET + 2 * layout.RING_SIZE
    assert [world.pairing.containers[n].holds(1 << 30) for n in (1, 2)] == [most, most]


def test_agendas_are_bounded() -> None:
    """A process that requests one connection again and again, or opens and releases, leaves nothing
    behind.
    """
    world = World(Limits(asks=1 << 20))
    a, b = world.process(1), world.process(2)
    for _ in range(1000):
        world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    assert world.pairing.requests.checks < 100
    for _ in range(300):
        world.connect(a, b, 5001)
        world.release(a, world.grants(a)[-1])
        world.release(b, world.grants(b)[-1])
    assert world.pairing.arena_table.checks < 100


def test_limit_of_asks_per_second() -> None:
    """Too many requests at once are refused; after a while more are accepted."""
    world = World(Limits(asks=3))
    a = world.process(1)
    for port in range(5000, 5005):
        world.open_and_ask(a, f"10.0.4.1:{port}", "10.0.4.2:80")
    assert world.refusals(a) == [Reason.LIMIT] * 2
    world.now += 1
    world.open_and_ask(a, "10.0.4.1:5009", "10.0.4.2:80")
    assert len(world.refusals(a)) == 2


def test_limit_of_processes() -> None:
    """A full container's next process is refused; another container's is accepted."""
    world = World(Limits(processes=1))
    first = world.process(1)
    assert not world.pairing.connected(100, 1, 1)
    assert world.pairing.connected(101, 2, 1)
    world.pairing.gone(first)
    assert world.pairing.connected(102, 1, 1)


def test_limit_of_bells() -> None:
    """A bell over the limit is not made, and the process is told; connections work without it."""
    world = World(Limits(bells=2))
    a, _, one, _ = the_pair(world)
    world.pairing.bell(a, wire.Bell(1, one.arena, one.token, one.side))
    world.pairing.bell(a, wire.Bell(2, one.arena, one.token, one.side))
    (made, none) = hear(world, a)
    assert made[1] is not None
    assert none == (2, None)
    world = World(Limits(bells=0))
    a, _, one, _ = the_pair(world)
    assert not world.memory.bells


def test_notes_are_bounded(world: World) -> None:
    """If a container sends notes without end, the router forgets the oldest ones of that
    container.
    """
    a = world.process(1)
    for cookie in range(NOTES + 10):
        world.pairing.note(a, wire.Note(Reason.OPTION, cookie))
    notes = world.pairing.containers[1].notes
    assert len(notes) == NOTES
    assert 0 not in notes
    assert NOTES + 9 in notes


def test_encrypted_network_is_known() -> None:
    """With an encrypted network that another host shares, its hosts are named and the relay
    encrypts everything; without, the setting decides.
    """
    settings = RouterSettings(relay_encryption="off")
    plain = NetworkFact(id="a", peers=("192.0.2.1",))
    secret = NetworkFact(id="b", peers=("192.0.2.2",), encrypted=True)
    alone = NetworkFact(id="c", encrypted=True)
    for networks, peers, encryption in (
        ((plain,), set(), "off"),
        ((plain, alone), set(), "off"),
        ((plain, secret), {ip_address("192.0.2.2")}, "all"),
    ):
        known = Knowledge(RouterSnapshot(networks=networks, settings=settings))
        assert known.encrypted_peers == peers
        assert known.relay_encryption == encryption
