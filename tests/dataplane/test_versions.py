"""Hosts of this version and of the last one side by side, and upgrades from one to the other.

Routers, relays and libraries of the last version are real ones (`testbed/versions.py`). Of two
hosts the first one leads.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from dataplane.control import RelayRule, RouterSettings
from testbed import versions
from testbed.images import NotPreparedError
from testbed.namespace_bed import BedContainer
from testbed.patience import patience
from testbed.versions import THIS, Version
from tests.dataplane.places import compile_c, counts_of
from tests.dataplane.test_ruled_hosts import pings
from tests.dataplane.test_two_hosts import (
    PAUSE,
    RETURN,
    Hosts,
    listed,
    moves_again,
    nothing_left,
    streams,
    until,
    went_back,
)
from tests.dataplane.two_hosts import HostBed, two_hosts

TORTURE: Final = Path(__file__).with_name("torture.c")
COUNT: Final = 8
"""Connections that a program opens at one time."""
RATE: Final = 100
"""Round trips per second, of each."""
SECONDS: Final = 4
SETTINGS: Final = RouterSettings(relay_rule=RelayRule(batch=0))
"""Few connections stay on the relays' TCP, too."""
QUIET: Final = 3.0
"""Seconds in which a connection would have moved."""

pytestmark = pytest.mark.skipif(
    not THIS.library.exists() or not THIS.relay.exists(), reason="missing: make library relay"
)


@pytest.fixture(scope="session")
def last() -> Version:
    """The last version."""
    try:
        return versions.last()
    except NotPreparedError as error:
        pytest.skip(str(error))


def side_by_side(last: Version, number: int) -> tuple[Version, Version]:
    """The versions of two hosts of which this one has the last."""
    return (last, THIS) if number == 0 else (THIS, last)


def complaints(host: HostBed, since: int) -> list[str]:
    """What a router's log has from a position on that is not as it should be."""
    lines = host.log()[since:].splitlines()
    return [
        line
        for line in lines
        if (said := json.loads(line))["level"] != "info"
        or said["event"] in ("session down", "no session")
    ]


def wait_paths(hosts: Hosts, seconds: float = 20, **wanted: int) -> None:
    """Wait until both hosts list so many connections on each path."""

    def found(host: HostBed) -> bool:
        return Counter(fact.path for fact in listed(host)) == Counter(wanted)

    for host in hosts:
        try:
            until(partial(found, host), seconds)
        except AssertionError as error:
            raise AssertionError((wanted, listed(host), host.log())) from error


def wait_on_relay(hosts: Hosts, least: int, count: int) -> None:
    """Wait until at least so many of `count` connections are on the path relay."""

    def found(host: HostBed) -> bool:
        paths = Counter(fact.path for fact in listed(host))
        return paths["relay"] >= least and paths["relay"] + paths["overlay"] == count

    for host in hosts:
        until(partial(found, host), 20)


def has_link(host: HostBed) -> bool:
    return host.peer().link == "up"


def wait_links(hosts: Hosts) -> None:
    for host in hosts:
        until(partial(has_link, host))


def upgrade(hosts: Hosts, number: int, version: Version) -> None:
    """Give a host another version, and wait until the routers have a session again."""
    begun = [len(host.log()) for host in hosts]

    def has_met(host: HostBed, since: int) -> bool:
        return '"session up"' in host.log()[since:]

    hosts[number].upgrade(version)
    for host, since in zip(hosts, begun, strict=True):
        until(partial(has_met, host, since))
        host.wait_session()


def order(client: subprocess.Popen[str], line: str) -> None:
    """Give `pings.py` a line."""
    assert client.stdin is not None
    client.stdin.write(f"{line}\n")
    client.stdin.flush()


def broken(host: HostBed) -> int:
    said = host.router.statistics()
    return said.rdma.broken + said.relay.broken


def have_left(host: HostBed, count: int) -> bool:
    """Whether so many connections have gone back to TCP."""
    said = host.router.statistics()
    return said.rdma.left + said.relay.left >= count


# --- two hosts


