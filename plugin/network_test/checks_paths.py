"""The checks of the faster paths, each by its name: shm within hosts, rdma or relay between them.

Whether connections have moved, the probes see: their bytes are no longer TCP's. On which path they
are, this host's plugin says, so paths between hosts are checked from this host.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, Final

from driver.errors import FreeFlowError
from plugin.network_test.gateway import PendingAnswer
from plugin.network_test.placement import ProbedHost
from plugin.network_test.plan import Check
from plugin.network_test.probe.probe_wire import LIBRARY_DATA
from plugin.network_test.scene import Scene, Verdict, failed, not_here, passed
from plugin.status import Status

_MOVING: Final = 20.0
"""Seconds in which connections should move."""
_MANY: Final = 24
"""Connections with which the relay's rule is met."""
_COUNT: Final = 8 << 20
_SESSION: Final = 20.0
_LOOKING: Final = 0.5
_RULE: Final = frozenset({"few", "slow", "bulk", "short", "peer-short"})
"""Reasons that mean that the path would be no faster here."""
_OFF: Final = frozenset({"off", "remote-off"})
_NO_LIBRARY: Final = "the network's containers don't get FreeFlow's library"


class PathWatch:
    """What this host's plugin says of the connections between two addresses."""

    def __init__(self, scene: Scene, source: str, target: str) -> None:
        self._client = scene.client
        self._source = source
        self._target = f"{target}:{LIBRARY_DATA}"
        self.paths: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.sentences: dict[str, str] = {}

    def follow(self, answer: PendingAnswer) -> None:
        """Look until the probe is done."""
        while not answer.done:
            self._look()
            time.sleep(_LOOKING)

    def _look(self) -> None:
        try:
            listed = self._client.connections()
        except FreeFlowError:
            return
        self.sentences.update(listed.reasons)
        own = [
            each
            for each in listed.connections
            if each.local.startswith(f"{self._source}:") and each.remote == self._target
        ]
        self.paths.update(each.path.partition("+")[0] for each in own)
        if own:
            self.reasons = Counter(each.reason for each in own if each.reason)

    @property
    def reason(self) -> str:
        """The most frequent reason of the last look."""
        return self.reasons.most_common(1)[0][0] if self.reasons else ""


def check_shm(scene: Scene) -> None:
    """On each host a connection between two containers with the library moves to shared memory."""
    watch: PathWatch | None = None
    begin = time.monotonic()
    pending: list[tuple[ProbedHost, PendingAnswer]] = []
    off = _off(scene, "acceleration")
    for host in scene.hosts:
        if off or not scene.facts[host.one].get("library"):
            scene.ledger.add(Check.SHM, host.name, off or not_here(_NO_LIBRARY))
            continue
        pending.append((host, _move(scene, host, host, 1)))
        if host.own:
            watch = PathWatch(scene, host.two, host.one)
    for host, answer in sorted(pending, key=lambda each: not each[0].own):
        if host.own and watch is not None:
            watch.follow(answer)
        seen = watch if host.own else None
        verdict = scene.judged(answer, lambda found, w=seen: _shm_verdict(found, w))  # type: ignore[misc]
        scene.ledger.add(Check.SHM, host.name, verdict, time.monotonic() - begin)


def _off(scene: Scene, *options: str) -> Verdict | None:
    """The verdict if one of these options of the network is off."""
    for option in options:
        if scene.network.options.get(option) == "off":
            return not_here(f"{option} is off for the network")
    return None


def _move(scene: Scene, source: ProbedHost, target: ProbedHost, connections: int) -> PendingAnswer:
    return scene.gateway.start(
        *(source.two, "move", _MOVING + 70),
        to=target.one,
        connections=connections,
        seconds=_MOVING,
        count=_COUNT,
    )


def _shm_verdict(found: Any, watch: PathWatch | None) -> Verdict:
    if not found["right"]:
        return failed("bytes were lost or changed", "freeflow bugreport, and report it")
    if int(found["moved"]):
        shown = "; freeflow connections shows it" if watch and watch.paths["shm"] else ""
        return passed(f"the connection moved{shown}")
    reason = watch.reason if watch else ""
    if reason in _OFF:
        return not_here("acceleration is off")
    why = f": {watch.sentences.get(reason, reason)}" if watch and reason else ""
    return failed(
        f"the connection stayed on TCP for {_MOVING:g} s{why}",
        "freeflow status, on that host; docs/troubleshooting.md",
    )


