"""The suite `cross-host`: its cases, rows, goals and accounts; nothing is measured here."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, cast

import pytest

from bench import accounting, client_processes, crosshost, goals, latency, relayed, report, stats
from bench import traffic as cases
from bench.accounting import Reading
from bench.client_processes import ClientProcesses
from bench.conditions import enabled
from bench.crosshost import LOCAL, CrossHost
from bench.engine_api import EngineApi
from bench.errors import BenchError, ProgramError
from bench.latency import Latency
from bench.load import Load
from bench.namespaces import ProcessNamespaces, SubjectPair
from bench.relayed import Listed
from bench.servers import REDIS, Running
from bench.stats import Case, CrossRow
from bench.swarm_hosts import BenchHost
from bench.traffic import LoadCase, Traffic, TrafficSample

PLACE = ProcessNamespaces(Path("/proc/1"), IPv4Address("192.0.2.1"))
FIGURES = {"freeflow": 60.0, "freeflow_off": 30.0, "overlay": 20.0, "host": 40.0}
PAIRS = [SubjectPair(subject, PLACE, PLACE) for subject in FIGURES]
WANTED = (
    *("redis_p1_c1", "redis_p1_c4", "redis_p1_c8", "redis_p1_c16", "redis_p1_c50"),
    *("redis_p1_c200", "redis_p16_c50", "redis_4x12", "redis_16x1", "redis_slow_c50"),
    *("memcached_c50", "nginx_keepalive", "pairs_8", "pairs_24", "stream_1", "stream_4"),
    *("stream_1_no_offload", "stream_4_no_offload", "redis_c8_beside_stream_p99"),
    *("tcp_rr_one_core", "udp_rr_one_core", "connect_request_close"),
)
BUSY = Traffic(
    Case("busy", "requests/s", True, "a case"), REDIS, ClientProcesses("redis", connections=50)
)


@dataclass
class Fake:
    """Samples without programs; each advances the clock by 2 s."""

    broken: set[tuple[str, str]] = field(default_factory=set)
    in_relay: int = 50
    foreign: float = 0.05
    log: list[tuple[str, str]] = field(default_factory=list)
    time: float = 0.0

    def take(self, one: Traffic | LoadCase, pair: SubjectPair, _: float) -> TrafficSample:
        self.log.append((one.case.name, pair.subject))
        self.time += 2
        if (one.case.name, pair.subject) in self.broken:
            raise ProgramError("no such luck")
        figure = FIGURES[pair.subject]
        listed = Listed(self.in_relay, 50, {"relay": self.in_relay})
        seen = listed if pair.subject.startswith("freeflow") else None
        return TrafficSample(
            figure, 600 / figure, Latency(1 / figure, 2 / figure), self.foreign, seen
        )


def suite(fake: Fake, some: Sequence[Traffic], said: list[str], **more: Any) -> CrossHost:
    given: dict[str, Any] = {
        "hosts": (),
        "between": PAIRS,
        "within": (),
        "names": [one.case.name for one in some],
        "rounds": 3,
        "seconds": 1.0,
        "budget": 1e9,
        "order": random.Random(1),
        "say": said.append,
        "take": fake.take,
        "cases": some,
        "clock": lambda: fake.time,
    }
    return CrossHost(**{**given, **more})


def cross(rows: Any, name: str) -> CrossRow:
    return cast("CrossRow", rows[name])


def test_all_wanted_cases_are_in_the_suite() -> None:
    """Every wanted case exists, under a unique name."""
    assert set(cases.names()) == set(WANTED)
    assert len(cases.names()) == len(WANTED)


def test_a_row_has_ratios_of_rate_and_cost() -> None:
    """A row compares freeflow with the relay off, with overlay and with the host's network."""
    row = cross(suite(Fake(), [BUSY], []).measure(), "busy")
    assert (row["freeflow"], row["freeflow_off"], row["overlay"], row["host"]) == (60, 30, 20, 40)
    assert row["ratio_to_overlay"] == pytest.approx(3)
    assert row["ratio_to_off"] == pytest.approx(2)
    assert row["ratio_to_host"] == pytest.approx(1.5)
    assert row["cpu"]["overlay"] == 30
    assert row["cpu_ratio_to_overlay"] == pytest.approx(1 / 3)
    assert row["cpu_ratio_to_off"] == pytest.approx(1 / 2)
    assert row["cpu_ratio_to_host"] == pytest.approx(2 / 3)
    assert row["p99_us"]["overlay"] == pytest.approx(0.1)
    assert (row["connections"], row["connections_in_relay"]) == (50, 50)
    assert row["foreign"]["host"] == pytest.approx(0.05)
    assert row["runs"] == 3


