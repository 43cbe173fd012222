"""The engine's API, on a unix socket that answers as the engine does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from driver.answers import SERVICE_NAME
from driver.engine import DockerDirectory
from driver.errors import EngineError
from driver.other_networks import why_not
from tests.unit.sockets import engine, served

DATA = Path(__file__).parent / "data"
NETWORK = {"Id": "n1", "Name": "backend", "Driver": "freeflow:latest"}
KEY = "/var/run/docker/netns/1a2b"
ANSWERS: dict[str, Any] = {
    "/version": {"ApiVersion": "1.41"},
    "/v1.41/networks": [NETWORK, {"Id": "n2", "Driver": "bridge", "Labels": {"a": "b"}}],
    "/v1.41/networks/n1": NETWORK,
    "/v1.41/networks/list": [],
    "/v1.41/networks/failing": 500,
    "/v1.41/containers/json": [{"Labels": {SERVICE_NAME: "web", "balance": "local"}}],
    "/v1.41/services": [{"Spec": {"Name": "web", "Labels": {"balance": "even"}}}],
    "/v1.41/containers/c1/json": {"NetworkSettings": {"SandboxKey": KEY}},
    "/v1.41/events": {"Actor": {"ID": "n7"}},
    "/v1.41/containers/new/json": {"NetworkSettings": {"SandboxKey": ""}},
}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[DockerDirectory]:
    with served(engine(ANSWERS), tmp_path / "docker.sock") as path:
        yield DockerDirectory(path)


def test_a_network(directory: DockerDirectory) -> None:
    """An equal answer gives the same view, and an unknown network none."""
    view = directory.network("n1")
    assert view is not None
    assert (view.id, view.name) == ("n1", "backend")
    assert directory.network("n1") is view
    assert directory.network("none") is None


@pytest.mark.parametrize("network", ["list", "failing"])
def test_an_answer_that_is_no_network(directory: DockerDirectory, network: str) -> None:
    """Anything but an object is the engine's failure, not an unknown network."""
    with pytest.raises(EngineError) as caught:
        directory.network(network)
    assert caught.value.remedy


def test_networks_of_all_drivers(directory: DockerDirectory) -> None:
    """All networks are listed with driver and labels."""
    found = [(each.id, each.driver, each.labels) for each in directory.all_networks()]
    assert found == [("n1", "freeflow:latest", {}), ("n2", "bridge", {"a": "b"})]


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("networks-macvlan-28.5", "unused"),
        ("networks-macvlan-28.5", "used"),
        ("networks-macvlan-20.10", "used"),
    ],
)
def test_a_network_of_a_configuration(tmp_path: Path, name: str, state: str) -> None:
    """A Swarm's network that uses a configuration of this host has its label and options, also on a
    manager, whose list lacks them, and before a container of this host is on it. The configuration
    itself is no network that a container could join.
    """
    recorded = json.loads((DATA / f"{name}.json").read_text())[state]
    lan = recorded["one"]["Id"]
    (configuration,) = (each for each in recorded["list"] if each["ConfigOnly"])
    answers = {
        **ANSWERS,
        "/v1.41/networks": recorded["list"],
        f"/v1.41/networks/{lan}": recorded["one"],
        "/v1.41/networks/lan-here": configuration,
    }
    with served(engine(answers), tmp_path / "docker.sock") as path:
        directory = DockerDirectory(path)
        views = [*directory.all_networks(), directory.network(lan), directory.network(lan)]
        assert len(views) == 3
        for view in views:
            assert view is not None
            assert (view.id, view.driver, view.scope) == (lan, "macvlan", "swarm")
            assert view.labels == {"freeflow.accelerate": "on"}
            assert view.options["macvlan_mode"] == "bridge"
            assert [str(subnet.pool) for subnet in view.subnets] == ["172.29.0.0/16"]
            assert why_not(view, on=False) is None


def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    """A network with the name of the configuration that isn't one adds nothing."""
    lan = {"Id": "n3", "Driver": "macvlan", "ConfigFrom": {"Network": "front"}}
    front = {"Id": "n4", "Name": "front", "Driver": "bridge", "Labels": {"a": "b"}}
    answers = {
        **ANSWERS,
        "/v1.41/networks": [lan, front],
        "/v1.41/networks/n3": lan,
        "/v1.41/networks/front": front,
    }
    with served(engine(answers), tmp_path / "docker.sock") as path:
        directory = DockerDirectory(path)
        one = directory.network("n3")
        assert one is not None
        assert (one.labels, directory.all_networks()[0].labels) == ({}, {})


def test_where_a_sandbox_is(directory: DockerDirectory) -> None:
    """A container that is starting, or unknown, has no sandbox yet."""
    assert directory.sandbox_key("c1") == KEY
    assert directory.sandbox_key("new") is None
    assert directory.sandbox_key("none") is None


def test_events(directory: DockerDirectory) -> None:
    """Before the first event it is told from when on none is missed; the end of the engine is the
    end.
    """
    assert list(directory.changed_networks()) == ["", "n7"]


def test_labels(directory: DockerDirectory) -> None:
    """Labels are those of services on a manager, and of containers elsewhere."""
    assert directory.labels("balance", manager=True) == {"web": "even"}
    assert directory.labels("balance", manager=False) == {"web": "local"}


def test_labels_of_a_swarm_without_a_leader(tmp_path: Path) -> None:
    """An engine that can't list services is a failure, not an engine without labels."""
    answers = {name: 503 if name.endswith("/services") else it for name, it in ANSWERS.items()}
    with served(engine(answers), tmp_path / "docker.sock") as path:
        directory = DockerDirectory(path)
        assert directory.labels("balance", manager=False) == {"web": "local"}
        with pytest.raises(EngineError):
            directory.labels("balance", manager=True)
