"""The order of an upgrade: test, then host by host upgrade and test; stop at the first failure.

Other hosts come first, managers last of them, this host at the very end: this command runs from the
files of the plugin that is replaced. So for this host it first takes the host's root as its own,
and then goes on as the new version's `freeflow test`.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from plugin.cli.client import Client, Engine, host_run
from plugin.cli.user_files import VARIABLE
from plugin.network_test.coordinator import (
    Coordinator,
    Unsuitable,
    find_driver,
    manager_info,
    only_one,
)
from plugin.network_test.outcomes import NetworkReport
from plugin.network_test.plan import TestPlan
from plugin.network_test.probe_image import chosen_image
from plugin.swarm_upgrade.privileges import added_privileges, privilege_text
from plugin.swarm_upgrade.upgrade_task import UpgradeFailed, UpgradeTask

_PAUSE: Final = 0.5
_REPORTED: Final = 90.0
"""Seconds until a node has reported its plugin again; it does so every 20 s."""
_ANSWERING: Final = 60.0
_ASKED: Final = 30.0
"""Seconds for one try of the command."""


@dataclass(frozen=True, slots=True)
class UpgradedHost:
    """A host of the Swarm, in the order of the upgrade."""

    name: str
    node: str
    own: bool
    manager: bool


class Rollout:
    """One upgrade of a Swarm to `remote`. `plan` has the image and the patience of the tests, `say`
    shows a line of progress. `consent` is asked whether the new version may have privileges that
    the plugin of this host does not have; each is a text.
    """

    def __init__(
        self,
        client: Client,
        remote: str,
        plan: TestPlan,
        say: Callable[[str], None],
        consent: Callable[[list[str]], bool],
    ) -> None:
        self._client = client
        self._engine = client.engine
        self._remote = remote
        self._plan = plan
        self._say = say
        self._consent = consent

    def run(self) -> list[str]:
        """Upgrade all hosts; the command of the last test. Raises FreeFlowError."""
        with only_one(host_run(), "upgrade"):
            info = manager_info(self._engine)
            plugin = find_driver(self._engine)
            hosts = self._hosts(str(info["Swarm"]["NodeID"]))
            image = chosen_image(self._engine, self._plan)
            plan = TestPlan(image=image, quick=True, seconds=self._plan.seconds)
            privileges = self._privileges(plugin)
            task = UpgradeTask(self._engine, image, plugin, self._remote, privileges)
            task.remove_older()
            self._test(plan, "before the upgrade", "docs/connectivity-test.md")
            for host in hosts:
                if not host.own:
                    self._upgrade(task, host, plugin)
                    self._test(plan, f"after the upgrade of {host.name}", _go_back(host, plugin))
            # From here on without the files of this host's plugin.
            self._engine = take_hosts_root(self._engine)
            task.use(self._engine)
            self._upgrade(task, hosts[-1], plugin)
        seconds = f"{plan.seconds:g}"
        return ["test", "--quick", "--image", image, "--wait", seconds]

    def _privileges(self, plugin: str) -> list[Any]:
        """Those that the new version asks for. Raises Unsuitable: the user does not consent to
        those that are new; EngineError.
        """
        asked = list(
            self._engine.get(f"/plugins/privileges?remote={quote(self._remote, safe='')}") or ()
        )
        installed = self._engine.get(f"/plugins/{quote(plugin, safe='')}/json")
        self._say(f"{self._remote} asks for {'; '.join(sorted(map(privilege_text, asked)))}")
        new = added_privileges(asked, installed.get("Config") or {})
        if new and not self._consent(new):
            raise Unsuitable(
                f"{self._remote} asks for privileges that {plugin} does not have",
                cause="; ".join(new),
                remedy="if it may have them: freeflow upgrade --grant-all-permissions",
            )
        return asked

    def _hosts(self, own: str) -> list[UpgradedHost]:
        """All hosts, this one last. Raises Unsuitable if one is not there."""
        found = []
        for node in self._engine.get("/nodes"):
            name = str((node.get("Description") or {}).get("Hostname") or node["ID"])
            state = str((node.get("Status") or {}).get("State"))
            availability = str((node.get("Spec") or {}).get("Availability"))
            if state != "ready" or availability != "active":
                raise Unsuitable(
                    f"host {name}",
                    cause=f"it is {state}, its availability is {availability}",
                    remedy="bring it back, or remove it (docker node rm), and try again",
                )
            manager = (node.get("Spec") or {}).get("Role") == "manager"
            found.append(UpgradedHost(name, str(node["ID"]), node["ID"] == own, manager))
        return sorted(found, key=lambda host: (host.own, host.manager, host.name))

    def _upgrade(self, task: UpgradeTask, host: UpgradedHost, plugin: str) -> None:
        self._say(f"upgrading {host.name}")
        try:
            task.run(host.node)
        except UpgradeFailed as error:
            raise UpgradeFailed(
                f"{host.name}: {error.what}",
                cause=error.cause,
                remedy=f"on that host: docker plugin ls, {_by_hand(plugin, self._remote)}",
            ) from error
        self._wait_reported(host, plugin)

    def _wait_reported(self, host: UpgradedHost, plugin: str) -> None:
        """Until the Swarm schedules on the host what needs the plugin."""

        def reported() -> bool:
            node = self._engine.get(f"/nodes/{host.node}")
            engine = (node.get("Description") or {}).get("Engine") or {}
            return any(each.get("Name") == plugin for each in engine.get("Plugins") or ())

        if not _wait(reported, _REPORTED):
            raise UpgradeFailed(
                f"{host.name} has not reported its plugin in {_REPORTED:g} s",
                remedy=f"on that host: docker plugin ls; freeflow status ({plugin})",
            )

    def _test(self, plan: TestPlan, when: str, remedy: str) -> None:
        self._say(f"testing, {when}")
        report = Coordinator(self._client, plan, lambda _line: None).run()
        if report.code:
            raise UpgradeFailed(f"the test {when} failed", cause=_why(report), remedy=remedy)
        self._say(f"  {len(report.checks)} checks passed in {report.seconds:.0f} s")


def take_hosts_root(engine: Engine) -> Engine:
    """Take the host's root as this process's own; the engine as it is seen from there.

    The files of the plugin, from which this process was started, are removed soon.
    """
    numbers = os.environ.get(VARIABLE, "")
    if not numbers:
        return engine
    directory, _, root = numbers.partition(":")
    os.fchdir(int(root))
    os.chroot(".")
    os.fchdir(int(directory))
    return Engine(Path("/run/docker.sock"))


def _why(report: NetworkReport) -> str:
    if report.error:
        return report.error
    return "; ".join(f"{each.check} {each.subject}: {each.detail}" for each in report.failed[:5])


def _by_hand(plugin: str, remote: str) -> str:
    return (
        f"docker plugin disable -f {plugin}, docker plugin upgrade {plugin} {remote}, "
        f"docker plugin enable {plugin}"
    )


def _go_back(host: UpgradedHost, plugin: str) -> str:
    return (
        f"find out why; to go back, on {host.name}: {_by_hand(plugin, 'OLD-VERSION')}; "
        "hosts of both versions work together meanwhile"
    )


def installed_version(command: Sequence[str], seconds: float = _ANSWERING) -> str:
    """What the command of the new version says of itself, as soon as it does. That the file is
    there says nothing: the one of the former version was there, too.

    Raises UpgradeFailed.
    """
    said = ""

    def answered() -> bool:
        nonlocal said
        try:
            done = subprocess.run(
                [*command, "--version"], capture_output=True, timeout=_ASKED, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
            return False
        said = (done.stdout or done.stderr).decode(errors="replace").strip()
        return done.returncode == 0

    if _wait(answered, seconds):
        return said
    raise UpgradeFailed(
        f"the new version's command does not answer, {command[-1]}",
        cause=said[-300:],
        remedy="journalctl -u docker",
    )


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    """Whether it is done in this time; at least one look."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() >= end:
            return False
        time.sleep(_PAUSE)
    return True
