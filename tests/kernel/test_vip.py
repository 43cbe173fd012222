"""VIP rules in real namespaces."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from driver.balance import favourite
from driver.kernel import nft
from driver.kernel.namespace import in_netns
from driver.model import Choice, VipTable
from driver.vip import NftBalancer
from testbed.patience import patience, within
from tests.kernel.vip_hosts import PORT, VIP, Container, World, address, ask, world

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")

TASKS = 3


@pytest.fixture
def three() -> Iterator[World]:
    with world(TASKS) as made:
        yield made


@pytest.fixture
def balancer() -> NftBalancer:
    return NftBalancer()


def _streams(client: Container, count: int, vip: IPv4Address = VIP) -> Counter[str]:
    answers: Counter[str] = Counter()
    for _ in range(count):
        with client.connect(vip) as connection:
            answers[ask(connection)] += 1
    return answers


def _datagrams(client: Container, count: int, vip: IPv4Address = VIP) -> Counter[str]:
    answers: Counter[str] = Counter()
    for _ in range(count):
        with client.udp(vip) as datagrams:
            answers[ask(datagrams)] += 1
    return answers


def _even(world_: World, each: int) -> dict[str, int]:
    return {str(task.address): each for task in world_.tasks}


def test_tcp_connections_are_spread_evenly(three: World, balancer: NftBalancer) -> None:
    """Thirty connections to a VIP of three tasks are ten for each."""
    assert balancer.apply(three.client.path, {VIP: three.addresses})
    assert _streams(three.client, 30) == _even(three, 10)


def test_udp_flows_are_spread_evenly(three: World, balancer: NftBalancer) -> None:
    """Thirty UDP flows to a VIP of three tasks are ten for each, answered from the VIP."""
    assert balancer.apply(three.client.path, {VIP: three.addresses})
    assert _datagrams(three.client, 30) == _even(three, 10)


def test_pings_are_spread_evenly(three: World, balancer: NftBalancer) -> None:
    """A VIP answers pings, and each task answers its share of them."""
    assert balancer.apply(three.client.path, {VIP: three.addresses})
    assert all(three.client.ping(VIP, identifier) for identifier in range(1, 10))
    assert [task.pings_answered() for task in three.tasks] == [3, 3, 3]


def test_scaling_up_and_down(three: World, balancer: NftBalancer) -> None:
    """New connections go to exactly the tasks of the last table, whatever the one before was."""
    path = three.client.path
    for members in ((0,), (0, 1, 2), (1, 2), (2,), (0, 1)):
        chosen = tuple(three.addresses[number] for number in members)
        assert balancer.apply(path, {VIP: chosen})
        answers = _streams(three.client, 6)
        assert answers == {str(task): 6 // len(chosen) for task in chosen}


def test_established_connection_keeps_its_task(three: World, balancer: NftBalancer) -> None:
    """A connection keeps its task after the task has left the table, and after the table is
    gone."""
    path = three.client.path
    balancer.apply(path, {VIP: three.addresses[:1]})
    with three.client.connect(VIP) as connection:
        assert ask(connection) == str(three.addresses[0])
        balancer.apply(path, {VIP: three.addresses[1:]})
        assert ask(connection) == str(three.addresses[0])
        balancer.apply(path, {VIP: ()})
        assert ask(connection) == str(three.addresses[0])


def test_udp_flow_leaves_a_departed_task(three: World, balancer: NftBalancer) -> None:
    """A UDP socket that keeps sending reaches another task once its own has left; others' flows
    stay."""
    path = three.client.path
    balancer.apply(path, {VIP: three.addresses})
    flows = [three.client.udp(VIP) for _ in range(3)]
    before = [ask(flow) for flow in flows]
    assert sorted(before) == sorted(map(str, three.addresses))
    balancer.apply(path, {VIP: three.addresses[1:]})
    after = [ask(flow) for flow in flows]
    left = str(three.addresses[0])
    assert left not in after
    assert [a for a, b in zip(after, before, strict=True) if b != left] == [
        b for b in before if b != left
    ]
    for flow in flows:
        flow.close()


def test_udp_flow_leaves_a_departed_task_after_a_restart(three: World) -> None:
    """The same holds for rules of a plugin process that has been restarted since."""
    path = three.client.path
    NftBalancer().apply(path, {VIP: three.addresses[:1]})
    with three.client.udp(VIP) as flow:
        assert ask(flow) == str(three.addresses[0])
        again = NftBalancer()
        again.apply(path, {VIP: three.addresses[:2]})
        assert ask(flow) == str(three.addresses[0])
        again.apply(path, {VIP: three.addresses[1:2]})
        assert ask(flow) == str(three.addresses[1])
    with three.client.udp(VIP) as flow:
        assert ask(flow) == str(three.addresses[1])
        NftBalancer().apply(path, {VIP: three.addresses[:1]})
        assert ask(flow) == str(three.addresses[0])


def test_flow_begun_before_the_rules(three: World, balancer: NftBalancer) -> None:
    """A UDP socket that sent to a VIP before it had rules reaches a task afterwards."""
    path = three.client.path
    other = IPv4Address(f"{VIP}") + 1
    balancer.apply(path, {other: three.addresses})
    with three.client.udp(VIP, timeout=0.3) as flow:
        flow.send(b"?")
        with pytest.raises(TimeoutError):
            flow.recv(15)
        balancer.apply(path, {other: three.addresses, VIP: three.addresses[:1]})
        assert ask(flow) == str(three.addresses[0])


def test_connect_begun_before_the_rules(three: World, balancer: NftBalancer) -> None:
    """A connection attempt that is in progress when the VIP gets its rules succeeds."""
    path = three.client.path
    other = IPv4Address(f"{VIP}") + 1
    balancer.apply(path, {other: three.addresses})

    def begin() -> socket.socket:
        stream = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        stream.setblocking(False)
        stream.connect_ex((str(VIP), PORT))
        return stream

    with in_netns(path, begin) as stream:
        time.sleep(0.2)
        balancer.apply(path, {other: three.addresses, VIP: three.addresses[:1]})
        stream.settimeout(patience(5))
        deadline = time.monotonic() + patience(5)
        while (error := stream.connect_ex((str(VIP), PORT))) and time.monotonic() < deadline:
            if error == 106:  # EISCONN
                break
            time.sleep(0.05)
        assert ask(stream) == str(three.addresses[0])


@pytest.mark.parametrize("strict", [False, True], ids=["rp_filter=0", "rp_filter=1"])
def test_vip_without_tasks_refuses(three: World, balancer: NftBalancer, strict: bool) -> None:
    """Without tasks TCP and UDP are refused at once, and ping gets no reply."""

    three.client.run("sysctl", "-qw", f"net.ipv4.conf.all.rp_filter={int(strict)}")
    balancer.apply(three.client.path, {VIP: ()})
    started = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        three.client.connect(VIP)
    with three.client.udp(VIP) as datagrams:
        datagrams.send(b"?")
        with pytest.raises(ConnectionRefusedError):
            datagrams.recv(15)
    assert time.monotonic() - started < within(0.5)
    assert not three.client.ping(VIP, 7, timeout=0.3)
    balancer.apply(three.client.path, {VIP: three.addresses})
    assert _streams(three.client, 3) == _even(three, 1)


def test_refusal_spares_connections_from_that_address(three: World, balancer: NftBalancer) -> None:
    """A container whose address another container has as a refused VIP can still connect to it."""
    server = three.tasks[0]
    balancer.apply(server.path, {three.client.address: ()})
    with three.client.connect(server.address) as connection:
        assert ask(connection) == str(server.address)


def test_task_reaches_its_own_vip(three: World, balancer: NftBalancer) -> None:
    """A task that connects to its own service also reaches itself in turn, by TCP, UDP and ping."""
    task = three.tasks[0]
    assert balancer.apply(task.path, {VIP: three.addresses})
    assert _streams(task, 9) == _even(three, 3)
    assert _datagrams(task, 9) == _even(three, 3)
    assert balancer.apply(task.path, {VIP: (task.address,)})
    assert _streams(task, 3) == {str(task.address): 3}
    assert task.ping(VIP, 5)


def test_forwarded_packets_are_balanced(three: World, balancer: NftBalancer) -> None:
    """A container that routes for another (Docker in Docker) balances and refuses its
    connections."""
    inner, router = three.tasks[2], three.client
    router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    # Answers must come back the way they went: the router hides the inner one.
    nft.run(
        "add table ip hide\n"
        "add chain ip hide post { type nat hook postrouting priority 100; }\n"
        f"add rule ip hide post ip saddr {inner.address} masquerade\n",
        router.path,
    )
    vip = IPv4Address("10.88.0.1")
    router.run("ip", "addr", "add", "10.88.0.254/24", "dev", "eth0")
    inner.run("ip", "route", "add", "10.88.0.0/24", "via", str(router.address))
    balancer.apply(router.path, {vip: three.addresses[:2]})
    assert _streams(inner, 4, vip) == {str(task): 2 for task in three.addresses[:2]}
    balancer.apply(router.path, {vip: ()})
    with pytest.raises(ConnectionRefusedError):
        inner.connect(vip)


def _iptables() -> list[str]:
    return [name for name in ("iptables-legacy", "iptables-nft") if shutil.which(name)]


@pytest.mark.parametrize("order", ["dns first", "vip first"])
@pytest.mark.parametrize("tool", ["iptables-legacy", "iptables-nft"])
def test_dns_rules_of_docker_live_beside(
    three: World, balancer: NftBalancer, tool: str, order: str
) -> None:
    """Docker's redirection of 127.0.0.11:53 and the VIP rules work together, in any order."""
    if tool not in _iptables():
        pytest.skip(f"{tool} is not installed")
    client = three.client

    def listen() -> socket.socket:
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("127.0.0.11", 0))
        return server

    server = in_netns(client.path, listen)
    client.sockets.append(server)
    port = server.getsockname()[1]

    def docker_rules() -> None:
        for rule in (
            "-N DOCKER_OUTPUT",
            "-N DOCKER_POSTROUTING",
            "-I OUTPUT -d 127.0.0.11 -j DOCKER_OUTPUT",
            f"-A DOCKER_OUTPUT -d 127.0.0.11 -p udp --dport 53 -j DNAT --to-destination 127.0.0.11:{port}",
            "-I POSTROUTING -d 127.0.0.11 -j DOCKER_POSTROUTING",
            f"-A DOCKER_POSTROUTING -s 127.0.0.11 -p udp --sport {port} -j SNAT --to-source :53",
        ):
            client.run(tool, "--wait", "-t", "nat", *rule.split())

    def vip_rules() -> None:
        balancer.apply(client.path, {VIP: three.addresses})

    steps = [docker_rules, vip_rules]
    for step in steps if order == "dns first" else reversed(steps):
        step()

    def question() -> socket.socket:
        asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        asker.settimeout(patience(1))
        asker.connect(("127.0.0.11", 53))
        return asker

    tables: list[VipTable] = [{VIP: three.addresses}, {VIP: three.addresses[:1]}, {VIP: ()}, {}]
    for table in tables:
        balancer.apply(client.path, table)
        with in_netns(client.path, question) as asker:
            asker.send(b"who?")
            message, peer = server.recvfrom(64)
            server.sendto(message.upper(), peer)
            assert asker.recv(64) == b"WHO?"
        if table.get(VIP):
            assert set(_streams(client, 3)) == {str(task) for task in table[VIP]}


