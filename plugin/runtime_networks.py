"""Tells freeflow-runc which networks are accelerated.

freeflow-runc asks when a container is created (`plugin/runtime/question.c`). A file answers for the
networks that this host has; it needs no process, so it also works while the plugin restarts. For a
network that isn't in the file, such as one whose name nobody has looked up yet, the runtime asks on
the admin socket and waits for a short time.

The engine holds the container's lock meanwhile, so it is asked about networks alone.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import msgspec
import structlog

from driver.errors import EngineError, FreeFlowError
from driver.model import Network, NetworkView
from driver.names import is_freeflow
from driver.other_networks import OtherNetwork, why_not
from driver.vip_table import NetworkState

log = structlog.get_logger()

FILE: Final = "networks.json"
PATIENCE: Final = 0.08
"""Seconds for the engine's answer; freeflow-runc waits for 0.1 s."""


class AttachedNetwork(msgspec.Struct, frozen=True):
    """A network as Docker has noted it for a container; `id` is empty before its first start."""

    name: str = ""
    id: str = ""


class RuntimeQuestion(msgspec.Struct, frozen=True):
    """The networks of a container that is about to be created."""

    networks: tuple[AttachedNetwork, ...] = ()


class RuntimeAnswer(msgspec.Struct, frozen=True):
    """`accelerated`: whether one of them is accelerated."""

    accelerated: bool


class NetworkList(msgspec.Struct, frozen=True):
    """The file: names by ID, of accelerated networks. A name that isn't known is empty."""

    networks: dict[str, str]


class _Store(Protocol):
    def networks(self) -> list[Network]: ...


class _Engine(Protocol):
    def network(self, network_id: str) -> NetworkView | None: ...


@dataclass(slots=True, eq=False)
class RuntimeNetworks:
    """`states` are the sync loop's, by network ID. `on`: whether this host accelerates at all.

    `swarm`: whether the driver's networks are the Swarm's (SCOPE=global). `others`: accelerated
    networks of other drivers, and `all_others` the setting OTHER_NETWORKS.
    """

    store: _Store
    states: Callable[[], Mapping[str, NetworkState]]
    engine: _Engine
    path: Path
    on: bool = True
    swarm: bool = True
    others: Callable[[], Sequence[OtherNetwork]] = tuple
    all_others: bool = False
    _written: bytes | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def known(self) -> dict[str, str]:
        """This host's accelerated networks: names by ID."""
        if not self.on:
            return {}
        states = self.states()
        found = {network.view.id: network.view.name for network in self.others()}
        for network in self.store.networks():
            if network.acceleration:
                state = states.get(network.id)
                view = state.view if state is not None else None
                found[network.id] = view.name if view is not None else ""
        return found

    def publish(self) -> None:
        """Write the file if it would change. A failure is logged; freeflow-runc then asks."""
        with self._lock:
            try:
                content = msgspec.json.encode(NetworkList(self.known()))
                if content != self._written:
                    _replace(self.path, content)
                    self._written = content
            except (OSError, FreeFlowError) as error:
                # A request of Docker may be what has changed something: it must not fail.
                log.warning("the list of networks can't be written", reason=str(error))

    def answer(self, question: RuntimeQuestion) -> RuntimeAnswer:
        """Whether a container with these networks is to get the library."""
        if not self.on:
            return RuntimeAnswer(False)
        known = self.known()
        names = set(known.values()) - {""}
        if any(
            network.id in known or network.name in known or network.name in names
            for network in question.networks
        ):
            return RuntimeAnswer(True)
        return RuntimeAnswer(any(self._looked_up(network) for network in question.networks))

    def _looked_up(self, network: AttachedNetwork) -> bool:
        if not network.name:
            return False
        try:
            view = self.engine.network(network.name)
        except EngineError:
            return False
        if view is None:
            # The engine knows all networks but those of the Swarm that this host has not used yet.
            # Nobody here can tell their drivers, and on another network the library does nothing.
            return self.swarm
        if not is_freeflow(view.driver):
            return why_not(view, self.all_others) is None
        return view.options.get("acceleration", "on") != "off"


def _replace(path: Path, content: bytes) -> None:
    """Only root may read or write the file, and a reader gets all of it. Raises OSError."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
        file.write(content)
    temporary.replace(path)
