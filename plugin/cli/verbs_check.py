"""`freeflow doctor CONTAINER`: whether a container's programs have our libibverbs, or another one.

Verbs are added on request alone, so a container without them has nothing wrong. In one whose
LD_PRELOAD names our libibverbs each process should have it and no other one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from dataplane.control import VerbsDeviceFact
from plugin.cli import preload
from plugin.cli.loaded import File, Loaded, some_names
from plugin.settings import RESTART
from plugin.status import Finding, Status

_OPTIONS: Final = " ".join(preload.options({}, verbs=True))
_OURS: Final = preload.VERBS[0]


def have_verbs(processes: Sequence[Loaded]) -> bool:
    """Whether verbs were added to a container with these processes."""
    return any(process.asks_verbs or process.verbs for process in processes)


def notes(processes: Sequence[Loaded], devices: Sequence[VerbsDeviceFact]) -> Iterator[str]:
    """What is neither good nor bad; `devices` are those of the container's processes."""
    if not have_verbs(processes):
        others = [process for process in processes if process.other_verbs]
        if others:
            yield (
                f"verbs are not added; {len(others)} of {len(processes)} processes use another libibverbs "
                f"({others[0].other_verbs}); freeflow inject --verbs adds ours"
            )
        return
    lacking = [process for process in processes if process.asks_verbs and process.lacks_path]
    if lacking:
        yield (
            f"{some_names(lacking)}: musl loads the image's libibverbs beside ours, unless "
            f"{preload.VERBS_FOLDER} is in LD_LIBRARY_PATH"
        )
    if not devices:
        yield "no program has asked for a device of verbs yet"
    for device in devices:
        gids = ", ".join(gid for gid in device.gids if gid)
        yield f"process {device.pid} has a device of verbs with {gids}, and {device.queue_pairs} queue pairs"


def check_libraries(
    name: str, processes: Sequence[Loaded], own: File | None, companion: File | None
) -> Iterator[Finding]:
    """Which libibverbs the processes have; `own` and `companion` are the host's files."""
    if own is None or companion is None:
        yield Finding(
            "error",
            f"this host has no {_OURS}",
            "the plugin should have put it there with its companion at its start",
            RESTART,
        )
        return
    yield from _without(name, processes)
    several = [process for process in processes if process.verbs and process.other_verbs]
    if several:
        yield Finding(
            "warning",
            f"{len(several)} of {len(processes)} processes of {name} have two libibverbs",
            f"{some_names(several)}: {several[0].other_verbs} is loaded beside ours, by its path; what uses it finds "
            "no device of FreeFlow",
            "let the program open libibverbs.so.1 by its name, or link it with it",
        )
    old = [process for process in processes if process.verbs not in (None, own)]
    if old:
        yield Finding(
            "warning",
            f"{len(old)} of {len(processes)} processes of {name} run with another libibverbs than this host's",
            f"{some_names(old)}: started before the plugin was upgraded; it works as long as the library is as old",
            f"docker restart {name}",
        )


def _without(name: str, processes: Sequence[Loaded]) -> Iterator[Finding]:
    asking = [process for process in processes if process.asks_verbs and process.library]
    without = [process for process in asking if process.verbs is None]
    if without:
        using = without[0].other_verbs or "no libibverbs"
        yield Finding(
            "error",
            f"{len(without)} of {len(processes)} processes of {name} have not loaded our libibverbs",
            f"{some_names(without)}: {using} is loaded; ours wasn't in {preload.FOLDER} when they started",
            f"docker restart {name}",
        )
    alone = [process for process in processes if process.verbs and process.library is None]
    half = [process for process in processes if process.verbs and not process.companion]
    for what, lacking, effect in (
        ("libfreeflow.so", alone, "they find no device"),
        (
            "the companion of our libibverbs",
            half,
            "who opens libibverbs.so by this name, or files of the device, finds those of the image",
        ),
    ):
        if lacking:
            yield Finding(
                "error",
                f"{len(lacking)} of {len(processes)} processes of {name} lack {what}",
                f"{some_names(lacking)}: LD_PRELOAD doesn't name it; {effect}",
                f"start it with {_OPTIONS}",
            )


def check_verbs_on(name: str, status: Status) -> Iterator[Finding]:
    """Whether verbs are on for the host and a network of the container."""
    if status.settings.get("VERBS", "on") != "on":
        yield Finding(
            "warning",
            "verbs are off on this host",
            "the setting VERBS is off",
            "docker plugin set freeflow:latest VERBS=on, with the plugin disabled",
        )
        return
    networks = [
        network
        for network in status.networks
        if any(endpoint.container == name for endpoint in network.endpoints)
    ]
    if networks and not any(network.verbs for network in networks):
        yield Finding(
            "warning",
            f"verbs are off on all networks of {name}",
            "they were made with -o verbs=off",
            "make a network without that option",
        )
