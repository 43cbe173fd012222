"""The check of RDMA verbs: queue pairs of two containers write into each other's memory, within
each host, and between this host and each other one.
"""

from __future__ import annotations

import time
from typing import Any, Final

from plugin.network_test.checks_paths import available_paths
from plugin.network_test.gateway import ProbeError, Unreachable
from plugin.network_test.plan import Check
from plugin.network_test.scene import Pair, Scene, Verdict, failed, not_here, pair_name, passed

_SECONDS: Final = 30.0
_CONNECTING: Final = 20.0
"""Seconds in which a queue pair of another host may be refused: its relay has no link yet."""


def check_verbs(scene: Scene) -> None:
    """A WRITE of 64 KiB arrives with its hash, in both directions."""
    pairs: list[Pair] = [(host, host) for host in scene.hosts]
    own = next((host for host in scene.hosts if host.own), None)
    if own is not None:
        pairs += [(own, host) for host in scene.hosts if host is not own]
    why = _why_not(scene)
    if why:
        scene.ledger.add(Check.VERBS, "all hosts", not_here(why))
        return
    for pair in pairs:
        begin = time.monotonic()
        verdict = _no_path(scene, pair) or _check(scene, pair)
        scene.ledger.add(Check.VERBS, pair_name(pair), verdict, time.monotonic() - begin)


def _no_path(scene: Scene, pair: Pair) -> Verdict | None:
    """Why queue pairs of two hosts can't be connected; None: they have RDMA or the relays."""
    if pair[0] is pair[1]:
        return None
    found = available_paths(scene, pair[1])
    return None if None in found.values() else found[Check.RELAY]


def _why_not(scene: Scene) -> str:
    """Why there are no verbs, as far as this host knows."""
    if not all(scene.facts[host.one].get("verbs") for host in scene.hosts):
        return "the network's containers don't get FreeFlow's libibverbs"
    status = scene.client.status()
    if status.settings.get("VERBS") == "off":
        return "the setting VERBS is off"
    if scene.network.options.get("verbs") == "off":
        return "verbs is off for the network"
    return ""


def _check(scene: Scene, pair: Pair) -> Verdict:
    end = time.monotonic() + _CONNECTING
    while True:
        try:
            return _exchange(scene, pair)
        except (ProbeError, Unreachable) as error:
            text = str(error)
        except (KeyError, TypeError, ValueError) as error:
            return failed(f"the probe's answer can't be used ({error})")
        if "ctypes" in text:
            return not_here("the image's python has no ctypes")
        if pair[0] is pair[1] or time.monotonic() > end:
            return failed(text, "freeflow connections --verbs, and freeflow status, on both hosts")
        time.sleep(1)


def _exchange(scene: Scene, pair: Pair) -> Verdict:
    """Raises ProbeError, Unreachable, and what an unusable answer raises."""
    here, there = pair[0].two, pair[1].one

    def ask(probe: str, call: str, /, **arguments: Any) -> Any:
        arguments.update(own=probe, call=call)
        return scene.gateway.ask(probe, "verbs", _SECONDS, **arguments)

    near, far = dict(ask(here, "open")), dict(ask(there, "open"))
    ask(there, "connect", **near)
    ask(here, "connect", **far)
    for source, target, memory in ((here, there, far), (there, here, near)):
        if ask(source, "write", **memory) != ask(target, "digest"):
            return failed("what was written is not what arrived", "freeflow bugreport")
    return passed("64 KiB written in each direction")
