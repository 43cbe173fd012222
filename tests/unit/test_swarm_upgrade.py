"""`freeflow upgrade`: the order, where it stops, and what the task on a host does."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from driver.errors import EngineError, FreeFlowError
from plugin.network_test import coordinator, placement
from plugin.network_test.plan import TestPlan
from plugin.swarm_upgrade import plugin_agent, rollout, upgrade_task
from plugin.swarm_upgrade.privileges import added_privileges
from plugin.swarm_upgrade.rollout import Rollout
from plugin.swarm_upgrade.upgrade_task import UpgradeFailed
from testbed.patience import patience
from tests.unit.fake_swarm import FakeSwarm
from tests.unit.sockets import served
from tests.unit.swarm_probes import FakePlugin, probe_answers

REMOTE = "registry:5000/freeflow:2"
PLAN = TestPlan(image="image:1", seconds=5)


@pytest.fixture
def swarm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeSwarm:
    """A healthy Swarm of three hosts, h1 being this one; waits are short."""
    for module in (coordinator, rollout):
        monkeypatch.setattr(module, "host_run", lambda: tmp_path)
    for waiting in (placement, upgrade_task):
        monkeypatch.setattr(waiting, "_PAUSE", 0.01)
    made = FakeSwarm()
    made.answers = probe_answers()
    return made


def nobody(new: list[str]) -> bool:
    raise AssertionError(new)


def run(
    swarm: FakeSwarm, consent: Callable[[list[str]], bool] = nobody
) -> tuple[list[str], list[str]]:
    """The command of the last test, and the lines of progress."""
    said: list[str] = []
    plugin: Any = FakePlugin(swarm)
    return Rollout(plugin, REMOTE, PLAN, said.append, consent).run(), said


def test_this_host_is_last(swarm: FakeSwarm) -> None:
    """All hosts are upgraded, this one last, with a test before and after each; nothing stays."""
    words, said = run(swarm)
    assert swarm.upgraded == ["node-h2", "node-h3", "node-h1"]
    assert words == ["test", "--quick", "--image", "image:1", "--wait", "5"]
    steps = [line.partition(",")[0] for line in said if not line.startswith(" ")]
    assert steps[1:] == [
        "testing",
        "upgrading h2",
        "testing",
        "upgrading h3",
        "testing",
        "upgrading h1",
    ]
    assert swarm.services == swarm.networks == {}
    assert said[0] == f"{REMOTE} asks for network: host"


def test_it_does_not_begin_on_a_broken_network(swarm: FakeSwarm) -> None:
    """If the test before fails, no host is upgraded."""
    swarm.answers["datagrams"] = lambda *_: {"lost": [9000]}
    with pytest.raises(UpgradeFailed, match=r"test before the upgrade failed.*9000"):
        run(swarm)
    assert swarm.upgraded == []


def test_it_stops_when_a_test_fails(swarm: FakeSwarm) -> None:
    """If the test after a host fails, the next host is not upgraded; the error says what failed,
    and how to go back.
    """
    swarm.answers["datagrams"] = lambda *_: {"lost": [9000] if swarm.upgraded else []}
    with pytest.raises(UpgradeFailed, match="after the upgrade of h2 failed") as caught:
        run(swarm)
    assert swarm.upgraded == ["node-h2"]
    assert "docker plugin upgrade" in caught.value.remedy


def test_it_stops_when_an_upgrade_fails(swarm: FakeSwarm) -> None:
    """If a host's upgrade fails, the error has what its task said; the service is removed."""
    swarm.failing["node-h3"] = "pull access denied"
    with pytest.raises(UpgradeFailed, match="h3: the upgrade failed: pull access denied"):
        run(swarm)
    assert swarm.upgraded == ["node-h2", "node-h3"]
    assert swarm.services == {}


def test_an_upgrade_that_goes_on_is_left_alone(swarm: FakeSwarm) -> None:
    """While the task of another upgrade works, none begins."""
    change = {"Name": "x", "Labels": {upgrade_task.LABEL: "node-h2"}}
    swarm.change("POST", "/services/create", change)
    swarm.upgraded.clear()
    run(swarm)
    swarm.change("POST", "/services/create", change)
    swarm.upgraded.clear()
    find = swarm.find

    def working(url: str) -> Any:
        return [{"Status": {"State": "running"}}] if url.startswith("/tasks") else find(url)

    swarm.find = working  # type: ignore[method-assign]
    with pytest.raises(UpgradeFailed, match="has not ended"):
        run(swarm)
    assert swarm.upgraded == []


def test_an_unknown_version(swarm: FakeSwarm) -> None:
    """If this host's engine does not find the new version, nothing begins."""
    swarm.refuse = lambda _method, url: "manifest unknown" if "privileges" in url else ""
    with pytest.raises(EngineError, match="manifest unknown"):
        run(swarm)
    assert swarm.upgraded == []