def test_subjects_take_turns() -> None:
    """Each round runs a case on all subjects before the next case, in changing order."""
    fake = Fake()
    other = replace(BUSY, case=replace(BUSY.case, name="other"))
    suite(fake, [BUSY, other], []).measure()
    turns = [fake.log[i : i + 4] for i in range(0, len(fake.log), 4)]
    assert [{name for name, _ in turn} for turn in turns] == [{"busy"}, {"other"}] * 3
    assert all({subject for _, subject in turn} == set(FIGURES) for turn in turns)
    assert len({tuple(subject for _, subject in turn) for turn in turns}) > 1


def test_no_round_begins_that_would_end_too_late() -> None:
    """Rounds of 8 s: two end within 17 s, and one is made however short the time is."""
    assert suite(Fake(), [BUSY], [], budget=17.0).measure()["busy"]["runs"] == 2
    assert suite(Fake(), [BUSY], [], budget=0.0).measure()["busy"]["runs"] == 1


def test_a_failing_subject_leaves_out_its_figure() -> None:
    """A program that fails on a subject is tried again in the next round; the row names the
    reason.
    """
    fake = Fake(broken={("busy", "host")})
    row = cross(suite(fake, [BUSY], []).measure(), "busy")
    assert row["host"] is None
    assert row["failed"] == {"host": "no such luck"}
    assert fake.log.count(("busy", "host")) == 3
    assert row["overlay"] == 20


def test_conditions_hold_for_their_cases_only() -> None:
    """A condition is made for its cases in each round, and undone before the next case."""
    log: list[str] = []

    @contextlib.contextmanager
    def condition(_: object) -> Iterator[None]:
        log.append("on")
        yield
        log.append("off")

    def take(one: Traffic | LoadCase, _pair: SubjectPair, _seconds: float) -> TrafficSample:
        log.append(one.case.name)
        return TrafficSample(1.0)

    changed = replace(BUSY, case=replace(BUSY.case, name="changed"), condition=condition)
    suite(Fake(), [BUSY, changed], [], take=take, between=PAIRS[:1], rounds=2).measure()
    assert log == ["busy", "on", "changed", "off"] * 2


def test_foreign_load_is_said() -> None:
    """When others use a fifth of the machine, the output says in which case."""
    said: list[str] = []
    suite(Fake(foreign=0.4), [BUSY], said).measure()
    assert any("FOREIGN LOAD" in line and "40%" in line and "busy" in line for line in said)
    quiet: list[str] = []
    suite(Fake(), [BUSY], quiet).measure()
    assert not any("FOREIGN LOAD" in line for line in quiet)


def test_each_run_says_where_its_connections_were() -> None:
    """The line of a run has its connections in the relay, of all of them."""
    said: list[str] = []
    suite(Fake(in_relay=49), [BUSY], said).measure()
    lines = [line for line in said if " freeflow " in line]
    assert len(lines) == 3
    assert all("connections_in_relay 49/50" in line for line in lines)


def test_packets_on_one_host_have_rows() -> None:
    """Cases on one host are those of packets, with the prefix, without a host's own network."""
    loads = [Load("stream_1", lambda pair, _: {"stream_1": FIGURES[pair.subject]})]
    within = [pair for pair in PAIRS if pair.subject in ("freeflow", "overlay")]
    made = suite(Fake(), [], [], within=within, local_loads=loads)
    made.names = [LOCAL + "stream_1"]
    row = made.measure()[LOCAL + "stream_1"]
    assert row["ratio_to_overlay"] == 3
    assert row["host"] is None


