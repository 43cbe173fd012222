"""The suite `same-host`: its cases, its rows, and failing programs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from itertools import count
from pathlib import Path

import click
import pytest

from bench import cost, idle, load, parse, report, sampling, stats, subjects
from bench.choice import pick
from bench.errors import ProgramError
from bench.latency import Latency
from bench.machine import Machine
from bench.measures import Measure, Seen, measures
from bench.namespaces import RING, TCP, UNIX, ProcessNamespaces, SubjectPair
from bench.samehost import CPU_OF, SameHost, case_names
from bench.sampling import Sample
from bench.servers import PINGPONG, Servers

WANTED = (
    *("pingpong_64b_two_cores", "pingpong_64b_one_core", "pingpong_64b_one_core_epoll"),
    *("stream_4k", "stream_16k", "stream_128k", "iperf3", "redis_p1_c1", "redis_p1_c50"),
    *("redis_p16_c50", "memcached_c50", "nginx_keepalive", "nginx_keepalive_100k"),
    *("pgbench_select_c1", "pgbench_select_c8", "connect_request_close", "pgbench_reconnect"),
    *("fork_us", "exec_us", "start_us"),
    *("busy_redis", "cores2_memcached", "cores1_pingpong_64b_epoll"),
    *("idle_cpu", "idle_shared_memory", "stream_1", "tcp_rr_one_core"),
)


def pair(subject: str, transport: str = TCP, library: str = "") -> SubjectPair:
    namespaces = ProcessNamespaces(Path("/proc/self"), IPv4Address("192.0.2.1"), library)
    return SubjectPair(subject, namespaces, namespaces, transport)


def a_measure(name: str, transports: frozenset[str] = frozenset((TCP,))) -> Measure:
    def call(_: object) -> Seen:
        raise AssertionError("the fake takes samples itself")

    return Measure(stats.Case(name, "us", False, name), PINGPONG, call, "request", transports)


@dataclass
class Fake:
    """Samples without programs: given figures and failures; each advances the clock."""

    figures: dict[str, float]
    broken: set[tuple[str, str]] = field(default_factory=set)
    log: list[tuple[str, str]] = field(default_factory=list)
    time: float = 0.0
    upgraded: float = 1.0

    def take(self, measure: Measure, where: SubjectPair, _: Servers, seconds: float) -> Sample:
        self.log.append((measure.case.name, where.subject))
        self.time += seconds
        if (measure.case.name, where.subject) in self.broken:
            raise ProgramError(f"{where.subject}: no such luck")
        share = self.upgraded if where.client.library else None
        figure = self.figures[where.subject]
        said = '{"refused":9}' if share is not None else ""
        return Sample(figure, figure / 2, share, said, Latency(figure, figure * 3))

    def leave_idle(self, where: SubjectPair, _: Servers) -> idle.Idle:
        return idle.Idle({case.name: self.figures[where.subject] for case in idle.CASES}, None)


FIGURES = {"freeflow": 2.0, "freeflow_plain": 10.0, "overlay": 20.0, "af_unix": 5.0, "ring": 1.0}
PAIRS = (
    pair("freeflow", library="/run/freeflow/libfreeflow.so"),
    pair("freeflow_plain"),
    pair("overlay"),
    pair("af_unix", UNIX),
    pair("ring", RING),
)


def suite(
    fake: Fake,
    some: list[Measure],
    rounds: int = 3,
    budget: float = 1e9,
    say: Callable[[str], None] = lambda _: None,
    olds: tuple[load.Load, ...] = (),
    names: tuple[str, ...] = (),
) -> SameHost:
    return SameHost(
        pairs=PAIRS,
        names=names or [*(one.case.name for one in some), *(case.name for case in idle.CASES)],
        rounds=rounds,
        seconds=1.0,
        budget=budget,
        order=random.Random(3),
        say=say,
        measures=some,
        olds=olds,
        take=fake.take,
        leave_idle=fake.leave_idle,
        clock=lambda: fake.time,
    )


def test_all_wanted_cases_are_in_the_suite() -> None:
    """Every case of the goals exists, under a unique name."""
    names = case_names()
    assert set(WANTED) <= set(names)
    assert len(names) == len(set(names))
    assert set(CPU_OF) <= set(names)


def test_short_connections_need_not_be_upgraded() -> None:
    """Only cases of short connections and new processes do not expect an upgrade."""
    short = {one.case.name for one in measures() if not one.upgraded}
    processes = {"fork_us", "exec_us", "start_us"}
    assert short == {"connect_request_close", "pgbench_reconnect", *processes}


def test_row_tells_ratios_to_plain_and_overlay() -> None:
    """A row has all subjects' medians, freeflow's ratios, and CPU time per unit."""
    every = frozenset((TCP, UNIX, RING))
    row = suite(Fake(FIGURES), [a_measure("a", every)]).measure()["a"]
    assert (row["freeflow"], row["freeflow_plain"], row["overlay"]) == (2, 10, 20)
    assert (row["af_unix"], row["ring"], row["host"]) == (5, 1, None)
    assert row["ratio_to_plain"] == pytest.approx(0.2)
    assert row["ratio_to_overlay"] == pytest.approx(0.1)
    assert row["cpu"]["overlay"] == 10
    assert row["cpu_unit"] == "us/request"
    assert row["cpu_ratio_to_overlay"] == pytest.approx(0.1)
    assert row["p50_us"]["freeflow"] == 2
    assert row["p99_us"]["overlay"] == 60
    assert row["upgraded"] == 1
    assert row["runs"] == 3
    assert row["samples"]["freeflow"] == [2, 2, 2]


def test_subjects_that_do_not_fit_are_not_measured() -> None:
    """A case that only TCP can run has no figures for AF_UNIX and the ring."""
    fake = Fake(FIGURES)
    row = suite(fake, [a_measure("a")]).measure()["a"]
    assert (row["af_unix"], row["ring"]) == (None, None)
    assert {subject for _, subject in fake.log} == {"freeflow", "freeflow_plain", "overlay"}


def test_rounds_are_interleaved() -> None:
    """Each round runs a case on all its subjects before the next case."""
    fake = Fake(FIGURES)
    suite(fake, [a_measure("a"), a_measure("b")], rounds=2).measure()
    turns = [fake.log[i : i + 3] for i in range(0, len(fake.log), 3)]
    assert [{name for name, _ in turn} for turn in turns] == [{"a"}, {"b"}] * 2
    assert all(len({subject for _, subject in turn}) == 3 for turn in turns)


def test_failing_program_leaves_out_one_figure() -> None:
    """A program that fails on a subject runs there once; others are still measured."""
    said: list[str] = []
    fake = Fake(FIGURES, broken={("a", "freeflow")})
    rows = suite(fake, [a_measure("a"), a_measure("b")], say=said.append).measure()
    assert rows["a"]["freeflow"] is None
    assert rows["a"]["failed"] == {"freeflow": "freeflow: no such luck"}
    assert rows["a"]["overlay"] == 20
    assert rows["b"]["freeflow"] == 2
    assert fake.log.count(("a", "freeflow")) == 1
    assert any(line.startswith("FAILED: a on freeflow") for line in said)


def test_connections_that_stay_on_tcp_are_told() -> None:
    """A run with the library without upgrades is reported, with the library's counters."""
    said: list[str] = []
    row = suite(Fake(FIGURES, upgraded=0.1), [a_measure("a")], say=said.append).measure()["a"]
    assert row["upgraded"] == pytest.approx(0.1)
    assert any("NOT UPGRADED" in line and '{"refused":9}' in line for line in said)