@pytest.mark.parametrize(("number", "has_device"), [(0, None), (1, 1)])
def test_nothing_in_common(last: Version, number: int, has_device: int | None) -> None:
    """Beside a host of the last version, connections stay on the overlay unless both hosts have an
    RDMA device. The session stays up, no link is tried, and neither router complains.
    """
    devices = (has_device == 0, has_device == 1)
    with two_hosts(path="relay", devices=devices, versions=side_by_side(last, number)) as hosts:
        begun = [len(host.log()) for host in hosts]
        with pings(hosts, COUNT, RATE):
            wait_paths(hosts, overlay=COUNT)
            time.sleep(QUIET)
            wait_paths(hosts, overlay=COUNT)
            reasons = {fact.reason for host in hosts for fact in listed(host)}
            assert reasons <= {"no-rdma", "peer-no-rdma"}, reasons
        peer = hosts[1 - number].peer()
        assert (peer.session, peer.relay, peer.link) == (True, False, "none"), peer
        assert hosts[number].peer().session
        for host, since in zip(hosts, begun, strict=True):
            assert complaints(host, since) == []


@pytest.mark.parametrize("number", [0, 1])
def test_rdma(last: Version, number: int) -> None:
    """Relays of the last version and of this one carry each other's connections over RDMA without
    loss, also when either router is killed.
    """
    with two_hosts(versions=side_by_side(last, number)) as hosts:
        wait_links(hosts)
        begun = [len(host.log()) for host in hosts]
        with streams(hosts) as made:
            assert made.ends() == ["whole"] * 8
        nothing_left(hosts)
        for host, since in zip(hosts, begun, strict=True):
            assert complaints(host, since) == []
        for dies in (number, 1 - number):
            with streams(hosts) as made:
                hosts[dies].kill_router()
                until(partial(went_back, hosts[1 - dies]), 3)
                hosts[dies].start_router()
                assert made.ends() == ["whole"] * 8
            moves_again(hosts)


@pytest.mark.parametrize("router", ["this", "last"])
def test_a_relay_of_another_version(last: Version, router: str) -> None:
    """A router whose relay is of another version than itself logs why it carries nothing, and
    connections of its host stay on the overlay, whole.
    """
    mixed = replace(THIS, relay=last.relay) if router == "this" else replace(last, relay=THIS.relay)
    why = "relay ended" if router == "this" else "another version than its relay"
    with two_hosts(versions=(mixed, THIS)) as hosts:
        until(lambda: why in hosts[0].log())
        with pings(hosts, COUNT, RATE):
            wait_paths(hosts, overlay=COUNT)
            time.sleep(QUIET)
            wait_paths(hosts, overlay=COUNT)
        for host in hosts:
            assert host.peer().session
            assert not has_link(host)


# --- programs under both libraries

_OUTPUT: Final[dict[str, Any]] = {
    "stdout": subprocess.PIPE,
    "stderr": subprocess.STDOUT,
    "text": True,
}


def torture(folder: Path, ends: Sequence[tuple[BedContainer, str]]) -> None:
    """Bytes of many connections between a server and a client, each with the library of this name
    in its /run/freeflow. Ends with the library of this version fall back at random and move again.
    Both must have used rings.
    """
    program = str(compile_c(TORTURE, folder / "torture"))
    (server, _), _ = ends
    where = [str(server.ipv4), "7000"]
    orders = [["server", *where], ["client", *where, str(SECONDS), "42", "16", "4"]]
    running = [
        container.popen(
            ["env", f"LD_PRELOAD=/run/freeflow/{library}", program, *arguments],
            accelerated=False,
            env={"FREEFLOW_STATS": str(folder / arguments[0]), "FREEFLOW_RESTLESS": "1"},
            **_OUTPUT,
        )
        for (container, library), arguments in zip(ends, orders, strict=True)
    ]
    said = [each.communicate(timeout=SECONDS + patience(60))[0] for each in reversed(running)]
    assert [each.returncode for each in running] == [0, 0], "\n".join(said)
    for arguments in orders:
        counted = counts_of(folder / arguments[0])
        assert counted["senders"] > 0
        assert counted["receivers"] > 0
        assert (counted["corrupt"], counted["broken"]) == (0, 0)


