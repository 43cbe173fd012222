"""Decisions by the DNS of several containers, some forged, silent, slow or just starting."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Network
from pathlib import Path

import pytest

from driver.dns_tasks import ASKERS, SILENCES, VOTERS, DnsTasks
from driver.model import Network, NetworkView, Service, Task
from driver.ports import TaskAnswers
from driver.vip_table import NetworkState, next_state

VIP = IPv4Address("10.0.4.2")
NETWORK = Network("n", 1, 4799, 1450, IPv6Network("fd00::/64"))


def at(number: int) -> IPv4Address:
    return IPv4Address("10.0.4.0") + number


def service(name: str, *tasks: int, vip: IPv4Address = VIP) -> Service:
    return Service(name, vip, tuple(Task(name, at(n), f"e{n}") for n in tasks))


WEB = service("web", 7, 8)
BOTH = frozenset({at(7), at(8)})


class World:
    """Containers by name. The DNS of each answers `truth`, unless it has `lies`; `silent` ones only
    know the service.
    """

    def __init__(self, directory: Path, *containers: str) -> None:
        self.directory = directory
        self.now = 1000.0
        self.truth: dict[str, frozenset[IPv4Address]] = {"web": BOTH}
        self.lies: dict[str, dict[str, frozenset[IPv4Address]]] = {}
        self.mute: set[str] = set()
        self.slow: set[str] = set()
        self.silent: set[str] = set()
        self.lost: set[str] = set()
        self.asked: list[tuple[str, list[str]]] = []
        self.owners: dict[Path, str] = {}
        self.services: tuple[Service, ...] = (WEB,)
        self.state = NetworkState()
        self.active = DnsTasks(self, lambda: self.now)
        for name in containers:
            self.start(name)

    def start(self, name: str, owner: str = "") -> None:
        path = self.directory / name
        path.touch()
        self.owners[path] = owner or name

    def tasks(
        self,
        sandbox: Path,
        network_name: str,
        services: Sequence[Service],
        *,
        patient: bool = False,
    ) -> TaskAnswers:
        names = [each.name for each in services]
        self.asked.append((sandbox.name, names))
        if sandbox.name in self.mute:
            return TaskAnswers({})
        said = self.truth | self.lies.get(sandbox.name, {})
        gone = self.silent | self.lost
        known = {name: said[name] for name in names if name in said and name not in gone}
        silent = frozenset(name for name in names if name in self.silent)
        return TaskAnswers(known, silent, sandbox.name in self.slow)

    def look(self, after: float = 1.0) -> tuple[IPv4Address, ...]:
        """The tasks behind web's VIP after a poll."""
        self.now += after
        self.asked.clear()
        view = NetworkView("n", "net", "freeflow:latest", services=self.services)
        decision = self.active.ask(view, self.state, self.owners)
        self.by_list = decision.by_list
        self.state = next_state(
            NETWORK, view, decision.tasks, self.state, self.now, decision.by_list
        )
        return self.state.table[VIP]


def test_a_quiet_look_asks_one(tmp_path: Path) -> None:
    """While nothing changes, a poll queries one container, another one each time."""
    world = World(tmp_path, "a", "b", "c", "d")
    assert world.look() == tuple(sorted(BOTH))
    asked = []
    for _ in range(4):
        assert world.look() == tuple(sorted(BOTH))
        ((name, _),) = world.asked
        asked.append(name)
    assert sorted(asked) == ["a", "b", "c", "d"]


def test_a_change_is_confirmed_by_another(tmp_path: Path) -> None:
    """A task that leaves is removed at the next poll, after one more query about its service."""
    world = World(tmp_path, "a", "b", "c")
    world.services = (WEB, service("db", 20, vip=at(3)))
    world.truth["db"] = frozenset({at(20)})
    world.look()
    world.truth["web"] = frozenset({at(8)})
    assert world.look() == (at(8),)
    assert [names for _, names in world.asked] == [["web", "db"], ["web"]]


@pytest.mark.parametrize("others", [1, 2, 5])
@pytest.mark.parametrize("lie", [[], [8], [200]], ids=["none", "one", "foreign"])
def test_a_liar_changes_nothing_for_others(tmp_path: Path, others: int, lie: list[int]) -> None:
    """Whatever a forged DNS answers, and whenever, no task is left out that the other containers'
    DNS has."""
    world = World(tmp_path, "liar", *(f"honest{n}" for n in range(others)))
    world.lies["liar"] = {"web": frozenset(map(at, lie))}
    for _ in range(8):
        assert world.look() == tuple(sorted(BOTH))


def test_a_liar_does_not_keep_a_task(tmp_path: Path) -> None:
    """With two correct containers a task that leaves is removed, though a third one claims that it
    stays.
    """
    world = World(tmp_path, "liar", "b", "c")
    for _ in range(3):
        world.look()
    world.lies["liar"] = {"web": BOTH}
    world.truth["web"] = frozenset({at(8)})
    for _ in range(2):
        table = world.look()
    assert table == (at(8),)
    for _ in range(4):
        assert world.look() == (at(8),)