def test_no_round_begins_that_would_end_too_late() -> None:
    """The suite ends in its time: a round takes 3 s here, and 30 s are reserved for idle cases."""
    rows = suite(Fake(FIGURES), [a_measure("a")], rounds=100, budget=40.0).measure()
    assert rows["a"]["runs"] == 3
    assert rows["idle_cpu"]["runs"] == 1


def test_one_round_is_always_made() -> None:
    """One round is made however short the time is."""
    assert suite(Fake(FIGURES), [a_measure("a")], budget=0.0).measure()["a"]["runs"] == 1


def test_cpu_time_has_rows_of_its_own() -> None:
    """redis' CPU time per request is a case, whose figures are the CPU times."""
    rows = suite(Fake(FIGURES), [a_measure("redis_p1_c50")]).measure()
    row = rows["redis_p1_c50_cpu"]
    assert (row["unit"], row["better"]) == ("us/request", "less")
    assert (row["freeflow"], row["overlay"]) == (1, 10)
    assert row["ratio_to_overlay"] == pytest.approx(0.1)


def test_old_cases_come_every_other_round() -> None:
    """Cases of the kernel path are measured in rounds 1, 3, 5; failures are named."""
    runs = count()

    def run(where: SubjectPair, _: float) -> load.Figures:
        if where.subject == "overlay":
            raise ProgramError("gone")
        next(runs)
        return {"tcp_rr_one_core": 20.0}

    old = load.Load("tcp_rr", run)
    made = suite(Fake(FIGURES), [], rounds=5, olds=(old,), names=("tcp_rr_one_core",)).measure()[
        "tcp_rr_one_core"
    ]
    assert made["runs"] == 3
    assert made["freeflow_plain"] == 20
    assert made["failed"] == {"overlay": "gone"}
    assert next(runs) == 6