@pytest.mark.parametrize(
    ("router", "server", "client"),
    [("this", "last", "this"), ("last", "this", "last")],
)
def test_shared_memory(
    last: Version, tmp_path: Path, router: str, server: str, client: str
) -> None:
    """Programs with the library of this version and of the last use shared memory with each other
    under a router of either, and no byte is wrong.
    """
    both = (last if router == "last" else THIS,) * 2
    with two_hosts(("a", "c"), path="relay", versions=both) as (host, _):
        for name, version in (("last", last), ("this", THIS)):
            (host.shared / f"{name}.so").write_bytes(version.library.read_bytes())
        begun = len(host.log())
        a, c = host.containers.values()
        torture(tmp_path, [(a, f"{server}.so"), (c, f"{client}.so")])
        assert complaints(host, begun) == []


def test_rdma_torture(last: Version, tmp_path: Path) -> None:
    """No byte is wrong under many threads, forks, signals and kills between a host of the last
    version and one of this, whose ends fall back at random.
    """
    with two_hosts(versions=(last, THIS)) as hosts:
        wait_links(hosts)
        a, b = hosts[0].containers["a"], hosts[1].containers["b"]
        torture(tmp_path, [(b, "libfreeflow.so"), (a, "libfreeflow.so")])
        nothing_left(hosts)


# --- upgrades


@pytest.mark.parametrize(("first", "devices"), [(0, False), (1, False), (1, True)])
def test_upgrade(last: Version, first: int, devices: bool) -> None:
    """Both hosts are upgraded one after the other, and one goes back, while programs run that keep
    the library of the last version: no answer is wrong, and what was on a path falls back to TCP.
    Connections that programs open afterwards use the best path that both hosts have.
    """
    before = "rdma" if devices else "overlay"
    steps = [
        (first, THIS, before),
        (1 - first, THIS, "rdma" if devices else "relay"),
        (first, last, before),
    ]
    with two_hosts(
        path="relay", settings=SETTINGS, devices=(devices, devices), versions=(last, last)
    ) as hosts:
        if devices:
            wait_links(hosts)
        with pings(hosts, COUNT, RATE) as client:
            wait_paths(hosts, **{before: COUNT})
            for done, (number, version, path) in enumerate(steps, 1):
                upgrade(hosts, number, version)
                if path != "relay":
                    wait_paths(hosts, overlay=done * COUNT)
                if path != "overlay":
                    wait_links(hosts)
                order(client, f"+{COUNT}")
                if path == "relay":
                    # Requests that waited under one router of this version may be granted now.
                    wait_on_relay(hosts, COUNT, (done + 1) * COUNT)
                else:
                    wanted = Counter(overlay=done * COUNT) + Counter({path: COUNT})
                    wait_paths(hosts, **wanted)
        assert [broken(host) for host in hosts] == [0, 0]


@pytest.mark.parametrize(("number", "path"), [(0, "relay"), (1, "rdma")])
def test_back_and_forth(last: Version, number: int, path: str) -> None:
    """Programs that have the library of this version run on while a host goes back to the last
    version and is upgraded again: no answer is wrong, and connections that have fallen back move
    again as soon as both hosts have a path for them.
    """
    has = path == "rdma"
    with two_hosts(
        path="relay", settings=SETTINGS, devices=(has, has), versions=(THIS, THIS)
    ) as hosts:
        wait_links(hosts)
        with pings(hosts, COUNT, RATE) as client:
            wait_paths(hosts, **{path: COUNT})
            upgrade(hosts, number, last)
            until(partial(have_left, hosts[1 - number], COUNT))
            if has:
                wait_links(hosts)
            order(client, f"+{COUNT}")
            wait_paths(hosts, RETURN, **{"rdma" if has else "overlay": 2 * COUNT})
            if not has:
                # Until requests were refused.
                time.sleep(2 * PAUSE)
            upgrade(hosts, number, THIS)
            wait_links(hosts)
            order(client, f"+{COUNT}")
            # A connection whose first request is refused stays on TCP.
            refused = 0 if has else COUNT
            wait_paths(hosts, RETURN, **{path: 3 * COUNT - refused}, overlay=refused)
        assert [broken(host) for host in hosts] == [0, 0]
