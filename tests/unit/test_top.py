"""`freeflow top`: rates, groups, order and filter."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.control import RING_MOST, RingTraffic, TcpTraffic
from plugin.cli.top import BY, SORTS, Top, TopReport, TopView, head, show
from plugin.rates import Rates, measure, rates_of
from plugin.traffic_names import NamedTraffic, TrafficReport
from tests.unit.statuses import NET, TRAFFIC


def connection(cookie: int = 1, read: float = 10.0, **fields: Any) -> NamedTraffic:
    made = NamedTraffic(
        namespace=7,
        container="web.1.abc",
        network=NET,
        local=f"10.0.4.7:{4000 + cookie}",
        remote="10.0.4.8:80",
        path="shm",
        age=100.0,
        cookie=cookie,
        read=read,
        service="web",
        peer="db.1",
        peer_service="db",
        host="host1",
    )
    return msgspec.structs.replace(made, **fields)


def tcp(came: int, went: int, segments: int = 0, again: int = 0) -> TcpTraffic:
    return TcpTraffic(
        bytes_in=came,
        bytes_out=went,
        segments_in=segments,
        segments_out=segments,
        retransmits=again,
        round_trip=1500,
    )


def ring(came: int, went: int, messages: int | None = None, incarnation: int = 3) -> RingTraffic:
    return RingTraffic(
        incarnation=incarnation,
        bytes_in=came,
        bytes_out=went,
        messages_in=messages,
        messages_out=messages,
    )


def report(read: float, *connections: NamedTraffic, **fields: Any) -> TrafficReport:
    values: dict[str, Any] = {"reasons": {}, "read": read, "router_cpu": read / 50}
    values |= {"networks": {NET: "backend"}, "host": "host1"} | fields
    return TrafficReport(connections=connections, **values)


def rates(before: NamedTraffic, now: NamedTraffic) -> Rates:
    found = rates_of(now, before)
    assert found is not None
    return found


def shown(view: TopView, *reports: TrafficReport) -> TopReport:
    live = Top(view)
    for each in reports:
        live.add(each)
    found = live.report()
    assert found is not None
    return found


# --- rates


def test_tcp_and_ring_together() -> None:
    """Rates are the sum of what TCP and the ring have carried, per second."""
    found = rates(
        connection(read=10.0, tcp=tcp(100, 200, 10, 1), ring=ring(0, 0, 0)),
        connection(read=12.0, tcp=tcp(300, 260, 14, 3), ring=ring(2000, 4000, 20)),
    )
    assert found == Rates(
        bytes_in=1100.0, bytes_out=2030.0, messages_in=12.0, messages_out=12.0, retransmits=1.0
    )
    assert (found.bytes, found.messages) == (3130.0, 24.0)


def test_segments_wrap() -> None:
    """Segments are counted modulo 2³²; a wrap is no large rate."""
    found = rates(
        connection(read=10.0, tcp=tcp(0, 0, (1 << 32) - 3, (1 << 32) - 1)),
        connection(read=11.0, tcp=tcp(0, 0, 7, 0)),
    )
    assert (found.messages_in, found.messages_out, found.retransmits) == (10.0, 10.0, 1.0)


def test_nobody_counts_messages() -> None:
    """Messages are unknown while bytes move that nobody counts as messages, and 0 if none do."""
    before = connection(read=10.0, ring=ring(0, 0))
    found = rates(before, connection(read=11.0, ring=ring(10, 0)))
    assert (found.messages_in, found.messages_out, found.messages) == (None, 0.0, None)


def test_a_new_slot() -> None:
    """A slot that is granted between two reports counts from 0, if that is known."""
    before = connection(read=10.0, tcp=tcp(50, 50), ring=ring(9000, 9000, 9))
    slot = ring(100, 200, 2, incarnation=4)
    now = connection(read=12.0, tcp=tcp(50, 50), ring=slot, age=1.0)
    assert rates(before, now).bytes_in == 50.0
    assert rates(before, msgspec.structs.replace(now, age=30.0)).bytes_in == 0.0
    assert rates(before, msgspec.structs.replace(now, age=None)).bytes_in == 0.0


@pytest.mark.parametrize(
    "said",
    [
        ring(RING_MOST * 2 + 1001, 0),
        ring(0, (1 << 64) - 1),
        ring(999, 0),
        ring(0, 0, incarnation=9),
    ],
)
def test_hostile_rings(said: RingTraffic) -> None:
    """Words that go back, or further than memory can copy, are not believed; TCP's rates are."""
    before = connection(read=10.0, tcp=tcp(0, 0), ring=ring(1000, 0))
    now = connection(read=12.0, tcp=tcp(20, 40), ring=said)
    found = rates(before, now)
    assert (found.bytes_in, found.bytes_out) == (10.0, 20.0)
    assert rates_of(msgspec.structs.replace(now, tcp=None), before) is None