def test_table_and_json_of_local_rows() -> None:
    """The table has ratios, absent subjects and failures; the JSON has all keys."""
    fake = Fake(FIGURES, broken={("b", "overlay")})
    rows = suite(fake, [a_measure("a"), a_measure("b")]).measure()
    machine = Machine(
        when="2026-01-02T03:04:05+00:00",
        cpu="a CPU",
        cores=4,
        memory_gib=8.0,
        kernel="6.1",
        system="Debian",
        load=0.5,
        engines=[],
        congestion_control="cubic",
        rounds=3,
        seconds=None,
        absent={"host": "nobody asked"},
    )
    made = report.BenchReport(machine=machine, results=rows)
    table = report.as_table(made)
    assert "no host: nobody asked" in table
    assert "failed: b on overlay: overlay: no such luck" in table
    line = next(line for line in table.splitlines() if line.startswith("a "))
    assert line.split()[5:] == [
        *("2", "10", "20", "-", "-", "-", "0.10x", "0.20x", "0.10x"),
        *("2/20", "6/60", "100%", "0%", "3"),
    ]
    found = json.loads(report.as_json(made))["results"]["a"]
    contract = {"unit", "freeflow", "overlay", "host", "ratio_to_overlay", "ratio_to_host"}
    assert contract | {"spread", "runs"} <= set(found)


def test_patterns_pick_cases() -> None:
    """Patterns choose cases in the suite's order; one that matches none is refused."""
    known = ["redis_p1", "stream_4k", "stream_16k"]
    assert pick(["stream_*", "redis_p1"], known) == known
    assert pick(["*_4k"], known) == ["stream_4k"]
    with pytest.raises(click.BadParameter, match="nothing"):
        pick(["stream_4k", "nothing"], known)


def test_stream_and_memload_output() -> None:
    """Counts of bytes and of requests are parsed alike."""
    stream = parse.moved('{"bytes": 10, "seconds": 0.5, "cpu_us": 7}')
    assert stream == parse.Moved(10, 0.5, 7)
    load_ = parse.moved('{"count": 3, "seconds": 1, "p50_us": 1, "p99_us": 2, "cpu_us": 7}')
    assert load_.count == 3
    assert load_.latency == Latency(1, 2)
    assert stream.latency is None


PGBENCH = """\
transaction type: <builtin: select only>
number of transactions actually processed: 400/400
number of failed transactions: {failed} (0.000%)
latency average = 0.2 ms
initial connection time = 4.5 ms
tps = 4314.5 (without initial connection time)
"""


def test_pgbench_output() -> None:
    """Rate and count of transactions are parsed, also with reconnecting."""
    assert parse.pgbench(PGBENCH.format(failed=0)) == parse.Transactions(400, 4314.5)
    text = PGBENCH.format(failed=0).replace("without initial connection", "including reconnection")
    assert parse.pgbench(text).rate == 4314.5


def test_failed_transactions_spoil_a_run() -> None:
    """A failed transaction is an error."""
    with pytest.raises(ProgramError, match="failed transactions: 3"):
        parse.pgbench(PGBENCH.format(failed=3))


def test_wrk_counts_requests() -> None:
    """The number of answered requests is parsed."""
    assert parse.wrk_requests("  142838 requests in 2.00s, 188.13MB read\n") == 142838


@pytest.mark.parametrize("reader", [parse.moved, parse.pgbench, parse.wrk_requests])
def test_unknown_output_is_refused(reader: Callable[[str], object]) -> None:
    """Unknown output is an error, not a figure."""
    for text in ("", "hello", "{}", "[1]"):
        with pytest.raises(ProgramError):
            reader(text)


def test_library_counters() -> None:
    """The share counts upgraded directions of all processes, without `aside` connections."""
    line = '{"tracked":4,"receivers":3,"senders":4,"reasons":[0]}\n'
    other = '{"tracked":1,"receivers":0,"senders":0}\n'
    assert parse.paths(line).share() == pytest.approx(7 / 8)
    assert parse.paths(line + other).share() == pytest.approx(0.7)
    assert parse.paths(line + other).share(aside=1) == pytest.approx(7 / 8)
    assert parse.paths(line + other).share(aside=9) == 1
    assert parse.paths("").share() is None
    with pytest.raises(ProgramError, match="counters"):
        parse.paths("{}")


def process(proc: Path, pid: int, ran_ns: int, reaped: tuple[int, int], children: str) -> None:
    """The /proc entries of a process."""
    task = proc / str(pid) / "task" / str(pid)
    task.mkdir(parents=True)
    (task / "children").write_text(children)
    (task / "schedstat").write_text(f"{ran_ns} 5 6\n")
    before = " ".join("0" for _ in range(12))
    stat = f"{pid} (a (odd) name) S {before} {reaped[0]} {reaped[1]} 20 0 1\n"
    (proc / str(pid) / "stat").write_text(stat)


