"""The suite `verbs`: what perftest prints, its rows, its goals, and failing programs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import cast

import pytest

from bench import machine, report, verbs_programs
from bench.accounting import Accounts, Used
from bench.errors import ProgramError
from bench.namespaces import ProcessNamespaces, SubjectPair
from bench.servers import Servers
from bench.stats import FREEFLOW, FREEFLOW_DIRECT, MEMCPY, OVERLAY
from bench.verbs import (
    AVERAGE,
    RATE,
    TYPICAL,
    Place,
    VerbsCase,
    VerbsGoal,
    VerbsRunner,
    VerbsSample,
    VerbsSuite,
    case_names,
    cases,
)
from bench.verbs_programs import (
    FEWEST,
    MOST,
    Job,
    Perftest,
    figures,
    mpi,
    netpipe,
    rate,
    ucx_bandwidth,
)

LATENCY = """\
---------------------------------------------------------------------------------------
 local address: LID 0000 QPN 0x1000 PSN 0x6ca2b4
 GID: 00:00:00:00:00:00:00:00:00:00:255:255:10:00:01:03
---------------------------------------------------------------------------------------
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec]
 2       1000          0.35           9.41         0.38     \t       0.40        \t0.16   \t\t0.61    \t\t1.14
---------------------------------------------------------------------------------------
"""
BANDWIDTH = """\
 #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   MsgRate[Mpps]
 65536      1000             262.59             251.26             0.479240
---------------------------------------------------------------------------------------
"""


def test_tables_of_perftest() -> None:
    """Figures are found by the words of the table's head, in programs of both kinds."""
    found = figures(LATENCY)
    assert found["#iterations"] == 1000
    assert found[TYPICAL] == 0.38
    assert found["99.9% percentile[usec]"] == 1.14
    assert figures(BANDWIDTH)[AVERAGE] == 251.26
    assert figures(BANDWIDTH)[RATE] == 0.47924


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Couldn't connect to 10.0.1.2:18515",
        " #bytes #iterations",
        " #bytes #iterations t_typical[usec]\n 2 1000\n",
        " #bytes #iterations t_typical[usec]\n 2 1000 much\n",
    ],
)
def test_what_is_no_table(text: str) -> None:
    """Without a whole table there is no figure."""
    with pytest.raises(ProgramError, match="perftest said"):
        figures(text)


def test_table_of_rstream() -> None:
    """Its rate is found, and only where there is a table."""
    head = "name      bytes   xfers   iters   total       time     Gb/sec    usec/xfer\n"
    assert (
        rate(f"{head}custom    64k     200     1       25m         0.00s     53.32       9.83\n")
        == 53.32
    )
    for text in ("", "rconnect: Connection refused", head, f"{head}custom 64k\n"):
        with pytest.raises(ProgramError, match="rstream said"):
            rate(text)


def test_table_of_ucx() -> None:
    """The bandwidth is that of the whole run, in decimal bits, and only where there is a table."""
    line = "Final:     3000      4.480   232.386   232.386     5000.00     4000.00      4303      4303\n"
    assert ucx_bandwidth(f"| Stage |\n{line}") == pytest.approx(4000 * 1048576 * 8 / 1e9)
    for text in ("", "Final:  3000 4.4\n", "UCX  ERROR no active messages transport"):
        with pytest.raises(ProgramError, match="ucx_perftest said"):
            ucx_bandwidth(text)


def test_table_of_netpipe() -> None:
    """The time is found, and only where there is a table."""
    line = "  0:       8 bytes   5000 times -->      1.47 Mbps in      41.60 usec\n"
    assert netpipe(f"Using no perturbations\n\n0: vm\nNow starting the main loop\n{line}") == 41.6
    for text in ("", "Now starting the main loop\n", "ssh: connect to host: Connection refused"):
        with pytest.raises(ProgramError, match="NetPIPE said"):
            netpipe(text)


@dataclass
class Fake:
    """Figures without programs: those given, and failures. Each run takes a second."""

    given: dict[str, float]
    broken: set[tuple[str, str]] = field(default_factory=set)
    runs: list[tuple[str, str]] = field(default_factory=list)

    def take(self, one: VerbsCase, subject: str, place: Place, seconds: float) -> VerbsSample:
        assert seconds == 0.5
        assert place is (BETWEEN if one.across else WITHIN)
        self.runs.append((one.case.name, subject))
        if (one.case.name, subject) in self.broken:
            raise ProgramError("it fell over")
        return VerbsSample(self.given[subject], self.given[subject] / 10, 0.05)

    def clock(self) -> float:
        return float(len(self.runs))


def place(*subjects: str) -> Place:
    namespaces = ProcessNamespaces(Path("/proc/self"), IPv4Address("192.0.2.1"))
    pairs = {name: SubjectPair(name, namespaces, namespaces) for name in subjects}
    return Place(pairs, Servers(), Accounts([], []))