def check_between(scene: Scene) -> None:
    """Between this host and each other one many busy connections move to RDMA or the relays."""
    own = next((host for host in scene.hosts if host.own), None)
    if own is None or not scene.facts[own.two].get("library"):
        why = _NO_LIBRARY if own else "this host has no probe, and only its plugin names the path"
        for check in (Check.RDMA, Check.RELAY):
            scene.ledger.add(check, "all hosts", not_here(why))
        return
    for host in scene.hosts:
        if host is not own:
            _check_pair(scene, own, host)
    if len(scene.hosts) == 1:
        for check in (Check.RDMA, Check.RELAY):
            scene.ledger.add(check, own.name, not_here("there is no other host"))


def _check_pair(scene: Scene, own: ProbedHost, host: ProbedHost) -> None:
    begin = time.monotonic()
    subject = f"{own.name} -> {host.name}"
    found = available_paths(scene, host)
    wanted = Check.RELAY
    for check in (Check.RDMA, Check.RELAY):
        verdict = found[check]
        if verdict is not None:
            scene.ledger.add(check, subject, verdict, time.monotonic() - begin)
        else:
            wanted = check
    if found[wanted] is not None:
        return
    answer = _move(scene, own, host, _MANY)
    watch = PathWatch(scene, own.two, host.one)
    watch.follow(answer)
    verdict = scene.judged(answer, lambda value: _between_verdict(value, watch, wanted))
    scene.ledger.add(wanted, subject, verdict, time.monotonic() - begin)


def available_paths(scene: Scene, host: ProbedHost) -> dict[Check, Verdict | None]:
    """The paths to a host that there are not, with their verdicts; None: there is this one, and
    it is the one that connections use.
    """
    end = time.monotonic() + _SESSION
    while True:
        status = scene.client.status()
        found = _paths_of(status, host)
        for check in found:
            found[check] = _off(scene, "acceleration", check.value) or found[check]
        # Hosts that shared no network before have a session some seconds later.
        waits = any(verdict and verdict[0] == "failed" for verdict in found.values())
        if not waits or time.monotonic() > end:
            return found
        time.sleep(1)


def _paths_of(status: Status, host: ProbedHost) -> dict[Check, Verdict | None]:
    router = status.router
    rdma, relay = (router.rdma, router.relay) if router else (None, None)
    if rdma is None or relay is None:
        dead = failed("this host's router does not answer", "freeflow status")
        return {Check.RDMA: dead, Check.RELAY: dead}
    peer = next((each for each in rdma.hosts if each.address == host.address), None)
    session = failed(
        f"there is no session with the router of {host.name}"
        + (f": {peer.reason}" if peer and peer.reason else ""),
        f"open TCP port {_session_port(status)} between the hosts",
    )
    found: dict[Check, Verdict | None] = {Check.RDMA: None, Check.RELAY: None}
    has_session = peer is not None and peer.session
    if not rdma.on or not rdma.device:
        found[Check.RDMA] = not_here(rdma.why or "this host has no RDMA device")
    elif not has_session:
        found[Check.RDMA] = session
    elif peer is not None and not peer.rdma:
        found[Check.RDMA] = not_here(f"{host.name} has no RDMA device")
    if not relay.on:
        found[Check.RELAY] = not_here(relay.why or "the setting RELAY is off")
    elif not has_session:
        found[Check.RELAY] = session
    elif peer is not None and not peer.relay:
        found[Check.RELAY] = not_here(f"the relay of {host.name} carries no TCP")
    elif found[Check.RDMA] is None:
        found[Check.RELAY] = not_here("the hosts use RDMA")
    return found


def _session_port(status: Status) -> str:
    settings = status.settings
    return settings.get("SESSION_PORT") or settings.get("VXLAN_PORT") or "4799"


def _between_verdict(found: Any, watch: PathWatch, wanted: Check) -> Verdict:
    if not found["right"]:
        return failed("bytes were lost or changed", "freeflow bugreport, and report it")
    moved, count = int(found["moved"]), int(found["connections"])
    if watch.paths[wanted.value] or moved * 4 >= count * 3:
        return passed(f"{max(moved, 1)} of {count} connections moved")
    reason = watch.reason
    sentence = watch.sentences.get(reason, reason)
    if reason in _RULE:
        return not_here(f"none moved in {_MOVING:g} s: {sentence}")
    if reason in _OFF:
        return not_here("faster paths to other hosts are off")
    return failed(
        f"none of {count} connections moved in {_MOVING:g} s"
        + (f": {sentence}" if sentence else ""),
        "freeflow status, on both hosts",
    )