def test_a_suite_of_another_path_adds_its_rows() -> None:
    """Additional suites add rows of their own at the end."""
    case = Case("other", "us", False, "another path")
    made = suite(Fake(), [], [])
    made.more = [lambda: {"other": stats.row(case, {"freeflow": [1.0]})}]
    assert made.measure()["other"]["freeflow"] == 1.0


# --- goals


def _row(name: str, rate: float, in_relay: int) -> dict[str, CrossRow]:
    measured = stats.Measured(Case(name, "requests/s", True, ""), "request")
    measured.keep("freeflow", rate, 1.0, None)
    measured.keep("overlay", 10.0, 10.0, None)
    return {name: stats.cross_row(measured, 50, [in_relay], {}, {})}


def test_goals_are_judged() -> None:
    """A goal is a minimum for rates and a maximum for cost; no figure, no verdict."""
    assert goals.verdicts(_row("redis_p16_c50", 21.0, 50)) == [
        "met: redis_p16_c50 ratio_to_overlay 2.10 (>= 2), 50 of 50 connections in the relay",
        "met: redis_p16_c50 cpu_ratio_to_overlay 0.10 (<= 0.5), 50 of 50 connections in the relay",
    ]
    assert goals.verdicts(_row("redis_p16_c50", 19.0, 50))[0].startswith("MISSED")
    slow = stats.row(Case("tcp_rr_one_core", "us", False, ""), {"freeflow": [7], "overlay": [10]})
    assert goals.verdicts({"tcp_rr_one_core": slow}) == [
        "met: tcp_rr_one_core ratio_to_overlay 0.70 (<= 0.78)"
    ]


def test_a_ratio_of_another_path_meets_no_goal() -> None:
    """A gain counts only if nearly all connections were in the relay."""
    lines = goals.verdicts(_row("redis_p1_c50", 90.0, 40))
    assert lines
    assert all(line.startswith("MISSED") for line in lines)
    assert "40 of 50 connections in the relay" in lines[0]


def test_every_goal_is_about_a_case() -> None:
    """Each goal is for an existing case."""
    known = {*cases.names(), LOCAL + "tcp_rr_one_core", LOCAL + "udp_rr_one_core"}
    assert {goal.case for goal in goals.goals()} <= {*known, *crosshost.local_names()}


# --- one run


class Loads:
    """In place of client processes: remembers what happened, and counts a fixed amount."""

    def __init__(self, log: list[str], counted: client_processes.Counted) -> None:
        self.log = log
        self.counted = counted

    def __enter__(self) -> Loads:
        self.log.append("connect")
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append("stopped")

    def load(self) -> None:
        self.log.append("load")

    def begin(self) -> None:
        self.log.append("begin")

    def rest(self) -> None:
        self.log.append("rest")

    def end(self) -> client_processes.Counted:
        self.log.append("end")
        return self.counted


class FakeAccounts(accounting.Accounts):
    def read(self) -> Reading:
        return Reading(0, 0, 0, 0, 0)

    def used_since(self, before: Reading) -> accounting.Used:
        return accounting.Used(5000.0, 0.125)


class Gossip(EngineApi):
    """An engine that lists these peers of every network."""

    peers: Sequence[str] | None = ("h1", "h2")

    def network(self, name: str) -> dict[str, Any]:
        return {"Name": name, "Peers": self.peers}


def bench_host(name: str) -> BenchHost:
    engine = Gossip(Path("/nowhere"))
    return BenchHost(name, Path("/"), IPv4Address("192.0.2.1"), engine, 1, "group")


class Runner(cases.Runner):
    """A runner whose clients are `Loads`."""

    log: list[str]
    counted: client_processes.Counted

    def _start(
        self, pair: SubjectPair, kind: Any, some: ClientProcesses
    ) -> tuple[Any, list[Running]]:
        return Loads(self.log, self.counted), [Running(1, "10.0.0.2", 7100, False)]


