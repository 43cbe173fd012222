"""The checks of two hosts: packets of every size, transfers, IPv6, spoofing; and measurements."""

from __future__ import annotations

import ipaddress
import secrets
import time
from typing import Any, Final

from plugin.network_test.gateway import PendingAnswer, ProbeError, Unreachable
from plugin.network_test.outcomes import PairMeasurement
from plugin.network_test.placement import ProbedHost
from plugin.network_test.plan import SIZES, Check, rounds
from plugin.network_test.scene import (
    Pair,
    Scene,
    Verdict,
    failed,
    not_here,
    pair_name,
    passed,
)

_ARRIVING: Final = 10.0
"""Seconds in which a datagram arrives, on a busy host, too."""
_SMALL: Final = 1 << 20


def check_mtu(scene: Scene) -> None:
    """A packet of exactly the MTU passes unfragmented in both directions; the sender's own
    interface refuses one byte more.
    """

    def start(pair: Pair) -> PendingAnswer:
        return scene.gateway.start(pair[0].two, "mtu_edges", 90.0, to=pair[1].one)

    scene.each_pair(Check.MTU, start, lambda _pair, found: _edges(found))


def _edges(found: Any) -> Verdict:
    mtu = int(found["mtu"])
    if not found["exact"]:
        passing = int(found["passing"])
        largest = f"the largest that passes is about {passing}" if passing else "none passes"
        return failed(
            f"packets of the interface's MTU, {mtu}, do not pass; {largest}",
            f"give the hosts' own network an MTU of {mtu + 50} or more, or the network -o mtu=…",
        )
    if not found["refused"]:
        return failed(f"the sender's interface took a packet larger than its MTU, {mtu}")
    return passed(f"MTU {mtu}")


def check_udp(scene: Scene) -> None:
    """Datagrams of up to 60,000 bytes come back unchanged, fragmented ones, too."""

    def start(pair: Pair) -> PendingAnswer:
        return scene.gateway.start(
            pair[0].two, "datagrams", 120.0, to=pair[1].one, sizes=list(SIZES)
        )

    def judge(_pair: Pair, found: Any) -> Verdict:
        if found["lost"]:
            lost = ", ".join(str(int(size)) for size in found["lost"])
            return failed(
                f"datagrams of {lost} bytes did not come back",
                "check that no firewall drops UDP or fragments between the hosts",
            )
        return passed(f"{len(SIZES)} sizes up to {SIZES[-1]}")

    scene.each_pair(Check.UDP, start, judge)


def check_transfer(scene: Scene) -> None:
    """Large transfers arrive with the hash that was sent, in both directions."""
    count = scene.plan.transfer

    def start(pair: Pair) -> PendingAnswer:
        return scene.gateway.start(
            pair[0].two, "transfer", 120.0, to=pair[1].one, count=count, seconds=60.0
        )

    scene.each_pair(Check.TRANSFER, start, lambda _pair, found: _hashes(found, count))


def _hashes(found: Any, count: int) -> Verdict:
    if found["there"] is True and found["back"] is True:
        return passed(f"{count >> 20} MiB in each direction")
    return failed(
        "what arrived is not what was sent",
        "freeflow bugreport, on both hosts; ethtool -K DEVICE tx off shows whether an offload does it",
    )


def check_ipv6(scene: Scene) -> None:
    """By IPv6 address: the edges of the MTU, and a transfer."""
    if not all(_ipv6(scene, host.one) for host in scene.hosts):
        lacking = [host.name for host in scene.hosts if not _ipv6(scene, host.one)]
        why = f"containers of {', '.join(lacking)} have no IPv6 address on the network"
        wants = scene.freeflow and scene.network.options.get("ipv6", "off") != "off"
        verdict = failed(why, "sysctl net.ipv6.conf.all.disable_ipv6, on that host")
        scene.ledger.add(Check.IPV6, "all hosts", verdict if wants else not_here(why))
        return

    def edges(pair: Pair) -> PendingAnswer:
        return scene.gateway.start(pair[0].two, "mtu_edges", 90.0, to=_ipv6(scene, pair[1].one))

    def transfer(pair: Pair) -> PendingAnswer:
        return scene.gateway.start(
            *(pair[0].two, "transfer", 120.0),
            to=_ipv6(scene, pair[1].one),
            count=_SMALL,
            seconds=30.0,
        )

    scene.each_pair(Check.IPV6, edges, lambda _pair, found: _edges(found))
    scene.each_pair(Check.IPV6, transfer, lambda _pair, found: _hashes(found, _SMALL))


def _ipv6(scene: Scene, address: str) -> str:
    found = scene.interface(address).get("ipv6") or [""]
    return str(found[0])