def test_new_privileges_need_consent(swarm: FakeSwarm) -> None:
    """What the installed version does not have, folder by folder, is asked for before anything is
    done. Without consent no host is touched, and the error names it and the option.
    """
    swarm.privileges.append({"Name": "mount", "Value": ["/", "/etc"]})
    asked: list[list[str]] = []

    def consent(new: list[str]) -> bool:
        asked.append(new)
        return len(asked) > 1

    with pytest.raises(FreeFlowError, match="asks for privileges") as caught:
        run(swarm, consent)
    assert caught.value.cause == "mount: /, /etc"
    assert "--grant-all-permissions" in caught.value.remedy
    assert swarm.upgraded == []
    run(swarm, consent)
    assert swarm.upgraded == ["node-h2", "node-h3", "node-h1"]
    assert asked == [["mount: /, /etc"]] * 2


def test_privileges_of_the_installed_version() -> None:
    """The plugin's own configuration asks for nothing new of itself, and for each value that it
    lacks.
    """
    config = json.loads((Path(__file__).parents[2] / "config.json").read_text())
    fewer = json.loads(json.dumps(config))
    capability = fewer["linux"]["capabilities"].pop()
    mount = fewer["mounts"].pop()["source"]
    fewer["pidhost"] = False
    asked = [
        {"Name": "network", "Value": [config["network"]["type"]]},
        {"Name": "host pid namespace", "Value": ["true"]},
        *({"Name": "mount", "Value": [each["source"]]} for each in config["mounts"]),
        {"Name": "capabilities", "Value": config["linux"]["capabilities"]},
    ]
    assert added_privileges(asked, as_inspected(config)) == []
    assert added_privileges(asked, as_inspected(fewer)) == [
        f"capabilities: {capability}",
        "host pid namespace: true",
        f"mount: {mount}",
    ]
    assert len(added_privileges(asked, {})) == len(asked)


def as_inspected(config: dict[str, Any]) -> dict[str, Any]:
    """A plugin's config.json as the engine shows it."""
    linux = config["linux"]
    return {
        "Network": {"Type": config["network"]["type"]},
        "PidHost": config["pidhost"],
        "IpcHost": config.get("ipchost", False),
        "Mounts": [{"Source": each["source"]} for each in config["mounts"]],
        "Linux": {
            "Capabilities": linux["capabilities"],
            "AllowAllDevices": linux.get("allowAllDevices", False),
            "Devices": [{"Path": each["path"]} for each in linux.get("devices") or ()],
        },
    }


def test_the_version_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is there and does not work yet is asked again; one that never does is an error
    with what it says.
    """
    monkeypatch.setattr(rollout, "_PAUSE", 0.01)
    mark, command = tmp_path / "mark", tmp_path / "command"
    command.write_text(
        f"#!/bin/sh\n[ -e {mark} ] || {{ touch {mark}; echo not yet >&2; exit 2; }}\necho version 9\n"
    )
    command.chmod(0o755)
    assert rollout.installed_version([str(command)], patience(20)) == "version 9"
    command.write_text("#!/bin/sh\necho removed >&2; exit 2\n")
    with pytest.raises(UpgradeFailed, match="removed"):
        rollout.installed_version([str(command)], 0.0)


def test_a_host_that_is_away(swarm: FakeSwarm) -> None:
    """All hosts must be there before it begins."""
    find = swarm.find

    def down(url: str) -> Any:
        found: Any = find(url)
        if url == "/nodes":
            found[1]["Status"]["State"] = "down"
        return found

    swarm.find = down  # type: ignore[method-assign]
    with pytest.raises(FreeFlowError, match="host h2: it is down"):
        run(swarm)
    assert swarm.upgraded == []


# --- the task on a host


class PluginEngine:
    """An engine with one plugin, as WSGI."""

    def __init__(self) -> None:
        self.enabled = True
        self.reference = "freeflow:1"
        self.said: list[str] = []
        self.failure = ""
        self.broken: set[str] = set()
        """Versions that don't start, and calls that fail."""
        self.drip = threading.Event()
        """Set: an upgrade's progress goes on without end."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        # Read before the answer, as the engine does: else the sender finds the pipe broken.
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        path = environ["PATH_INFO"]
        call = path.rpartition("/")[2]
        status, answer = "200 OK", b""
        if call == "json":
            text = (
                f'{{"Enabled": {str(self.enabled).lower()}, "PluginReference": "{self.reference}"}}'
            )
            answer = text.encode()
        else:
            self.said.append(call)
        remote = parse_qs(environ["QUERY_STRING"]).get("remote", [""])[0]
        if call == "privileges":
            answer = b"[]"
        elif call in self.broken or (call == "enable" and self.reference in self.broken):
            status, answer = "500 Internal Server Error", b'{"message": "it fails"}'
        elif call in ("disable", "enable"):
            self.enabled = call == "enable"
        elif call == "upgrade":
            assert remote in (REMOTE, "freeflow:1")
            if self.drip.is_set():
                start_response(status, [("Content-Type", "application/json")])
                return self.progress()
            if self.enabled:
                status, answer = "409 Conflict", b'{"message": "the plugin is enabled"}'
            elif self.failure:
                answer = f'{{"status": "x"}}\n{{"errorDetail": {{}}, "error": "{self.failure}"}}'.encode()
            else:
                self.reference = remote
                answer = b'{"status": "done"}\n'
        start_response(status, [("Content-Type", "application/json")])
        return [answer]

    def progress(self) -> Iterator[bytes]:
        while self.drip.is_set():
            yield b'{"status": "x"}\n'
            time.sleep(0.02)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[tuple[PluginEngine, str]]:
    made = PluginEngine()
    with served(made, tmp_path / "engine") as path:
        yield made, str(path)


def test_the_task(engine: tuple[PluginEngine, str]) -> None:
    """It disables, upgrades and enables the plugin, and says which version is there then."""
    made, path = engine
    assert plugin_agent.upgrade(path, "freeflow:latest", REMOTE, []) == REMOTE
    assert made.said == ["disable", "upgrade", "enable"]


def test_the_task_enables_the_plugin_whatever_happens(engine: tuple[PluginEngine, str]) -> None:
    """If the upgrade fails, the old version is enabled again, and the reason is the engine's."""
    made, path = engine
    made.failure = "no space left"
    with pytest.raises(plugin_agent.AgentError, match="no space left"):
        plugin_agent.upgrade(path, "freeflow:latest", REMOTE, [])
    assert made.enabled
    assert made.reference == "freeflow:1"