def runner(log: list[str], listings: Iterator[Listed]) -> Runner:
    def look(*_: object) -> Listed:
        log.append("look")
        return next(listings)

    hosts = bench_host("h1"), bench_host("h2")
    made = Runner(*hosts, cast("Any", None), FakeAccounts((), ()), look=look)
    made.log = log
    made.counted = client_processes.Counted(1000, 500.0, Latency(1, 2))
    made.sleep = lambda _: log.append("sleep")
    return made


def test_a_run_measures_after_connections_have_moved() -> None:
    """The window begins when all connections are in the relay, and their paths are read after it,
    when the connections are idle and still open.
    """
    log: list[str] = []
    listings = iter([Listed(0, 50, {}), Listed(50, 50, {}), Listed(50, 50, {"relay": 50})])
    sample = runner(log, listings).run(BUSY, PAIRS[0], 1.0)
    assert log == [
        *("connect", "load", "sleep", "look", "sleep", "look", "sleep", "begin", "sleep"),
        *("end", "rest"),
        *("look", "stopped"),
    ]
    assert sample.figure == 500
    assert sample.cpu_us == 5
    assert sample.latency == Latency(1, 2)
    assert sample.foreign == 0.125
    assert sample.listed == Listed(50, 50, {"relay": 50})


def test_connections_of_gains_are_expected_to_move() -> None:
    """The cases that gain by the relay are those whose connections get more time to move."""
    gains = {goal.case for goal in goals.goals() if goal.by_relay}
    moving = {one.case.name for one in cases.traffic() if one.moves}
    kept = {goal.case for goal in goals.goals() if goal.measure == "ratio_to_off"}
    assert gains <= moving
    assert not kept & moving


def test_a_run_without_the_relay_is_not_listed() -> None:
    """Subjects without the library warm up for a fixed time, and no router is asked."""
    log: list[str] = []
    sample = runner(log, iter(())).run(BUSY, PAIRS[2], 1.0)
    assert log == ["connect", "load", "sleep", "begin", "sleep", "end", "rest", "stopped"]
    assert sample.listed is None


def test_no_client_starts_beside_a_load() -> None:
    """A load beside the measured one begins when the clients of both have connected."""
    log: list[str] = []
    tail = next(one for one in cases.traffic() if one.is_tail)
    runner(log, iter(())).run(tail, PAIRS[2], 1.0)
    assert log[:4] == ["connect", "connect", "load", "load"]


def test_a_figure_of_the_wrong_path_is_an_error() -> None:
    """With the relay off no connection may be there, and the router has to list all of them."""
    with pytest.raises(ProgramError, match="which is off"):
        runner([], iter([Listed(1, 50, {})])).run(BUSY, PAIRS[1], 1.0)
    with pytest.raises(BenchError, match="49 of 50"):
        runner([], iter([Listed(0, 49, {})])).run(BUSY, PAIRS[1], 1.0)