def test_unchanged_table_is_not_written_again(three: World, balancer: NftBalancer) -> None:
    """An unchanged table isn't written again: a rule added beside ours survives."""
    path = three.client.path
    balancer.apply(path, {VIP: three.addresses})
    nft.run("add chain ip freeflow witness\n", path)
    assert balancer.apply(path, {VIP: three.addresses})
    assert any(
        item.get("chain", {}).get("name") == "witness"
        for item in nft.query("list table ip freeflow", path)
    )


def test_flushed_rules_come_back_with_the_next_change(three: World, balancer: NftBalancer) -> None:
    """When the container has flushed all rules, the next change restores them."""
    path = three.client.path
    balancer.apply(path, {VIP: three.addresses[:1]})
    nft.run("flush ruleset\n", path)
    assert balancer.apply(path, {VIP: three.addresses[1:2]})
    assert _streams(three.client, 2) == {str(three.addresses[1]): 2}


def test_new_namespace_under_the_old_path(balancer: NftBalancer) -> None:
    """A new namespace under the same path isn't taken for the old one."""
    with world(1) as first:
        path = first.client.path
        assert balancer.apply(path, {VIP: first.addresses})
    assert not balancer.apply(path, {VIP: first.addresses})
    with world(1) as second:
        assert second.client.path == path
        assert balancer.apply(path, {VIP: second.addresses})
        assert _streams(second.client, 1) == {str(second.addresses[0]): 1}


