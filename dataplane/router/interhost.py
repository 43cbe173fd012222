"""Connects containers of this host with those of other hosts: sessions between routers, an RDMA
device, a relay, and the connections.

The parts are in `sessions.py`, `device_scanner.py`, `relay_process.py` and `remote.py`. This module
decides when each of them is started. A host announces RDMA when it has a device. Its relay is
started when another host announces RDMA too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from dataplane import control
from dataplane.router import relay_wire
from dataplane.router.device_scanner import DeviceScanner
from dataplane.router.devices import Device, DeviceScan
from dataplane.router.identities import NoIdentities, choose
from dataplane.router.library_wire import IPAddress
from dataplane.router.loop import Loop
from dataplane.router.pairing import Pairing
from dataplane.router.reasons import Reason
from dataplane.router.relay_process import SHIPPED, RelayProcess
from dataplane.router.remote import Remotes
from dataplane.router.remote_events import LIVE
from dataplane.router.seams import ArenaMemory, SocketTable
from dataplane.router.sessions import Sessions

log = structlog.get_logger()

OPEN_AGAIN: Final = 10.0
"""Seconds between two times that the relay opens a device."""
STUCK: Final = 3
"""Attempts at a link after which the device is opened again: it may have been replaced by another
one of the same name."""
IN_MEMORY: Final = Device("", 0, 0, "::", "memory", 0)


@dataclass(frozen=True, slots=True)
class Equipment:
    """What this host has. `memory`: for tests, relays of one machine use memory instead of a
    device.
    """

    swarm: Path | None = None
    relay: Path = SHIPPED
    memory: bool = False


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
        self._opened_at = float("-inf")
        self._fresh = False
        """The device has been there since the relay opened it."""
        self._counters: dict[str, int] = {}
        self._scanner = DeviceScanner(loop, self._decide)
        self._relay = RelayProcess(loop, equipment.relay, self, memory=equipment.memory)
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
        )
        if equipment.memory:
            self.remotes.links.transport = relay_wire.LOOPBACK
        self.sessions = self.remotes.sessions
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
            self._scanner.use(knowledge.underlay if wanted else None)
        self.remotes.learned()
        self._decide()

    def tick(self) -> None:
        """To be called about once a second."""
        if not self._started:
            return
        self._refresh()
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
        device = self.scanned.device
        knowledge = self._pairing.knowledge
        self.sessions.introduce(
            data_path=str(knowledge.underlay or ""),
            rdma=device is not None,
            ring=knowledge.settings.remote_ring,
        )
        if device is None:
            self._fresh = False
            self.remotes.device(self.scanned.why)
            return
        wanted = self._message(device)
        if self._relay.pid is None:
            if any(hello.rdma for hello in self.remotes.hellos()):
                self._relay.want(wanted)
            if self._relay.pid is None:
                self.remotes.device(self._relay.why or "no other host has RDMA")
        elif wanted == self._relay.opened and self.remotes.links.works:
            # Whatever was reported about it meanwhile.
            self._fresh = True
            self.remotes.device("")
        elif wanted != self._relay.opened or not self._fresh or self._is_stuck():
            # First the connections over the device as it was have to end.
            self.remotes.device("the device is opened again")
            if self.remotes.links.idle and self._loop.now() - self._opened_at > OPEN_AGAIN:
                self._scanner.scan()
                self._relay.want(wanted)
                self._opening()

    def _is_stuck(self) -> bool:
        """Whether links fail: the device may have been replaced by one of the same name."""
        links = self.remotes.links
        return (
            links.idle and links.tries > STUCK and self._loop.now() - self._opened_at > OPEN_AGAIN
        )

    def _message(self, device: Device) -> relay_wire.RelayOpen:
        spin = self._pairing.knowledge.settings.rule.spin
        transport = self.remotes.links.transport
        return relay_wire.RelayOpen(device.name, device.port, device.gid_index, transport, spin)

    def _opening(self) -> None:
        self._opened_at = self._loop.now()
        self._fresh = True

    def relay_started(self) -> None:
        """The relay runs, and opens the device."""
        self._opening()
        self.remotes.device("the device is being opened")

    def relay_died(self) -> None:
        """The relay has ended."""
        self._counters = {}
        self.remotes.relay_died()

    def relay_message(self, message: relay_wire.Message) -> None:
        """The relay reports something about the device, or about links and connections."""
        match message:
            case relay_wire.RelayOpened():
                self._device_opened(message)
            case relay_wire.RelayCounters():
                self._counters = message.counters
            case _:
                self.remotes.relay_message(message)

    def _device_opened(self, message: relay_wire.RelayOpened) -> None:
        if message.error:
            why = message.text or os.strerror(message.error)
            log.error("relay can't open the RDMA device; connections stay on TCP", reason=why)
            self._fresh = False
            self.remotes.device(why)
        elif self._fresh:
            opened = self._relay.opened
            log.info(
                "RDMA device open", device="" if opened is None else opened.device, mtu=message.mtu
            )
            self.remotes.device("")

    # --- for statistics

    def facts(self) -> control.RdmaFacts:
        """What `freeflow status` and metrics show of it."""
        scan, remotes = self.scanned, self.remotes
        counts = remotes.connections.counts
        return control.RdmaFacts(
            on=self._pairing.knowledge.settings.rdma,
            device="" if scan.device is None else str(scan.device),
            why=remotes.why,
            skipped=tuple(
                f"{one.device} port {one.port}: {one.why}"
                if one.port
                else f"{one.device}: {one.why}"
                for one in scan.unusable
            ),
            no_sessions=self.sessions.reason,
            node=self.sessions.node,
            hosts=tuple(
                self._peer(address, reason)
                for address, reason in sorted(self.sessions.reasons().items(), key=str)
            ),
            connections=sum(one.state.phase in LIVE for one in remotes.connections),
            memory=remotes.connections.registered,
            granted=counts.granted,
            broken=counts.broken,
            left=counts.left,
            refused=_by_word(remotes.requests.refused),
            relay=self._counters,
        )

    def _peer(self, address: IPAddress, reason: str) -> control.PeerFact:
        host = self.remotes.hosts.get(address)
        link = self.remotes.links.link(address)
        hello = None if host is None else host.hello
        return control.PeerFact(
            address=str(address),
            node="" if host is None else host.node,
            session=hello is not None,
            reason=reason,
            rdma=hello is not None and hello.rdma,
            data_path="" if hello is None else hello.data_path,
            link=link.state.value,
            link_reason=link.reason,
            connections=0 if host is None else len(self.remotes.connections.of(host)),
        )


def _by_word(counts: Mapping[int, int]) -> dict[str, int]:
    return {Reason(number).word: count for number, count in counts.items()}
