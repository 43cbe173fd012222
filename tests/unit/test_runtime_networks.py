"""Which networks freeflow-runc takes for FreeFlow's: the plugin's list and its answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import IPv6Network
from pathlib import Path

import msgspec
import pytest

from driver.errors import EngineError
from driver.model import Network, NetworkView
from driver.other_networks import OtherNetwork
from driver.vip_table import NetworkState
from plugin.admin import create_admin
from plugin.cli.preload import FOLDER, PRELOAD
from plugin.cli.runtime import SETTINGS
from plugin.host_paths import HostPaths
from plugin.runtime_networks import (
    FILE,
    PATIENCE,
    AttachedNetwork,
    NetworkList,
    RuntimeNetworks,
    RuntimeQuestion,
)
from tests.unit.statuses import admin_answers

TOP = Path(__file__).parents[2]


def network(identifier: str, *, acceleration: bool = True) -> Network:
    prefix = IPv6Network("fd00:1:2:3::/64")
    return Network(identifier, 4096, 4799, 1450, prefix, acceleration=acceleration)


class FakeStore:
    def __init__(self) -> None:
        self.rows = [network("one"), network("two"), network("plain", acceleration=False)]

    def networks(self) -> list[Network]:
        return self.rows


class FakeDirectory:
    """Networks that the engine knows; `fails` if it doesn't answer."""

    def __init__(self) -> None:
        self.views = {
            "front": NetworkView("three", "front", "registry:5000/freeflow:latest"),
            "slow": NetworkView("4", "slow", "freeflow:latest", options={"acceleration": "off"}),
            "web_default": NetworkView("five", "web_default", "bridge"),
            "app": NetworkView("six", "app", "bridge", labels={"freeflow.accelerate": "on"}),
            "own": NetworkView("seven", "own", "bridge", labels={"freeflow.accelerate": "off"}),
        }
        self.asked: list[str] = []
        self.fails = False

    def network(self, network_id: str) -> NetworkView | None:
        self.asked.append(network_id)
        if self.fails:
            raise EngineError("the engine", cause="it is busy")
        return self.views.get(network_id)


def states() -> Mapping[str, NetworkState]:
    return {"one": NetworkState(view=NetworkView("one", "back", "freeflow:latest"))}


@pytest.fixture
def networks(tmp_path: Path) -> RuntimeNetworks:
    path = tmp_path / "freeflow-admin/networks.json"
    return RuntimeNetworks(FakeStore(), states, FakeDirectory(), path)


def answer(networks: RuntimeNetworks, *names: str, identifier: str = "") -> bool:
    asked = RuntimeQuestion(tuple(AttachedNetwork(name, identifier) for name in names))
    return networks.answer(asked).accelerated


def test_the_list_has_accelerated_networks(networks: RuntimeNetworks) -> None:
    """The file names the networks of this host that are accelerated, and only root can read it."""
    networks.publish()
    content = msgspec.json.decode(networks.path.read_bytes(), type=NetworkList)
    assert content.networks == {"one": "back", "two": ""}
    assert networks.path.stat().st_mode & 0o777 == 0o600
    assert networks.path.parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in networks.path.parent.iterdir()] == ["networks.json"]


def test_the_list_is_written_when_it_changes(networks: RuntimeNetworks) -> None:
    """An unchanged list is not written again; a new network is in it at once."""
    networks.publish()
    before = networks.path.stat().st_ino
    networks.publish()
    assert networks.path.stat().st_ino == before
    networks.store.networks().append(network("three"))
    networks.publish()
    assert "three" in msgspec.json.decode(networks.path.read_bytes(), type=NetworkList).networks


def test_a_list_that_cannot_be_written(networks: RuntimeNetworks) -> None:
    """A failure to write the list doesn't disturb the plugin, and is tried again."""
    networks.path.parent.write_text("")
    networks.publish()
    networks.path.parent.unlink()
    networks.publish()
    assert networks.path.exists()


def test_known_networks_need_no_engine(networks: RuntimeNetworks) -> None:
    """Networks of the driver are known by ID and by name; the engine isn't asked."""
    assert answer(networks, "back")
    assert answer(networks, "two")
    assert answer(networks, "any", identifier="two")
    assert isinstance(networks.engine, FakeDirectory)
    assert networks.engine.asked == []


def test_networks_of_other_drivers(networks: RuntimeNetworks) -> None:
    """A network of another driver counts if its label asks for it, or with the setting, if it does
    not refuse. Those that are known are in the list.
    """
    assert answer(networks, "app")
    assert not answer(networks, "own")
    assert not answer(networks, "web_default")
    networks.all_others = True
    assert answer(networks, "web_default")
    assert not answer(networks, "own")
    view = NetworkView("eight", "bridge", "bridge")
    networks.others = lambda: (OtherNetwork(view, "docker0", ()),)
    networks.publish()
    content = msgspec.json.decode(networks.path.read_bytes(), type=NetworkList)
    assert content.networks == {"one": "back", "two": "", "eight": "bridge"}


def test_the_engine_tells_the_driver(networks: RuntimeNetworks) -> None:
    """Of other networks the engine tells the driver and the options."""
    assert answer(networks, "front")
    assert answer(networks, "web_default", "front")
    assert not answer(networks, "slow")
    assert not answer(networks, "web_default")
    assert not answer(networks, "")
    assert not answer(networks)


def test_networks_that_are_new_to_the_host(networks: RuntimeNetworks) -> None:
    """A network that the engine doesn't know is one of the Swarm, and may be FreeFlow's."""
    assert answer(networks, "new")
    networks.swarm = False
    assert not answer(networks, "new")


def test_an_engine_without_an_answer(networks: RuntimeNetworks) -> None:
    """If the engine doesn't answer, the container starts as it is."""
    assert isinstance(networks.engine, FakeDirectory)
    networks.engine.fails = True
    assert not answer(networks, "front")


def test_acceleration_off(networks: RuntimeNetworks) -> None:
    """A host that accelerates nothing lists nothing, and no container gets the library."""
    networks.on = False
    networks.publish()
    assert msgspec.json.decode(networks.path.read_bytes(), type=NetworkList).networks == {}
    assert not answer(networks, "back", "front", "new")


def test_paths_and_limits_are_those_of_the_program() -> None:
    """freeflow-runc looks where the plugin and the command write, and sends no larger question than
    the plugin accepts.
    """
    text = (TOP / "plugin/runtime/host.h").read_text()
    paths = dict(re.findall(r'#define (\w+) (?:FOLDER )?"([^"]+)"', text))
    limits = {name: int(number) for name, number in re.findall(r"(\w+) = (\d+),", text)}
    host = HostPaths(Path("/run"), None, Path("/state"))
    assert paths["FOLDER"] == FOLDER
    assert paths["FOLDER"] + paths["LIBRARY"] == PRELOAD
    assert paths["SETTINGS"] == str(SETTINGS)
    assert paths["ADMIN_SOCKET"] == str(host.admin_socket)
    assert paths["NETWORKS"] == str(host.admin_socket.with_name(FILE))
    app = create_admin(admin_answers())
    assert limits["MOST_ANSWER"] <= app.config["MAX_CONTENT_LENGTH"]
    assert limits["QUESTION_MILLISECONDS"] > PATIENCE * 1000
    assert limits["WORK_MILLISECONDS"] > limits["QUESTION_MILLISECONDS"]
