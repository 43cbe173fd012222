"""The engine's API, on a unix socket that answers as the engine does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from driver.answers import SERVICE_NAME
from driver.engine import DockerDirectory
from driver.errors import EngineError
from tests.unit.sockets import engine, served

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