def test_hostile_messages() -> None:
    """A sender may claim any number of messages; each has a byte at least, and none is negative."""
    before = connection(read=10.0, ring=ring(0, 0, 5))
    many = rates(before, connection(read=11.0, ring=ring(10, 10, 1 << 63)))
    assert (many.messages_in, many.messages_out) == (10.0, 10.0)
    fewer = rates(before, connection(read=11.0, ring=ring(10, 10, 2)))
    assert (fewer.messages_in, fewer.messages_out) == (0.0, 0.0)


COUNTS = st.integers(0, (1 << 64) - 1)
RINGS = st.none() | st.builds(
    RingTraffic,
    incarnation=st.integers(1, 2),
    bytes_in=COUNTS,
    bytes_out=COUNTS,
    messages_in=st.none() | COUNTS,
    messages_out=st.none() | COUNTS,
)


@given(
    before=RINGS,
    now=RINGS,
    seconds=st.floats(1e-6, 1e6),
    age=st.none() | st.floats(0, 1e9),
)
def test_whatever_a_ring_says(
    before: RingTraffic | None, now: RingTraffic | None, seconds: float, age: float | None
) -> None:
    """No words of a ring make an error, a negative rate, or one that memory can't have."""
    found = rates_of(
        connection(read=seconds, tcp=tcp(0, 0), ring=now, age=age),
        connection(read=0.0, tcp=tcp(0, 0), ring=before),
    )
    assert found is not None
    for rate in (found.bytes_in, found.bytes_out):
        assert 0 <= rate <= RING_MOST * 1.001
    assert 0 <= (found.messages_in or 0) <= found.bytes_in
    assert 0 <= (found.messages_out or 0) <= found.bytes_out


def test_what_has_no_rates() -> None:
    """A connection that is new, or was read at the same moment, has no rates yet."""
    one = connection(tcp=tcp(1, 1))
    assert rates_of(one, None) is None
    assert rates_of(one, one) is None
    assert rates_of(connection(read=11.0), connection(read=10.0)) is None


def test_processors() -> None:
    """Router and relay show parts of a processor; one that was restarted has none at first."""
    before = report(10.0, router_cpu=1.0, relay_cpu=4.0, containers_relay_cpu={7: 1.0})
    now = report(12.0, router_cpu=1.5, relay_cpu=5.0, containers_relay_cpu={7: 1.2, 8: 0.4})
    found = measure(now, before)
    assert (found.router, found.relay) == (0.25, 0.5)
    assert found.relay_by_container == {7: pytest.approx(0.1), 8: 0.2}
    again = measure(report(14.0, router_cpu=0.2, relay_cpu=None), now)
    assert (again.router, again.relay) == (None, None)
    first = measure(now, None)
    assert (first.router, first.relay, first.relay_by_container) == (None, None, {})


# --- views


def two_reports() -> tuple[TrafficReport, TrafficReport]:
    """Four ends in 2 s: 1 and 2 of web.1.abc, 3 of db.1, 4 without a name."""
    quiet = tcp(0, 0)
    before = [connection(number, 10.0, tcp=quiet) for number in range(1, 5)]
    now = [
        connection(1, 12.0, tcp=tcp(4000, 100, 4), path="overlay", reason="short"),
        connection(2, 12.0, tcp=tcp(100, 2000, 8), path="relay", host="host2"),
        connection(
            3, 12.0, tcp=tcp(0, 6000, 2, 8), container="db.1", namespace=8, service="db", path="shm"
        ),
        connection(
            4, 12.0, tcp=quiet, container="", namespace=9, service="", host="", path="overlay"
        ),
    ]
    before = [
        msgspec.structs.replace(one, namespace=other.namespace)
        for one, other in zip(before, now, strict=True)
    ]
    return (
        report(10.0, *before, containers_relay_cpu={7: 1.0}),
        report(12.0, *now, containers_relay_cpu={7: 1.5}),
    )


def ports(found: TopReport) -> list[str]:
    return [row.local.rpartition(":")[2] for row in found.rows]


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("bytes", "3 1 2 4"),
        ("in", "1 2 4 3"),
        ("out", "3 2 1 4"),
        ("messages", "2 1 3 4"),
        ("retransmits", "3 4 1 2"),
        ("name", "4 3 1 2"),
    ],
)
def test_order(sort: str, order: str) -> None:
    """The greatest come first, or the first name; equal ones by name; reversed all is the other
    way round.
    """
    expected = [f"400{number}" for number in order.split()]
    assert ports(shown(TopView(sort=sort), *two_reports())) == expected
    assert ports(shown(TopView(sort=sort, reverse=True), *two_reports())) == expected[::-1]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("WEB.1", ["4001", "4002"]),
        ("relay", ["4002"]),
        ("host2", ["4002"]),
        ("short", ["4001"]),
        (":4003", ["4003"]),
        ("backend", ["4001", "4002", "4003", "4004"]),
        ("nothing", []),
    ],
)
def test_filter(wanted: str, found: list[str]) -> None:
    """A filter is found in any text of a connection, whatever its case."""
    assert sorted(ports(shown(TopView(filter=wanted), *two_reports()))) == found