def test_namespace_not_there_yet(balancer: NftBalancer, tmp_path: Path) -> None:
    """A path without a namespace, or with a file on which Docker will mount one, is "not yet"."""
    assert not balancer.apply(tmp_path / "missing", {VIP: ()})
    (tmp_path / "file").touch()
    assert not balancer.apply(tmp_path / "file", {VIP: ()})


def test_empty_table_removes_everything(three: World, balancer: NftBalancer) -> None:
    """Our table goes with the last VIP, also if an earlier plugin process made it."""
    path = three.client.path
    for remover in (balancer, NftBalancer()):
        balancer.apply(path, {VIP: three.addresses})
        assert remover.apply(path, {})
        assert not nft.query("list tables ip", path)
        balancer.forget(())


def test_thousand_vips(three: World, balancer: NftBalancer) -> None:
    """A thousand VIPs of three tasks are written within seconds, and a change of one costs much
    less."""
    table = {
        IPv4Address("10.200.0.0") + number: three.addresses if number % 10 else ()
        for number in range(1, 1001)
    }
    started = time.monotonic()
    assert balancer.apply(three.client.path, {**table, VIP: three.addresses})
    whole = time.monotonic() - started
    started = time.monotonic()
    assert balancer.apply(three.client.path, {**table, VIP: three.addresses[:2]})
    change = time.monotonic() - started
    print(f"1000 VIPs {whole * 1000:.0f} ms, one of them changed {change * 1000:.0f} ms")
    assert whole < within(5)
    assert change < within(1)
    assert _streams(three.client, 4) == {str(address(0)): 2, str(address(1)): 2}


