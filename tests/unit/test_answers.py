"""Recorded answers of engines 20.10, 26.1 and 28.5, which differ in detail."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any

import pytest

from driver.answers import (
    SERVICE_NAME,
    ordered,
    parse_engine,
    parse_hostnames,
    parse_labels,
    parse_network,
)

DATA = Path(__file__).parent / "data"
ENGINES = ("20.10", "26.1", "28.5")


def _recorded(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_as_each_engine_lists_it(engine: str) -> None:
    """Peers, VIP and tasks of a service over three hosts, a dnsrr service, a container without
    service."""
    view = parse_network(_recorded(f"network-overlay-{engine}"))
    assert view.name == "lab"
    assert view.scope == "swarm"
    assert [str(peer.address) for peer in view.peers] == [f"192.168.77.{n}" for n in (1, 2, 3)]
    services = {service.name: service for service in view.services}
    assert services["web"].vip == IPv4Address("10.0.1.2")
    assert [str(task.address) for task in services["web"].tasks] == [
        "10.0.1.12",
        "10.0.1.13",
        "10.0.1.14",
    ]
    assert services["rr"].vip is None
    assert len(services["rr"].tasks) == 2
    assert view.others == {IPv4Address("10.0.1.11")}
    assert "" not in services


@pytest.mark.parametrize("engine", ENGINES)
def test_all_engines_list_the_same_services(engine: str) -> None:
    """Hosts with different engines compute the same VIP tables."""
    first = parse_network(_recorded(f"network-overlay-{ENGINES[0]}"))
    assert parse_network(_recorded(f"network-overlay-{engine}")).services == first.services


@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_without_services_has_the_same_rest(engine: str) -> None:
    """The cheap request, without services, has the same peers and containers as the expensive
    one."""
    answer = _recorded(f"network-overlay-{engine}")
    full = parse_network(answer)
    del answer["Services"]
    cheap = parse_network(answer)
    assert (cheap.peers, cheap.containers, cheap.subnets) == (
        full.peers,
        full.containers,
        full.subnets,
    )
    assert cheap.services == ()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_tells_its_address_and_role(engine: str) -> None:
    """Workers and managers describe themselves in the same form."""
    view = parse_engine(_recorded(f"info-{engine}"))
    assert view.version.startswith(engine)
    assert view.swarm
    assert view.node_address == ip_address(f"192.168.77.{view.hostname[1:]}")
    assert view.manager == (engine == "28.5")


def test_host_names_of_nodes() -> None:
    """A node without an address, or without a name, is left out."""
    nodes = [
        {"Status": {"Addr": "192.0.2.1"}, "Description": {"Hostname": "one"}},
        {"Status": {"Addr": ""}, "Description": {"Hostname": "two"}},
        {"Status": {"Addr": "192.0.2.3"}, "Description": None},
        None,
    ]
    assert parse_hostnames(nodes) == {ip_address("192.0.2.1"): "one"}


def test_the_order_of_tasks_is_no_change() -> None:
    """Engines list tasks in random order, which counts as no change."""
    answer = _recorded("network-overlay-28.5")
    other = _recorded("network-overlay-28.5")
    for service in other["Services"].values():
        service["Tasks"].reverse()
    assert ordered(other) == ordered(answer)


@pytest.mark.parametrize("wrong", [{}, {"Services": []}, {"Peers": {}, "Services": {"a": None}}])
def test_answers_of_another_shape_are_empty_views(wrong: dict[str, Any]) -> None:
    """A later engine's changes don't crash the plugin."""
    view = parse_network(wrong)
    assert view.peers == ()
    assert view.services == ()


def test_labels_of_services() -> None:
    """A service's own label counts before those of its containers, of which the first counts."""

    def container(service: str, value: str) -> dict[str, object]:
        return {"Labels": {SERVICE_NAME: service, "balance": value}}

    containers = [
        container("web", "local"),
        container("web", "even"),
        container("db", "even"),
        {"Labels": {"balance": "local"}},
        {"Labels": {SERVICE_NAME: "api"}},
        {"Labels": None},
        7,
    ]
    services = [
        {"Spec": {"Name": "db", "Labels": {"balance": "source"}}},
        {"Spec": {"Name": "api", "Labels": {}}},
        {"Spec": {"Labels": {"balance": "source"}}},
        {},
    ]
    assert parse_labels("balance", containers, services) == {"web": "local", "db": "source"}
    assert parse_labels("balance", None, {"message": "no leader"}) == {}