def test_a_version_that_does_not_start(engine: tuple[PluginEngine, str]) -> None:
    """The former version is put back and enabled, and the reason is the engine's."""
    made, path = engine
    made.broken = {REMOTE}
    with pytest.raises(plugin_agent.AgentError, match="it fails; freeflow:1 is back"):
        plugin_agent.upgrade(path, "freeflow:latest", REMOTE, [])
    assert (made.enabled, made.reference) == (True, "freeflow:1")
    made.broken = {REMOTE, "freeflow:1"}
    with pytest.raises(plugin_agent.AgentError, match="freeflow:1 does not come back: it fails"):
        plugin_agent.upgrade(path, "freeflow:latest", REMOTE, [])


def test_a_plugin_that_cannot_be_disabled(engine: tuple[PluginEngine, str]) -> None:
    """It is enabled afterwards: the engine may have disabled it all the same."""
    made, path = engine
    made.broken = {"disable"}
    with pytest.raises(plugin_agent.AgentError, match="it fails"):
        plugin_agent.upgrade(path, "freeflow:latest", REMOTE, [])
    assert made.said == ["disable", "enable"]
    made.broken = {"upgrade", "enable"}
    with pytest.raises(plugin_agent.AgentError, match="it fails; and the plugin is disabled"):
        plugin_agent.upgrade(path, "freeflow:latest", REMOTE, [])


def test_a_registry_that_never_ends(
    engine: tuple[PluginEngine, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slowly a download goes on, the plugin is enabled before the task is killed."""
    made, path = engine
    monkeypatch.setattr(plugin_agent, "_DOWNLOADING", 0.3)
    ask = plugin_agent.ask

    def asking(*arguments: Any, **options: Any) -> Any:
        try:
            return ask(*arguments, **options)
        finally:
            # As the engine does, the server answers others meanwhile.
            if "upgrade" in arguments[2]:
                made.drip.clear()

    monkeypatch.setattr(plugin_agent, "ask", asking)
    made.drip.set()
    try:
        with pytest.raises(plugin_agent.AgentError, match="not done it in time"):
            plugin_agent.upgrade(path, "freeflow:latest", REMOTE, [])
    finally:
        made.drip.clear()
    assert (made.enabled, made.said) == (True, ["disable", "upgrade", "enable"])


def test_the_task_ends_before_it_is_killed() -> None:
    """All of its requests together take less than it has."""
    longest = 2 * (plugin_agent._SECONDS + plugin_agent._DOWNLOADING) + 3 * plugin_agent._STARTING
    waits = inspect.signature(upgrade_task.UpgradeTask.run).parameters["seconds"].default
    assert longest <= waits + upgrade_task._GRACE


def test_the_task_starts_from_its_text() -> None:
    """Without an engine it says so and fails; it needs no file of FreeFlow."""
    text = Path(plugin_agent.__file__).read_text()
    wanted = '{"plugin": "a", "remote": "b", "privileges": []}'
    done = subprocess.run(
        [sys.executable, "-I", "-c", text.replace(plugin_agent.SOCKET, "/absent.sock")],
        env={"PATH": os.environ["PATH"], plugin_agent.VARIABLE: wanted},
        capture_output=True,
        text=True,
        timeout=patience(20),
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.startswith("error: ")