@pytest.mark.parametrize(
    ("by", "names", "ends"),
    [
        ("container", ["db.1", "web.1.abc", "9"], [1, 2, 1]),
        ("service", ["web", "db", "-"], [2, 1, 1]),
        ("host", ["host1", "host2", "-"], [2, 1, 1]),
        ("path", ["shm", "overlay", "relay"], [1, 2, 1]),
    ],
)
def test_groups(by: str, names: list[str], ends: list[int]) -> None:
    """Each group has the sums of its ends, and those that belong to none are a group, too."""
    found = shown(TopView(by=by), *two_reports())
    assert sorted(row.name for row in found.rows) == sorted(names)
    assert {row.name: row.ends for row in found.rows} == dict(zip(names, ends, strict=True))
    assert sum(row.bytes for row in found.rows) == 6100.0
    assert sum(row.retransmits or 0 for row in found.rows) == 4.0
    assert all(sum(row.paths.values()) == row.ends for row in found.rows)


def test_the_relay_of_a_container() -> None:
    """The relay's work is shown for containers, which it is counted for, and orders them."""
    found = shown(TopView(by="container", sort="relay"), *two_reports())
    assert [row.relay_cpu for row in found.rows] == [25.0, None, None]
    assert found.rows[0].name == "web.1.abc"
    assert {row.relay_cpu for row in shown(TopView(by="service"), *two_reports()).rows} == {None}


def test_the_first_report() -> None:
    """The first report has connections without rates; before it there is nothing."""
    assert Top().report() is None
    found = shown(TopView(), two_reports()[0])
    assert len(found.rows) == 4
    assert {row.bytes_in for row in found.rows} == {None}
    assert found.interval == 0
    assert "-" in show(found)
    groups = shown(TopView(by="path"), two_reports()[0])
    assert {row.bytes_in for row in groups.rows} == {None}


# --- as text


def test_a_table() -> None:
    """Each connection is a line with its peer, path, rates, round trip and reason."""
    lines = show(shown(TopView(), *two_reports())).splitlines()
    assert lines[0].split() == (
        [
            "CONTAINER",
            "LOCAL",
            "REMOTE",
            "PEER",
            "PATH",
            "IN/s",
            "OUT/s",
            "MSG",
            "IN/s",
            "MSG",
            "OUT/s",
            "RETR/s",
            "RTT",
            "WHY",
        ]
    )
    assert " ".join(lines[2].split()) == (
        "web.1.abc 10.0.4.7:4001 10.0.4.8:80 db.1 on host1 overlay 2.0 KiB 50 B 2 2 0 1.50 ms short"
    )


def test_a_table_of_groups() -> None:
    """Each group is a line with its ends, rates and paths; a container's with the relay's work."""
    text = show(shown(TopView(by="container"), *two_reports()))
    assert "web.1.abc  2     2.0 KiB" in text
    assert re.search(r"25\.0 %  █+[▏▎▍▌▋▊▉]? +1 overlay, 1 relay", text)
    assert "RELAY" not in show(shown(TopView(by="service"), *two_reports()))


def test_bars_of_groups() -> None:
    """A group's bar is its part of all bytes, of whole characters where the terminal lacks parts of
    them; one without bytes has none.
    """
    found = shown(TopView(by="path"), *two_reports())
    rows = [
        msgspec.structs.replace(row, name=name, bytes_in=size, bytes_out=0.0)
        for row, name, size in zip(found.rows, "abc", (750.0, 250.0, 0.0), strict=True)
    ]
    found = msgspec.structs.replace(found, rows=tuple(rows))
    for plain, block in ((False, "█"), (True, "#")):
        head, *lines = show(found, plain=plain).splitlines()
        at = head.index("OF ALL BYTES")
        assert [line[at : at + 14].rstrip() for line in lines] == [9 * block, 3 * block, ""]


def test_the_first_line() -> None:
    """The first line counts ends by path, and says what router and relay use."""
    assert head(shown(TopView(), *two_reports())) == (
        "4 ends of connections: 2 overlay, 1 relay, 1 shm; processor: router 2.0 %, relay -"
    )
    assert head(shown(TopView(), report(1.0))).startswith("0 ends of connections; processor")


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("sort", SORTS)
def test_hostile_names(by: str, sort: str) -> None:
    """No name of a container, service or host can move the cursor or look like another line."""
    bad = "a\x1b[2J\nb\u202e"
    fields: dict[str, Any] = {
        "container": bad,
        "service": bad,
        "host": bad,
        "peer": bad,
        "reason": bad,
    }
    reports = [
        report(read, connection(read=read, tcp=tcp(0, 0), **fields), networks={NET: bad})
        for read in (1.0, 2.0)
    ]
    text = show(shown(TopView(by=by, sort=sort), *reports), plain=True)
    assert text.isascii()
    assert len(text.splitlines()) == 2
    assert "\x1b" not in text


def test_a_value_of_all_fields() -> None:
    """A report is JSON and comes back the same."""
    found = shown(TopView(), TRAFFIC, msgspec.structs.replace(TRAFFIC, read=1002.0))
    assert msgspec.json.decode(msgspec.json.encode(found), type=TopReport) == found