def test_containers_of_one_service_are_one(tmp_path: Path) -> None:
    """However many containers one service has here, they do not outvote the others."""
    world = World(tmp_path, "honest")
    for number in range(5):
        world.start(f"bad{number}", "service bad")
        world.lies[f"bad{number}"] = {"web": frozenset()}
    for _ in range(8):
        assert world.look() == tuple(sorted(BOTH))


def test_alone_it_decides_for_itself(tmp_path: Path) -> None:
    """The answer of a container that is alone on its network counts at once."""
    world = World(tmp_path, "a")
    world.look()
    world.truth["web"] = frozenset({at(8)})
    assert world.look() == (at(8),)


def test_those_being_started_are_not_waited_for(tmp_path: Path) -> None:
    """Containers whose DNS has never answered do not keep a task that leaves."""
    world = World(tmp_path, "a", "b", "c")
    world.mute = {"b", "c"}
    for _ in range(3):
        world.look()
    world.truth["web"] = frozenset({at(8)})
    assert world.look() == (at(8),)


def test_a_silenced_witness_is_waited_for(tmp_path: Path) -> None:
    """A container that has answered before and is silent now does not make another one the only
    judge.
    """
    world = World(tmp_path, "liar", "honest")
    for _ in range(4):
        world.look()
    world.mute = {"honest"}
    world.lies["liar"] = {"web": frozenset()}
    for _ in range(8):
        assert world.look() == tuple(sorted(BOTH))


def test_a_slow_container_is_asked_after_the_others(tmp_path: Path) -> None:
    """A container whose DNS uses all of the allowed time delays one poll, and none while others
    answer."""
    world = World(tmp_path, "a", "slow", "c")
    world.slow = {"slow"}
    asked = []
    for _ in range(9):
        world.look()
        asked.append(world.asked[0][0])
    assert asked.count("slow") == 1


def test_the_number_of_questions_is_bounded(tmp_path: Path) -> None:
    """Of a hundred containers with different answers few are queried, and fewer if none answers."""
    world = World(tmp_path, *(f"c{n:03}" for n in range(100)))
    world.lies = {f"c{n:03}": {"web": frozenset({at(n)})} for n in range(100)}
    world.look()
    assert len(world.asked) <= VOTERS
    world.mute = {f"c{n:03}" for n in range(100)}
    world.look()
    assert len(world.asked) <= ASKERS


def test_lost_answers_change_nothing(tmp_path: Path) -> None:
    """A service whose answers are lost keeps its tasks, and is queried less and less; the list is
    read instead.
    """
    world = World(tmp_path, "a", "b")
    world.services = (WEB, service("db", 20, vip=at(3)))
    world.truth["db"] = frozenset({at(20)})
    world.look()
    world.lost = {"web"}
    asked = 0
    for _ in range(100):
        assert world.look() == tuple(sorted(BOTH))
        asked += sum("web" in names for _, names in world.asked)
    assert asked < 15
    assert "web" in world.by_list
    world.lost.clear()
    for _ in range(40):
        world.look()
    world.truth["web"] = frozenset({at(8)})
    world.look()
    assert world.look() == (at(8),)
    assert world.by_list == frozenset()


@pytest.mark.parametrize("mute", [True, False], ids=["all mute", "lost"])
def test_a_new_task_waits_for_an_answer(tmp_path: Path, mute: bool) -> None:
    """While answers are missing, a new task takes no connections, because it may not be healthy
    yet. If they don't come at all, the engine's list decides.
    """
    world = World(tmp_path, "a", "b")
    assert world.look() == (at(7), at(8))
    if mute:
        world.mute = {"a", "b"}
    else:
        world.lost = {"web"}
    world.services = (service("web", 7, 8, 9),)
    tables = [world.look() for _ in range(SILENCES)]
    assert tables[:-1] == [(at(7), at(8))] * (SILENCES - 1)
    assert tables[-1] == (at(7), at(8), at(9))
    assert world.by_list == {"web"}
    world.mute.clear()
    world.lost.clear()
    tables = [world.look() for _ in range(10)]
    assert tables[-1] == (at(7), at(8))
    assert world.by_list == frozenset()


def test_silence_of_several_means_none(tmp_path: Path) -> None:
    """If the DNS of several containers knows a service and repeatedly doesn't answer for its tasks,
    it has none."""
    world = World(tmp_path, "a", "b")
    world.look()
    world.silent = {"web"}
    tables = [world.look() for _ in range(SILENCES)]
    assert tables[:-1] == [tuple(sorted(BOTH))] * (SILENCES - 1)
    assert tables[-1] == ()


def test_large_services_follow_the_list(tmp_path: Path) -> None:
    """A service that is too large for an answer is not queried, keeps its tasks, and follows the
    engine's list.
    """
    world = World(tmp_path, "a", "b")
    world.services = (service("web", *range(10, 4010)),)
    assert len(world.look()) == 4000
    assert world.asked == []
    assert world.by_list == {"web"}
    world.services = (service("web", *range(11, 4010)),)
    assert len(world.look()) == 3999