def test_cpu_time_is_that_of_a_family(tmp_path: Path) -> None:
    """A server's CPU time includes that of its children, running and reaped, and no other."""
    process(tmp_path, 10, 1_000_000, (2, 1), "11 12 ")
    process(tmp_path, 11, 2_000_000, (0, 0), "")
    process(tmp_path, 12, 4_000_000, (0, 0), "13 ")
    process(tmp_path, 13, 8_000_000, (0, 0), "")
    process(tmp_path, 14, 999_000_000, (9, 9), "")
    assert set(cost.family(10, tmp_path)) == {10, 11, 12, 13}
    assert cost.cpu_us(10, tmp_path) == pytest.approx(15_000 + 3 * 10_000)


def test_process_that_has_ended_counts_nothing(tmp_path: Path) -> None:
    """A child that ends during the measurement is no error."""
    process(tmp_path, 10, 1_000_000, (0, 0), "11 ")
    assert cost.cpu_us(10, tmp_path) == pytest.approx(1000)


def test_shared_memory_counts_once(tmp_path: Path) -> None:
    """A memfd that both ends map counts once, by its allocated blocks; other mappings do not."""
    arena, other = tmp_path / "arena", tmp_path / "other"
    arena.write_bytes(b"x" * 8192)
    other.write_bytes(b"x" * 4096)
    for pid in (1, 2):
        files = tmp_path / str(pid) / "map_files"
        files.mkdir(parents=True)
        (files / "a000-b000").hardlink_to(arena)
        (files / "c000-d000").hardlink_to(other)
        (files.parent / "maps").write_text(
            "a000-b000 rw-s 00000000 00:01 77   /memfd:arena (deleted)\n"
            "c000-d000 r-xp 00000000 00:01 78   /usr/lib/libc.so\n"
        )
        (files.parent / "smaps_rollup").write_text("Rss: 9 kB\nPss_Anon:      100 kB\n")
        (files.parent / "status").write_text("Name:\tx\nVmPTE:\t      40 kB\n")
    found = idle.memory([1, 2], tmp_path)
    assert found.shared == pytest.approx(arena.stat().st_blocks / 2)
    assert (found.private, found.tables) == (200, 80)


def test_cores_are_counted_from_the_last() -> None:
    """Core 0 of a case is the machine's last; too few cores are an error."""
    ours = {0, 2, 5}
    assert sampling.cores_of((0, 1), ours) == (5, 2)
    assert sampling.cores_of((), ours) == ()
    with pytest.raises(ProgramError, match="4 cores are needed"):
        sampling.cores_of((3,), ours)


def test_only_the_program_gets_the_library() -> None:
    """LD_PRELOAD is set for the program, not for programs that start it."""
    namespaces = ProcessNamespaces(
        Path("/proc/7"), IPv4Address("192.0.2.1"), "/run/freeflow/libfreeflow.so"
    )
    line = namespaces.enter("redis-server", "--port", "1", cores=(3, 2), before=("setpriv", "-x"))
    at = line.index("env")
    assert line[at:] == [
        *("env", "LD_PRELOAD=/run/freeflow/libfreeflow.so", "redis-server", "--port", "1"),
    ]
    assert line[at - 5 : at] == ["taskset", "--cpu-list", "2,3", "setpriv", "-x"]
    bare = ProcessNamespaces(Path("/proc/7"), IPv4Address("192.0.2.1")).enter("true")
    assert "env" not in bare


def test_accelerated_container_is_as_the_docs_say() -> None:
    """The library is added by a bind mount and LD_PRELOAD, on the same network."""
    fast = subjects.container("image", "freeflow", ["true"], str(subjects.LIBRARY))
    plain = subjects.container("image", "freeflow_plain", ["true"])
    assert fast["Env"] == ["LD_PRELOAD=/run/freeflow/libfreeflow.so"]
    assert fast["HostConfig"]["Mounts"] == [
        {"Type": "bind", "Source": "/run/freeflow", "Target": "/run/freeflow"}
    ]
    assert plain["Env"] == []
    assert "Mounts" not in plain["HostConfig"]
    assert fast["HostConfig"]["NetworkMode"] == plain["HostConfig"]["NetworkMode"]


def test_limits_run_without_the_library() -> None:
    """AF_UNIX and the bare ring run in a container without the library."""
    made = subjects.limits(PAIRS[:3], stats.LOCAL_SUBJECTS)
    assert [(one.subject, one.transport) for one in made] == [("af_unix", UNIX), ("ring", RING)]
    assert all(one.client == one.server and not one.client.library for one in made)
    assert subjects.limits(PAIRS[:1], stats.LOCAL_SUBJECTS) == ()
    assert [one.subject for one in subjects.limits(PAIRS[:3], ("ring", "overlay"))] == ["ring"]