WITHIN, BETWEEN = place(FREEFLOW, FREEFLOW_DIRECT, OVERLAY), place(FREEFLOW, OVERLAY)


def suite(
    fake: Fake,
    names: list[str],
    said: list[str] | None = None,
    rounds: int = 3,
    budget: float = 1e9,
) -> VerbsSuite:
    say = (said if said is not None else []).append
    return VerbsSuite(
        *(WITHIN, BETWEEN, names, rounds, 0.5, budget),
        *(random.Random(1), say, fake.take, fake.clock),
    )


def test_rows_and_goals() -> None:
    """A row has the ratios to TCP and to memcpy, of both kinds of networks, and says which of them
    reaches the goal.
    """
    fake = Fake({FREEFLOW: 150.0, FREEFLOW_DIRECT: 130.0, OVERLAY: 30.0, MEMCPY: 200.0})
    said: list[str] = []
    row = suite(fake, ["write_bw_64k"], said).measure()["write_bw_64k"]
    assert (row["ratio_to_overlay"], row["ratio_to_memcpy"]) == (5, 0.75)
    assert (row["direct_to_overlay"], row["direct_to_memcpy"]) == (130 / 30, 0.65)
    assert (row["cpu_ratio_to_overlay"], row["cpu_unit"]) == (5, "us/GB")
    assert row["foreign"][FREEFLOW] == 0.05
    assert row["runs"] == 3
    assert (row["met"], row["direct_met"]) == (True, False)
    assert said[-2:] == [
        "met: write_bw_64k on freeflow, to_memcpy >= 0.7",
        "MISSED: write_bw_64k on freeflow_direct, to_memcpy >= 0.7",
    ]


@pytest.mark.parametrize(
    ("figure", "tcp", "met"), [(0.45, 6, True), (0.7, 14.5, True), (0.7, 13.5, False)]
)
def test_one_of_two_goals(figure: float, tcp: float, met: bool) -> None:
    """A latency is good enough by itself, or by being a fortieth of TCP's round trip."""
    fake = Fake({FREEFLOW: figure, FREEFLOW_DIRECT: 1, OVERLAY: tcp})
    row = suite(fake, ["send_lat_2b"]).measure()["send_lat_2b"]
    assert row["met"] is met
    assert row["memcpy"] is None


def test_a_goal_without_a_figure() -> None:
    """What was not measured has neither reached its goal nor missed it; each round tries again."""
    fake = Fake({FREEFLOW_DIRECT: 0.4, OVERLAY: 30.0}, {("send_lat_2b", FREEFLOW)})
    row = suite(fake, ["send_lat_2b"]).measure()["send_lat_2b"]
    assert row["freeflow"] is None
    assert (row["met"], row["direct_met"]) == (None, True)
    assert row["failed"] == {FREEFLOW: "it fell over"}
    assert fake.runs.count(("send_lat_2b", FREEFLOW)) == 3
    assert VerbsGoal("figure", 1).met(row) is None


def test_cases_between_hosts_have_their_own_containers() -> None:
    """Each case runs where its name says; without containers there it has no figure."""
    names = ["send_lat_2b", "across_send_lat_2b"]
    fake = Fake({FREEFLOW: 1.0, FREEFLOW_DIRECT: 1.0, OVERLAY: 2.0})
    assert suite(fake, names).measure()["across_send_lat_2b"]["runs"] == 3
    alone = suite(fake, names)
    alone.between = None
    assert alone.measure()["across_send_lat_2b"]["runs"] == 0


def test_rounds_end_with_the_time() -> None:
    """No round begins that would not end in time, but the first one always does."""
    fake = Fake({FREEFLOW: 1.0, FREEFLOW_DIRECT: 1.0, OVERLAY: 2.0})
    row = suite(fake, ["send_lat_2b"], rounds=9, budget=7).measure()["send_lat_2b"]
    assert row["runs"] == 2


def test_report() -> None:
    """The table has columns for direct memory and memcpy, and the reason of a failure below."""
    given = {FREEFLOW: 150.0, FREEFLOW_DIRECT: 160.0, OVERLAY: 30.0, MEMCPY: 200.0}
    fake = Fake(given, {("send_rate_64b", FREEFLOW)})
    rows = suite(fake, ["write_bw_64k", "send_rate_64b"]).measure()
    made = report.BenchReport(machine=machine.describe([], "cubic", 3, 0.5), results=rows)
    table = report.as_table(made)
    assert "memcpy" in table
    assert "failed: send_rate_64b on freeflow: it fell over" in table
    line = next(line for line in table.splitlines() if line.startswith("write_bw_64k "))
    assert line.split()[2:] == [
        *("150", "160", "30", "200", "5.00x", "5.33x", "0.75x", "0.80x", "5.00x", "5.33x"),
        *("5%", "0%", "3", "yes", "yes", "to_memcpy", ">=", "0.7"),
    ]
    assert json.loads(report.as_json(made))["results"]["write_bw_64k"]["met"] is True