# --- balance


def _local(world_: World, *numbers: int) -> dict[IPv4Address, Choice]:
    """These tasks are on the client's host."""
    return {VIP: Choice(local=frozenset(world_.addresses[number] for number in numbers))}


def test_local_tasks_get_the_connections(three: World, balancer: NftBalancer) -> None:
    """New connections, UDP flows and pings go to local tasks while there are any, else to all: when
    they are there, are lost, and come back."""
    path, client = three.client.path, three.client
    first = {str(three.addresses[0]): 6}
    assert balancer.apply(path, {VIP: three.addresses}, _local(three, 0))
    assert balancer.leads(path) == {VIP: three.addresses[:1]}
    assert _streams(client, 6) == first
    assert _datagrams(client, 6) == first
    assert all(client.ping(VIP, identifier) for identifier in range(1, 4))
    assert [task.pings_answered() for task in three.tasks] == [3, 0, 0]
    assert balancer.apply(path, {VIP: three.addresses[1:]}, _local(three))
    assert _streams(client, 6) == {str(task): 3 for task in three.addresses[1:]}
    assert balancer.apply(path, {VIP: three.addresses}, _local(three))
    assert _streams(client, 6) == _even(three, 2)
    assert balancer.apply(path, {VIP: three.addresses}, _local(three, 0))
    assert _streams(client, 6) == first
    assert balancer.apply(path, {VIP: three.addresses})
    assert _streams(client, 6) == _even(three, 2)


def test_flows_to_other_hosts_stay(three: World, balancer: NftBalancer) -> None:
    """Connections and UDP flows to a task elsewhere stay when a local one comes; the flows move
    when their task leaves."""
    path, client = three.client.path, three.client
    near, far = str(three.addresses[0]), str(three.addresses[1])
    balancer.apply(path, {VIP: three.addresses[1:2]}, _local(three))
    with client.connect(VIP) as stream, client.udp(VIP) as flow:
        assert (ask(stream), ask(flow)) == (far, far)
        balancer.apply(path, {VIP: three.addresses[:2]}, _local(three, 0))
        assert _streams(client, 2) == {near: 2}
        assert (ask(stream), ask(flow)) == (far, far)
        balancer.apply(path, {VIP: three.addresses[:1]}, _local(three, 0))
        assert (ask(stream), ask(flow)) == (far, near)


def test_a_client_keeps_its_task(three: World, balancer: NftBalancer) -> None:
    """A client's connections and flows all go to one task, while others come and go, and after a
    restart of the plugin; when its task has left, all go to another."""
    path, client = three.client.path, three.client
    choice = {VIP: Choice(client=client.address)}
    balancer.apply(path, {VIP: three.addresses[1:]}, choice)
    (own,) = balancer.leads(path)[VIP]
    (other,) = set(three.addresses[1:]) - {own}
    tables = (three.addresses, (three.addresses[0], own), (own,), three.addresses)
    with client.connect(VIP) as stream, client.udp(VIP) as flow:
        for table in tables:
            for each in (balancer, NftBalancer()):
                assert each.apply(path, {VIP: tuple(sorted(table))}, choice)
                assert each.leads(path) == {VIP: (own,)}
                assert _streams(client, 3) == {str(own): 3}
                assert _datagrams(client, 3) == {str(own): 3}
                assert (ask(stream), ask(flow)) == (str(own), str(own))
                balancer = each
        balancer.apply(path, {VIP: (other,)}, choice)
        assert (ask(stream), ask(flow)) == (str(own), str(other))
    balancer.apply(path, {VIP: ()}, choice)
    with pytest.raises(ConnectionRefusedError):
        client.connect(VIP)
    balancer.apply(path, {VIP: three.addresses}, choice)
    assert set(_streams(client, 3).values()) == {3}


def test_a_client_that_had_all_tasks_gets_its_own(three: World) -> None:
    """A VIP that becomes balanced by source gives each client the task of its hash, also if an
    earlier plugin process wrote the rules."""
    path, client = three.client.path, three.client
    choice = {VIP: Choice(client=client.address)}
    own = str(favourite(client.address, three.addresses))
    for again in (False, True):
        balancer = NftBalancer()
        balancer.apply(path, {VIP: three.addresses})
        chosen = NftBalancer() if again else balancer
        chosen.apply(path, {VIP: three.addresses}, choice)
        assert _streams(client, 3) == {own: 3}
        chosen.apply(path, {})
