"""Other hosts, put together: sessions with their routers, this host's RDMA device, its relay, and the connections over it.

What each of them is in is in `sessions.py`, `finder.py`, `relay.py` and `remote.py`; here is when which of them is started. A host
says that it has RDMA when it has a device; its relay runs as soon as another one has one too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from dataplane import control
from dataplane.router import relay_wire
from dataplane.router.devices import Device, Found
from dataplane.router.finder import Finder
from dataplane.router.identities import NoIdentities, choose
from dataplane.router.library_wire import IPAddress
from dataplane.router.loop import Loop
from dataplane.router.pairing import Pairing
from dataplane.router.peer_wire import Message, PeerHello
from dataplane.router.relay import SHIPPED, RelayProcess
from dataplane.router.remote import Phase, Remotes, words
from dataplane.router.seams import ArenaMemory, SocketTable
from dataplane.router.sessions import Sessions

log = structlog.get_logger()

OPEN_AGAIN: Final = 10.0
"""Seconds between two times that the relay opens a device."""
STUCK: Final = 3
"""Attempts at a link after which the device is opened again: it may be another one of the same name by now."""
IN_MEMORY: Final = Device("", 0, 0, "::", "memory", 0)


@dataclass(frozen=True, slots=True)
class Equipment:
    """What there is on this host. `memory`: relays of one machine, in place of a device, for tests."""

    swarm: Path | None = None
    relay: Path = SHIPPED
    memory: bool = False


class Hosts:
    """See the module."""

    def __init__(
        self,
        pairing: Pairing,
        loop: Loop,
        kernel: SocketTable,
        memory: ArenaMemory,
        equipment: Equipment,
    ) -> None:
        self._pairing = pairing
        self._loop = loop
        self._equipment = equipment
        self._key: str | None = None
        self._opened_at = float("-inf")
        self._fresh = False
        """The device that the relay has opened was there all the time."""
        self._counters: dict[str, int] = {}
        self._finder = Finder(loop, self._decide)
        self._relay = RelayProcess(loop, equipment.relay, self)
        self.sessions = Sessions(
            loop,
            NoIdentities("nothing is known of networks yet"),
            self,
            instance=os.urandom(16).hex(),
            port=control.DEFAULT_SESSION_PORT,
        )
        self.remotes = Remotes(
            pairing,
            loop,
            self.sessions,
            self._relay.say,
            kernel,
            memory,
            lambda: self.sessions.node,
        )
        self._started = False

    # --- what the server says

    def learned(self) -> None:
        """The driver knows something new."""
        knowledge = self._pairing.knowledge
        settings = knowledge.settings
        if settings.session_key != self._key:
            self._key = settings.session_key
            self.sessions.use(choose(self._equipment.swarm, settings.session_key))
        self.sessions.listen(settings.session_port)
        if not self._started:
            self._started = True
            self.sessions.start()
        self._look_around()

    def _look_around(self) -> None:
        """Which hosts are needed, and what for."""
        knowledge = self._pairing.knowledge
        wanted = self.remotes.wanted()
        self.sessions.want(wanted, knowledge.underlay)
        if not self._equipment.memory:
            self._finder.look_for(knowledge.underlay if wanted else None)
        self.remotes.learned()
        self._decide()

    def beat(self) -> None:
        """About once a second."""
        if not self._started:
            return
        self._look_around()
        self._relay.ask()

    def close(self) -> None:
        """The router ends; the relay finishes by itself."""
        self.sessions.close()
        self._finder.close()
        self._relay.close()

    # --- the device and the relay

    @property
    def found(self) -> Found:
        """This host's device, or why there is none."""
        return Found(IN_MEMORY, "") if self._equipment.memory else self._finder.found

    def _decide(self) -> None:
        """Say what this host has, and have the relay run if somebody can use it."""
        device = self.found.device
        knowledge = self._pairing.knowledge
        self.sessions.introduce(
            data_path=str(knowledge.underlay or ""),
            rdma=device is not None,
            ring=knowledge.settings.remote_ring,
        )
        if device is None:
            self._fresh = False
            self.remotes.device(self.found.why)
            return
        wanted = self._message(device)
        if self._relay.pid is None:
            if any(hello.rdma for hello in self.remotes.hellos()):
                self._relay.want(wanted)
            if self._relay.pid is None:
                self.remotes.device(self._relay.why or "no other host has RDMA")
        elif wanted == self._relay.opened and self.remotes.links.works:
            # Whatever was said of it meanwhile.
            self._fresh = True
            self.remotes.device("")
        elif wanted != self._relay.opened or not self._fresh or self._is_stuck():
            # Connections of the device that was there go first.
            self.remotes.device("the device is opened anew")
            if self.remotes.links.idle and self._loop.now() - self._opened_at > OPEN_AGAIN:
                self._finder.look()
                self._relay.want(wanted)
                self._opening()

    def _is_stuck(self) -> bool:
        """Whether links don't come up: the device may be another one of the same name."""
        links = self.remotes.links
        return (
            links.idle and links.tries > STUCK and self._loop.now() - self._opened_at > OPEN_AGAIN
        )

    def _message(self, device: Device) -> relay_wire.Open:
        spin = self._pairing.knowledge.settings.rule.spin
        transport = relay_wire.MEMORY if self._equipment.memory else relay_wire.VERBS
        return relay_wire.Open(device.name, device.port, device.gid_index, transport, spin)

    def _opening(self) -> None:
        self._opened_at = self._loop.now()
        self._fresh = True

    def relay_started(self) -> None:
        """See `relay.Owner`."""
        self._opening()
        self.remotes.device("the device is being opened")

    def relay_died(self) -> None:
        """See `relay.Owner`."""
        self._counters = {}
        self.remotes.relay_died()

    def relay_said(self, message: relay_wire.Message) -> None:
        """See `relay.Owner`."""
        match message:
            case relay_wire.Opened():
                self._device_opened(message)
            case relay_wire.RelayCounters():
                self._counters = message.counters
            case _:
                self.remotes.relay_said(message)

    def _device_opened(self, message: relay_wire.Opened) -> None:
        if message.error:
            why = f"{message.text or os.strerror(message.error)}"
            log.error("the relay can't open the device", reason=why)
            self._fresh = False
            self.remotes.device(why)
        elif self._fresh:
            opened = self._relay.opened
            log.info("RDMA", device="" if opened is None else opened.device, mtu=message.mtu)
            self.remotes.device("")

    # --- sessions (`sessions.SessionUser`)

    def up(self, peer: IPAddress, hello: PeerHello) -> None:
        """See `sessions.SessionUser`."""
        self.remotes.up(peer, hello)
        self._decide()

    def down(self, peer: IPAddress, reason: str) -> None:
        """See `sessions.SessionUser`."""
        self.remotes.down(peer, reason)

    def message(self, peer: IPAddress, message: Message) -> None:
        """See `sessions.SessionUser`."""
        self.remotes.message(peer, message)
        if isinstance(message, PeerHello):
            self._decide()

    def eased(self, peer: IPAddress) -> None:
        """See `sessions.SessionUser`."""
        self.remotes.eased(peer)

    # --- what can be seen

    def facts(self) -> control.RdmaFacts:
        """For statistics."""
        found, remotes = self.found, self.remotes
        device = found.device
        return control.RdmaFacts(
            on=self._pairing.knowledge.settings.rdma,
            device=None
            if device is None
            else control.DeviceFact(
                name=device.name,
                port=device.port,
                gid_index=device.gid_index,
                gid=device.gid,
                kind=device.kind,
                mtu=device.mtu,
            ),
            why=remotes.why,
            looked=tuple(
                f"{each.device} port {each.port}: {each.why}"
                if each.port
                else f"{each.device}: {each.why}"
                for each in found.looked
            ),
            sessions=self.sessions.reason,
            node=self.sessions.node,
            peers=tuple(
                self._peer(*each) for each in sorted(self.sessions.reasons().items(), key=str)
            ),
            connections=sum(remote.phase is Phase.GRANTED for remote in remotes.remotes.values()),
            registered=remotes.registered,
            granted=remotes.counts.granted,
            broken=remotes.counts.broken,
            left=remotes.counts.left,
            refused=words(remotes.counts.refused.items()),
            relay=self._counters,
            relay_starts=self._relay.starts,
        )

    def _peer(self, address: IPAddress, reason: str) -> control.PeerFact:
        peer = self.remotes.peers.get(address)
        link = self.remotes.links.link(address)
        hello = None if peer is None else peer.hello
        return control.PeerFact(
            address=str(address),
            node="" if peer is None else peer.node,
            session=hello is not None,
            reason=reason,
            rdma=hello is not None and hello.rdma,
            data_path="" if hello is None else hello.data_path,
            link=link.state.value,
            link_reason=link.reason,
            connections=0 if peer is None else len(peer.remotes),
        )
