"""Connects containers of this host with those of other hosts: sessions between routers, an RDMA
device, a relay, and the connections.

The parts are in `sessions.py`, `device_scanner.py`, `relay_process.py`, `relay_transports.py` and
`remote.py`. This module decides when each of them is started. A host announces RDMA when it has a
device, and TCP between relays once it knows whether it has one. Its relay is started when another
host announces the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import structlog

from dataplane import control
from dataplane.router import relay_wire
from dataplane.router.device_scanner import NOT_YET, DeviceScanner
from dataplane.router.devices import Device, DeviceScan
from dataplane.router.identities import NoIdentities, choose
from dataplane.router.interhost_facts import rdma_facts, relay_facts
from dataplane.router.link_sockets import LinkSockets
from dataplane.router.links import KINDS
from dataplane.router.loop import Loop
from dataplane.router.pairing import Pairing
from dataplane.router.relay_process import SHIPPED, RelayProcess
from dataplane.router.relay_ruling import RelayRuling
from dataplane.router.relay_transports import RelayTransport
from dataplane.router.remote import Remotes
from dataplane.router.remote_events import Transport
from dataplane.router.remote_requests import Open
from dataplane.router.seams import ArenaMemory, SocketTable
from dataplane.router.sessions import Sessions

log = structlog.get_logger()

ENCRYPTION: Final = {
    "off": relay_wire.ENCRYPT_NOTHING,
    "messages": relay_wire.ENCRYPT_MESSAGES,
    "all": relay_wire.ENCRYPT_ALL,
}
"""The values of `RELAY_ENCRYPTION`, and the relay's numbers of them. The greater of two hosts'
counts."""
IN_MEMORY: Final = Device("", 0, 0, "::", "memory", 0)


@dataclass(frozen=True, slots=True)
class Equipment:
    """What this host has. For tests: `memory`, relays of one machine use memory instead of a
    device; `open`, each connection may enter TCP between relays.
    """

    swarm: Path | None = None
    relay: Path = SHIPPED
    memory: bool = False
    open: bool = False


class InterHost:
    """See the module. A `RelayOwner`."""

    def __init__(
        self,
        pairing: Pairing,
        loop: Loop,
        sockets: SocketTable,
        memory: ArenaMemory,
        equipment: Equipment,
    ) -> None:
        self._pairing = pairing
        self._loop = loop
        self._equipment = equipment
        self._key: str | None = None
        self._counters: dict[str, int] = {}
        self._scanner = DeviceScanner(loop, self._decide)
        self._relay = RelayProcess(loop, equipment.relay, self)
        kinds = {**KINDS, Transport.RDMA: relay_wire.LOOPBACK} if equipment.memory else KINDS
        self._ruling = RelayRuling(pairing, loop, sockets)
        self.remotes = Remotes(
            pairing,
            loop,
            partial(
                Sessions,
                loop,
                NoIdentities("no snapshot of networks yet"),
                instance=os.urandom(16).hex(),
                port=control.DEFAULT_SESSION_PORT,
            ),
            self._relay.send,
            sockets,
            memory,
            self._decide,
            partial(LinkSockets, loop),
            Open() if equipment.open else self._ruling.gate,
            kinds,
        )
        self._ruling.join(self.remotes)
        self.sessions = self.remotes.sessions
        self._transports = {
            transport: RelayTransport(
                transport, kind, loop, self._relay, self.remotes, self._scanner.scan
            )
            for transport, kind in kinds.items()
        }
        pairing.use_remote(self.remotes)
        self._started = False

    # --- called by the server

    def learned(self) -> None:
        """The driver has sent a snapshot."""
        knowledge = self._pairing.knowledge
        settings = knowledge.settings
        if settings.session_key != self._key:
            self._key = settings.session_key
            self.sessions.use(choose(self._equipment.swarm, settings.session_key))
        self.sessions.listen(settings.session_port)
        if not self._started:
            self._started = True
            self.sessions.start()
        self._refresh()

    def _refresh(self) -> None:
        """Find out which hosts are needed, and for what."""
        knowledge = self._pairing.knowledge
        wanted = self.remotes.wanted()
        self.sessions.want(wanted, knowledge.underlay)
        if not self._equipment.memory:
            needed = self.remotes.hosts.sharing(Transport.RDMA)
            self._scanner.use(knowledge.underlay if needed else None)
        # First: what the relay encrypts may not be enough any more.
        self._decide()
        self.remotes.learned()
        self._decide()

    def tick(self) -> None:
        """To be called about once a second."""
        if not self._started:
            return
        self._refresh()
        self._ruling.tick()
        self._relay.poll()

    def close(self) -> None:
        """The router ends. The relay finishes by itself."""
        self.sessions.close()
        self._scanner.close()
        self._relay.close()

    # --- the device and the relay

    @property
    def scanned(self) -> DeviceScan:
        """This host's device, or why there is none."""
        return DeviceScan(IN_MEMORY, "") if self._equipment.memory else self._scanner.result

    def _decide(self) -> None:
        """Announce what this host has, and start the relay if another host can use it."""
        device, knowledge = self.scanned.device, self._pairing.knowledge
        settings, keys = knowledge.settings, knowledge.encryption
        relay = self._transports[Transport.RELAY]
        why_not = self._why_no_relay()
        self.sessions.introduce(
            data_path=str(knowledge.underlay or ""),
            rdma=device is not None,
            ring=settings.remote_ring,
            relay=not why_not and not relay.failure,
            relay_ring=settings.relay_ring,
            relay_encryption=knowledge.relay_encryption,
            tunnel_offload=knowledge.offload,
            verbs=settings.verbs,
            verbs_cm=settings.verbs,
            verbs_groups=settings.verbs,
            wireguard=() if keys is None else keys.keys,
            wireguard_proofs=() if keys is None else keys.proofs,
            wireguard_slot=0 if keys is None else keys.slot,
            wireguard_port=0 if keys is None else keys.port,
        )
        hellos = self.remotes.hellos()
        self._transports[Transport.RDMA].decide(
            None if device is None else self._message(device),
            self.scanned.why,
            others=any(hello.rdma for hello in hellos),
        )
        tcp = relay_wire.RelayOpen(
            "", 0, 0, relay.kind, settings.relay_spin, ENCRYPTION[knowledge.relay_encryption]
        )
        relay.decide(None if why_not else tcp, why_not, others=any(hello.relay for hello in hellos))

    def _why_no_relay(self) -> str:
        """Why this host doesn't speak TCP between relays; "" if it does.

        It waits for the first scan: a link over TCP would be in the way of one over RDMA.
        """
        if not self._pairing.knowledge.settings.relay:
            return "RELAY=off"
        if not self.remotes.hosts.sharing(Transport.RELAY):
            return "it is off for all networks that are shared with other hosts"
        return NOT_YET.why if self.scanned == NOT_YET else ""

    def _message(self, device: Device) -> relay_wire.RelayOpen:
        spin = self._pairing.knowledge.settings.rule.spin
        kind = self._transports[Transport.RDMA].kind
        return relay_wire.RelayOpen(device.name, device.port, device.gid_index, kind, spin)

    def relay_started(self) -> None:
        """The relay runs, and opens what is wanted."""
        for transport in self._transports.values():
            if self._relay.opened(transport.kind) is not None:
                transport.opening()

    def relay_opened(self, transport: int, message: relay_wire.RelayOpened) -> None:
        """The relay has opened a transport, or can't."""
        for one in self._transports.values():
            if one.kind == transport:
                one.opened(message)
        self._decide()

    def relay_died(self) -> None:
        """The relay has ended."""
        self._counters = {}
        self._ruling.use.forget_relay()
        self.remotes.relay_died()

    def relay_message(self, message: relay_wire.Message) -> None:
        """The relay reports something about links and connections."""
        match message:
            case relay_wire.RelayCounters():
                self._counters = message.counters
                self._ruling.use.answered()
            case relay_wire.RelayUsage():
                self._ruling.use.counted(message.arena, message.link, message.values)
            case _:
                self.remotes.relay_message(message)

    # --- for statistics

    @property
    def relay_process(self) -> int | None:
        """The relay's process; None: none runs."""
        return self._relay.pid

    def facts(self) -> tuple[control.RdmaFacts, control.RelayFacts]:
        """What `freeflow status` and metrics show of it."""
        knowledge, now = self._pairing.knowledge, self._loop.now()
        settings = msgspec.structs.replace(
            knowledge.settings, relay_encryption=knowledge.relay_encryption
        )
        return (
            rdma_facts(self.remotes, self.scanned, settings, self._counters, now),
            relay_facts(self.remotes, settings),
        )