def test_cases() -> None:
    """Each case has a goal, another program for TCP, and memcpy where its goal needs it; names are
    unique.
    """
    assert len(set(case_names())) == len(cases())
    for one in cases():
        assert one.goals
        assert one.of(FREEFLOW) is one.of(FREEFLOW_DIRECT) is one.program
        assert one.of(OVERLAY) is one.twin
        assert one.program is not one.twin
        if isinstance(one.program, Perftest):
            assert (one.program.trips > 0) == (not one.case.more_is_better)
            assert one.program.column in (TYPICAL, AVERAGE, RATE)
        assert any(goal.measure == "to_memcpy" for goal in one.goals) == bool(one.copied)


def job(subject: str = FREEFLOW, library: str = "") -> Job:
    namespaces = ProcessNamespaces(Path("/proc/7"), IPv4Address("192.0.2.1"), library)
    return Job(SubjectPair(subject, namespaces, namespaces), Servers(), (1,), (0,), 0.5)


def test_iterations_fill_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of iterations follows from the rate of the run before, of each subject by itself;
    a short one comes first.
    """
    counts: list[int] = []
    average = {FREEFLOW: 0.5, OVERLAY: 1e6}

    def between(one: Job, _name: str, words: tuple[str, ...], _client: tuple[str, ...]) -> str:
        counts.append(int(words[words.index("-n") + 1]))
        return (
            "#bytes #iterations t_typical[usec] t_avg[usec]\n"
            f"2 {counts[-1]} {len(counts)} {average[one.pair.subject]}\n"
        )

    monkeypatch.setattr(verbs_programs, "_between", between)
    program = Perftest(TYPICAL, 1, 2, ("ib_send_lat",))
    assert program.short(job()).units == FEWEST
    done = program(job())
    assert counts == [FEWEST, 500_000]
    assert (done.figure, done.units) == (2, 500_000)
    program.short(job(OVERLAY))
    program(job(OVERLAY))
    assert counts[2:] == [FEWEST, 2 * FEWEST]
    average[FREEFLOW] = 0.001
    program(job())
    program(job())
    assert counts[4:] == [500_000, MOST]
    with pytest.raises(ProgramError, match=r"prints no BW average"):
        Perftest(AVERAGE, 1, 2, ("ib_send_bw",)).short(job())


@dataclass
class FakeAccounts:
    """Each run takes 10 ms of CPU time to start, and 2 us for each unit of work."""

    units: list[float] = field(default_factory=list)

    def read(self) -> None:
        """Nothing: `used_since` knows."""

    def used_since(self, _before: None) -> Used:
        return Used(10_000 + 2 * self.units[-1], 0.1)


def test_the_start_of_a_program_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU time per unit of work is without what a short run takes; that is made once for each
    subject of a case.
    """
    accounts = FakeAccounts()

    def between(_job: Job, _name: str, words: tuple[str, ...], _client: tuple[str, ...]) -> str:
        accounts.units.append(float(words[words.index("-n") + 1]))
        return f"#bytes #iterations t_typical[usec] t_avg[usec]\n2 {accounts.units[-1]} 0.5 0.5\n"

    monkeypatch.setattr(verbs_programs, "_between", between)
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1})
    runner, where = VerbsRunner(), replace(WITHIN, accounts=cast("Accounts", accounts))
    (one,) = [one for one in cases() if one.case.name == "send_lat_2b"]
    for _ in range(2):
        assert runner.take(one, FREEFLOW, where, 0.5) == VerbsSample(0.5, 2.0, 0.1)
    assert accounts.units == [FEWEST, 500_000, 500_000]


def test_only_ranks_have_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """What starts the ranks of Open MPI runs without the library, and hands it to them."""
    lines: list[list[str]] = []

    def run(line: list[str], _patience: float) -> str:
        lines.append(line)
        return "  0:       8 bytes   5000 times -->      1.47 Mbps in      1.20 usec\n"

    @contextmanager
    def serving(_pair: SubjectPair, _name: str, line: list[str]) -> Iterator[None]:
        lines.append(line)
        yield

    monkeypatch.setattr(verbs_programs, "run", run)
    monkeypatch.setattr(verbs_programs, "_serving", serving)
    monkeypatch.setattr(verbs_programs, "_keys", lambda _pair: None)
    done = mpi(8, 5000)(job(library="/run/x.so"))
    assert (done.figure, done.units) == (1.2, 35_000)
    sshd, mpirun = lines
    assert not [word for word in sshd if "LD_PRELOAD" in word]
    where = mpirun.index("LD_PRELOAD=/run/x.so")
    assert mpirun[where - 1] == "-x"
    assert sum("LD_PRELOAD" in word for word in mpirun) == 1