def check_spoofing(scene: Scene) -> None:
    """A container's frames with another container's IP or MAC address as source are dropped; an
    honest frame that is sent in the same way arrives.
    """
    if not scene.freeflow:
        why = f"networks of the driver {scene.network.driver} don't promise it"
        scene.ledger.add(Check.SPOOFING, "all hosts", not_here(why))
        return
    begin = time.monotonic()
    pairs = [pair for some in rounds(scene.hosts) for pair in some]
    sent = [(pair, _send_spoofed(scene, pair)) for pair in pairs]
    for pair, marks in sent:
        verdict = marks if isinstance(marks, tuple) else _arrived(scene, pair, marks)
        scene.ledger.add(Check.SPOOFING, pair_name(pair), verdict, time.monotonic() - begin)


_HONEST: Final = "honest"


def _send_spoofed(scene: Scene, pair: Pair) -> dict[str, str] | Verdict:
    """Send frames with right and wrong sources; what each has in it. Or why that failed."""
    source, target = pair
    own, mac = source.two, str(scene.interface(source.two).get("mac", ""))
    victim, victim_mac = _victim(scene, source, target)
    # The honest one last: when it is there, the others would be.
    kinds = {"IP address": (victim, mac), "MAC address": (own, victim_mac), _HONEST: (own, mac)}
    marks = {kind: secrets.token_hex(8) for kind in kinds}
    to_mac = str(scene.interface(target.one).get("mac", ""))
    try:
        for kind, (address, of) in kinds.items():
            scene.gateway.ask(
                *(source.two, "send_as", 10.0),
                own=own,
                source=address,
                source_mac=of,
                to=target.one,
                to_mac=to_mac,
                mark=marks[kind],
            )
    except ProbeError as error:
        if "PermissionError" in str(error):
            return not_here("the engine gives containers no NET_RAW, so they can't spoof")
        return failed(str(error))
    except Unreachable as error:
        return failed(f"the probe did not answer ({error})")
    return marks


def _arrived(scene: Scene, pair: Pair, marks: dict[str, str]) -> Verdict:
    """What has arrived of them. The honest frames show that others could have."""
    source, target = pair
    end = time.monotonic() + _ARRIVING

    def noted(kind: str) -> bool:
        return bool(scene.gateway.ask(target.one, "noted", 10.0, mark=marks[kind]))

    try:
        while not noted(_HONEST) and time.monotonic() < end:
            time.sleep(0.1)
        found = {kind for kind in marks if noted(kind)}
    except (ProbeError, Unreachable) as error:
        return failed(f"the probe did not answer ({error})")
    wrong = sorted(found - {_HONEST})
    if wrong:
        return failed(
            f"frames with another container's {' and '.join(wrong)} arrived",
            f"freeflow doctor, on {source.name}: its source filter is missing or was changed",
        )
    if _HONEST not in found:
        return failed("frames with the right source did not arrive either")
    return passed("IP and MAC address")


def _victim(scene: Scene, source: ProbedHost, target: ProbedHost) -> tuple[str, str]:
    """Another container than these two: its addresses."""
    for host in scene.hosts:
        for address in host.probes.values():
            if address not in (source.two, target.one):
                return address, str(scene.interface(address).get("mac", ""))
    # Of one host alone there is nobody else; nobody has these.
    nobody = ipaddress.IPv4Address(int(ipaddress.IPv4Address(source.two)) ^ 0x40)
    return str(nobody), "02:42:fe:fe:fe:fe"


def measure(scene: Scene) -> None:
    """Throughput of one TCP connection, and round trips, between each two hosts in both
    directions, and within each host.
    """
    for pairs in rounds(scene.hosts):
        for back in (False, True):
            turned = [(b, a) if back else (a, b) for a, b in pairs if not (back and a is b)]
            _measure(scene, turned)


def _measure(scene: Scene, pairs: list[Pair]) -> None:
    seconds = scene.plan.measuring
    trips = _answers(scene, pairs, "round_trips", count=200, seconds=10.0)
    rates = _answers(scene, pairs, "throughput", seconds=seconds)
    for pair in pairs:
        name = pair_name(pair)
        try:
            trip, rate = trips[name], rates[name]
            measured = PairMeasurement(
                source=pair[0].name,
                target=pair[1].name,
                bits_per_second=float(rate["bits_per_second"]),
                round_trip_ms=float(trip["median"]),
                round_trip_p99_ms=float(trip["p99"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            why = trips[name] if isinstance(trips[name], str) else rates[name]
            text = str(why) if isinstance(why, str) else f"no usable answer: {error}"
            scene.ledger.add(Check.MEASURE, name, failed(text, "freeflow doctor, on both hosts"))
            continue
        scene.ledger.measurements.append(measured)
        scene.ledger.add(Check.MEASURE, name, passed())


def _answers(scene: Scene, pairs: list[Pair], call: str, **arguments: Any) -> dict[str, Any]:
    """Each pair's answer, or a text: why there is none."""
    pending = [
        (pair, scene.gateway.start(pair[0].two, call, 30.0, to=pair[1].one, **arguments))
        for pair in pairs
    ]
    found: dict[str, Any] = {}
    for pair, answer in pending:
        try:
            found[pair_name(pair)] = answer.result()
        except (Unreachable, ProbeError) as error:
            found[pair_name(pair)] = str(error)
    return found