@pytest.mark.parametrize("peers", [("h2",), (), None])
def test_an_engine_without_the_other_host_is_named(
    peers: Sequence[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that fails while an engine has lost its peer is not blamed alone."""
    made = runner([], iter([Listed(1, 50, {})]))
    with pytest.raises(ProgramError) as found:
        made.run(BUSY, PAIRS[1], 1.0)
    assert "lost" not in str(found.value)
    monkeypatch.setattr(Gossip, "peers", peers)
    made = runner([], iter([Listed(1, 50, {})]))
    with pytest.raises(ProgramError, match=r"which is off; the engine of h1 has lost .*; .* h2"):
        made.run(BUSY, PAIRS[1], 1.0)


def test_figures_of_streams_and_tails() -> None:
    """Streams count bits per second and CPU time per GB; a tail is the 99th percentile."""
    stream = next(one for one in cases.traffic() if one.case.name == "stream_1")
    tail = next(one for one in cases.traffic() if one.is_tail)
    made = runner([], iter(()))
    made.counted = client_processes.Counted(2_000_000_000, 1e9, None)
    sample = made.run(stream, PAIRS[2], 1.0)
    assert (sample.figure, sample.cpu_us) == (8.0, 2500.0)
    made.counted = client_processes.Counted(10, 10.0, Latency(3, 4))
    sample = made.run(tail, PAIRS[2], 1.0)
    assert (sample.figure, sample.cpu_us) == (4, None)


# --- paths


class Clock:
    """A clock that sleeping advances."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.mark.parametrize(
    ("numbers", "seconds"),
    [
        ([0, 50], 1.5),  # all are there
        ([0] * 99, 3.5),  # none ever moves
        ([0, 0, 0, 0, 20, 30, 40, 40, 40], 4.5),  # some move late
        (list(range(1, 49)), 9.0),  # it never becomes stable
        ([None, None, 0, None, 50], 3.0),  # the router doesn't always answer
        ([None] * 99, 9.0),  # it never answers
    ],
)
def test_connections_settle(numbers: list[int | None], seconds: float) -> None:
    """Warming up ends when all have moved, when nothing has changed for a while, or in the end."""
    clock, found = Clock(), iter(numbers)

    def look() -> Listed:
        number = next(found)
        if number is None:
            raise BenchError("no answer")
        return Listed(number, 50, {})

    relayed.settle(look, 50, 3.5, 9.0, clock, clock.sleep)
    assert clock.time == seconds


def test_a_connection_is_in_the_relay_at_both_ends() -> None:
    """Connections to other servers do not count, nor one that only one router lists as relay."""

    def entry(local: str, remote: str, path: str, reason: str | None = None) -> dict[str, object]:
        return {"local": local, "remote": remote, "path": path, "reason": reason}

    ours = [
        entry("10.0.0.1:5", "10.0.0.2:7100", "relay"),
        entry("10.0.0.1:6", "10.0.0.2:7100", "relay"),
        entry("10.0.0.1:7", "10.0.0.2:7100", "overlay+ebpf", "few"),
        entry("10.0.0.1:8", "10.0.0.2:7101", "relay"),
    ]
    theirs = [
        entry("10.0.0.2:7100", "10.0.0.1:5", "relay"),
        entry("10.0.0.2:7100", "10.0.0.1:6", "overlay"),
    ]
    found = relayed.listed(ours, theirs, {"10.0.0.2:7100"})
    assert found == Listed(1, 3, {"relay": 2, "overlay+ebpf (few)": 1})


# --- clients and latencies


def test_windows_of_processes_are_one() -> None:
    """Counts and rates of processes add up, and percentiles are those of all requests."""
    one = json.dumps({"count": 3, "seconds": 1.0, "latency_ns": [[1000, 2], [9000, 1]]})
    two = json.dumps({"count": 97, "seconds": 2.0, "latency_ns": [[1000, 97]]})
    counted = client_processes.sum_up([one, two])
    assert (counted.count, counted.rate) == (100, 51.5)
    assert counted.latency == Latency(1, 1)
    stream = client_processes.sum_up(['{"count": 5, "seconds": 1, "latency_ns": []}'])
    assert stream.latency is None


@pytest.mark.parametrize(
    "text", ["", "ready", "{}", '{"count": 0, "seconds": 1, "latency_ns": []}']
)
def test_a_window_without_a_count_is_refused(text: str) -> None:
    """Unknown output, and a process that did nothing, are errors."""
    with pytest.raises(ProgramError):
        client_processes.sum_up([text])


def test_percentiles_of_a_histogram() -> None:
    """A percentile is by nearest rank, whatever the order of the buckets."""
    histogram = {3000.0: 1, 1000.0: 98, 2000.0: 1}
    assert latency.percentile_us(histogram, 50) == 1
    assert latency.percentile_us(histogram, 99) == 2
    assert latency.percentile_us(histogram, 100) == 3
    with pytest.raises(ValueError, match="no samples"):
        latency.percentile_us({}, 50)


def test_clients_share_the_servers() -> None:
    """A process gets its server's address, and what it has to do there."""
    server = Running(1, "10.0.0.2", 7100, False)
    some = ClientProcesses("redis", 4, 12, pipeline=16, rate=5)
    assert some.total == 48
    assert some.arguments(server) == ["redis", "10.0.0.2", "7100", "12", "16", "5"]
    assert ClientProcesses("stream").arguments(server) == ["stream", "10.0.0.2", "7100", "131072"]


# --- accounts


def test_cpu_time_of_a_group(tmp_path: Path) -> None:
    """Both versions of control groups are read in microseconds; a missing group is an error."""
    (tmp_path / "cpuacct.usage").write_text("2500000\n")
    assert accounting.usage_us(tmp_path) == 2500
    new = tmp_path / "new"
    new.mkdir()
    (new / "cpu.stat").write_text("nr_periods 1\nusage_usec 77\nuser_usec 5\n")
    assert accounting.usage_us(new) == 77
    with pytest.raises(BenchError, match="no CPU time"):
        accounting.usage_us(tmp_path / "gone")


def test_what_others_used() -> None:
    """Ours is the hosts' time and ksoftirqd's; the rest of the busy time is foreign, except this
    program's own.
    """
    before = Reading(at_us=0, hosts_us=100, deferred_us=10, own_us=0, busy_us=0)
    after = Reading(at_us=1000, hosts_us=600, deferred_us=30, own_us=80, busy_us=1000)
    used = accounting.between(before, after, 2)
    assert used.cpu_us == 520
    assert used.foreign == pytest.approx(400 / 2000)
    assert accounting.between(before, replace(after, busy_us=0), 2).foreign == 0


def test_accounts_read_the_machine(tmp_path: Path) -> None:
    """A reading has the groups' time, that of ksoftirqd, and what the machine was busy with."""
    (tmp_path / "stat").write_text("cpu  1 1 1 500 0 0 0 1 0 0\n")
    for pid, name in ((7, "ksoftirqd/0"), (8, "ksoftirqd/1"), (9, "bash")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(name + "\n")
        (tmp_path / str(pid) / "schedstat").write_text("3000000 1 1\n")
    group = tmp_path / "group"
    group.mkdir()
    (group / "cpuacct.usage").write_text("9000\n")
    reading = accounting.Accounts.of([group, group], tmp_path).read()
    assert reading.hosts_us == 18
    assert reading.deferred_us == 6000
    assert reading.busy_us == 40_000


def test_programs_join_the_group_of_their_host() -> None:
    """A program is in the group before it is executed, and nothing changes without a group."""
    place = replace(PLACE, group=Path("/groups/h1/load"))
    line = place.enter("redis-server")
    assert line[:2] == ["sh", "-c"]
    assert line[3] == "/groups/h1/load/cgroup.procs"
    assert line[4:] == PLACE.enter("redis-server")


def test_features_of_a_device() -> None:
    """`ethtool -k` says whether a feature is on; one that it does not list is an error."""
    listing = "Features for eth0:\n\ttx-udp_tnl-segmentation: on\n\ttx-fixed: off [fixed]\n"
    assert enabled(listing, "tx-udp_tnl-segmentation")
    assert not enabled(listing, "tx-fixed")
    with pytest.raises(ProgramError, match="tx-other"):
        enabled(listing, "tx-other")


# --- output


def test_the_table_says_what_it_is_worth() -> None:
    """Few rounds, failures and connections outside the relay are in the table."""
    fake = Fake(broken={("busy", "host")}, in_relay=48)
    rows = suite(fake, [BUSY], [], rounds=2).measure()
    machine: Any = {
        "cores": 2,
        "cpu": "a CPU",
        "kernel": "6.1",
        "when": "2026",
        "engines": [],
        "load": 0.5,
        "congestion_control": "cubic",
        "absent": {},
    }
    table = report.as_table(report.BenchReport(machine=machine, results=rows))
    assert "FEW ROUNDS" in table
    assert "TCP cubic" in table
    assert "failed: busy on host: no such luck" in table
    line = next(line for line in table.splitlines() if line.startswith("busy "))
    assert line.split()[2:] == [
        *("60", "30", "20", "-", "3.00x", "2.00x", "-", "0.33x", "0.50x", "-"),
        *("0.0167/0.05", "0.0333/0.1", "48/50", "5%", "0%", "2"),
    ]
