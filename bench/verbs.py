"""The suite `verbs`: programs of RDMA verbs in containers, and what one has without verbs.

`freeflow` is a program, unchanged, with our libibverbs, and `freeflow_direct` the same on a network
with `-o verbs_direct=on`, where there is this option. `overlay` is the same done with TCP on
Docker's overlay: by the program itself where it speaks TCP too, else by messages of one size there
and back, or in one direction. `memcpy` copies the same number of bytes, as often as one core can.
Latencies of SEND and WRITE are of one way, as perftest tells them, so TCP's are half a round trip;
those of READ and of atomic operations are of a whole one.

CPU time is that of the programs on one host. Between hosts it is that of both with all their
processes (`bench/accounting.py`), because the relays work for the programs.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from bench.accounting import Accounts, Used
from bench.errors import ProgramError
from bench.measures import INTERNET, Measure, iperf3_stream, pingpong, stream
from bench.namespaces import SubjectPair
from bench.rounds import Say
from bench.sampling import cores_of
from bench.servers import IPERF3, PINGPONG, STREAM, Servers
from bench.stats import (
    FREEFLOW,
    FREEFLOW_DIRECT,
    MEMCPY,
    OVERLAY,
    Case,
    Measured,
    VerbsRow,
    verbs_row,
)
from bench.verbs_programs import (
    Job,
    Perftest,
    Program,
    ProgramRun,
    copies,
    mpi,
    rstream,
    tcp,
    ucx,
)

ACROSS: Final = "across_"
"""Prefix of the names of cases between two hosts."""
SMALL: Final = 64
LARGE: Final = 65536
MEGABYTE: Final = 1 << 20
APART: Final = ((1,), (0,))
"""Cores of server and client, counted from the last: both may spin."""
TOGETHER: Final = ((0,), (0,))
ANYWHERE: Final[tuple[tuple[int, ...], tuple[int, ...]]] = ((), ())
TYPICAL: Final = "t_typical[usec]"
AVERAGE: Final = "BW average[Gb/sec]"
RATE: Final = "MsgRate[Mpps]"
TRIP: Final = "round trip"


@dataclass(frozen=True, slots=True)
class VerbsGoal:
    """What a row has to reach: a figure or a ratio that is at least this, or with `at_most` at
    most.
    """

    measure: Literal["figure", "to_overlay", "to_memcpy"]
    limit: float
    at_most: bool = False

    def met(self, row: VerbsRow, subject: str = FREEFLOW) -> bool | None:
        """Whether this subject reaches it; None: there is no figure."""
        names = {
            "figure": subject,
            "to_overlay": "ratio_to_overlay" if subject == FREEFLOW else "direct_to_overlay",
            "to_memcpy": "ratio_to_memcpy" if subject == FREEFLOW else "direct_to_memcpy",
        }
        found: float | None = cast("Mapping[str, Any]", row)[names[self.measure]]
        if found is None:
            return None
        return found <= self.limit if self.at_most else found >= self.limit

    def words(self) -> str:
        return f"{self.measure} {'<=' if self.at_most else '>='} {self.limit:.3g}"


@dataclass(frozen=True, slots=True)
class VerbsCase:
    """A program, the same with TCP (`twin`), and the unit of work that CPU time is divided by.

    `copied` is the size of memcpy's copies in bytes, 0: it is not compared. A row meets its goals
    if it meets one of them.
    """

    case: Case
    cpu_of: str
    program: Program
    twin: Program
    goals: tuple[VerbsGoal, ...]
    copied: int = 0
    cores: tuple[tuple[int, ...], tuple[int, ...]] = APART

    @property
    def across(self) -> bool:
        return self.case.name.startswith(ACROSS)

    def of(self, subject: str) -> Program:
        """What is run for a subject."""
        if subject == MEMCPY:
            return copies(self.copied)
        return self.twin if subject == OVERLAY else self.program


def _trip(scale: float) -> Program:
    """The round trip of a message that is about as small as perftest's, times `scale`."""
    case = Case("trip", "us", False, "4 bytes there and back over TCP")
    return tcp(Measure(case, PINGPONG, pingpong("stream", 4), TRIP, INTERNET), scale)


def _flow(size: int, scale: float, units: float = 1.0) -> Program:
    """A stream in one direction, in GB/s times `scale`; units are GB times `units`."""
    case = Case("flow", "GB/s", True, f"writes of {size} bytes over TCP")
    return tcp(Measure(case, STREAM, stream(size), "GB", INTERNET), scale, units)


def _latency(name: str, program: str, limit: float, about: str, *, whole: bool) -> VerbsCase:
    scale = 1.0 if whole else 0.5
    return VerbsCase(
        Case(name, "us", False, about if whole else f"{about}; half a round trip of TCP"),
        TRIP,
        Perftest(TYPICAL, 1, 1 if whole else 2, (program,)),
        _trip(scale),
        (VerbsGoal("figure", limit, True), VerbsGoal("to_overlay", 1 / 40 / scale, True)),
    )


def _bandwidth(name: str, program: str, share: float) -> VerbsCase:
    return VerbsCase(
        Case(name, "Gbit/s", True, f"{program}, messages of {LARGE} bytes"),
        "GB",
        Perftest(AVERAGE, LARGE / 1e9, 0, (program, "-s", str(LARGE), "--report_gbits")),
        _flow(LARGE, 8.0),
        (VerbsGoal("to_memcpy", share),),
        LARGE,
    )


def _rate(name: str, program: str, millions: float) -> VerbsCase:
    return VerbsCase(
        Case(name, "million/s", True, f"{program}, messages of {SMALL} bytes"),
        "message",
        Perftest(RATE, 1, 0, (program, "-s", str(SMALL), "--report_gbits")),
        _flow(SMALL, 1e3 / SMALL, 1e9 / SMALL),
        (VerbsGoal("figure", millions),),
    )


def _across() -> list[VerbsCase]:
    """Two hosts without a card: the relays use TCP. The programs may use any core."""
    flow = Case("iperf3", "Gbit/s", True, "one stream of iperf3")
    bits = ("ib_write_bw", "-s", str(LARGE), "--report_gbits")
    return [
        VerbsCase(
            Case(
                *(f"{ACROSS}write_bw_64k", "Gbit/s", True),
                f"ib_write_bw, messages of {LARGE} bytes; one stream of iperf3",
            ),
            "GB",
            Perftest(AVERAGE, LARGE / 1e9, 0, bits),
            tcp(Measure(flow, IPERF3, iperf3_stream, "GB")),
            (VerbsGoal("to_overlay", 1.0),),
            cores=ANYWHERE,
        ),
        VerbsCase(
            Case(f"{ACROSS}send_lat_2b", "us", False, "ib_send_lat; half a round trip of TCP"),
            TRIP,
            Perftest(TYPICAL, 1, 2, ("ib_send_lat",)),
            _trip(0.5),
            (VerbsGoal("to_overlay", 1.0, True),),
            cores=ANYWHERE,
        ),
    ]


def _applications() -> list[VerbsCase]:
    """Programs that speak TCP as well."""
    return [
        VerbsCase(
            Case(
                "rstream_64k", "Gbit/s", True, f"rstream, there and back, pieces of {LARGE} bytes"
            ),
            "GB",
            rstream(LARGE, 20000),
            rstream(LARGE, 20000, "-T", "s"),
            (VerbsGoal("figure", 30),),
        ),
        VerbsCase(
            Case("ucx_tag_bw_1m", "Gbit/s", True, "ucx_perftest tag_bw, messages of 1 MiB"),
            "GB",
            ucx("tag_bw", MEGABYTE, 3000),
            ucx("tag_bw", MEGABYTE, 1000, by_tcp=True),
            (VerbsGoal("to_memcpy", 0.5),),
            MEGABYTE,
        ),
        VerbsCase(
            Case("mpi_pingpong_8b", "us", False, "NetPIPE over Open MPI, 8 bytes, one way"),
            TRIP,
            mpi(8, 20000),
            mpi(8, 2000, by_tcp=True),
            (VerbsGoal("figure", 1.5, True),),
        ),
    ]


def cases() -> list[VerbsCase]:
    """All cases."""
    sleeping = VerbsCase(
        Case(
            *("send_lat_2b_asleep", "us", False),
            "ib_send_lat -e, both ends on one core; half a round trip of TCP",
        ),
        TRIP,
        Perftest(TYPICAL, 1, 2, ("ib_send_lat", "-e")),
        _trip(0.5),
        (VerbsGoal("to_overlay", 1.0, True),),
        cores=TOGETHER,
    )
    return [
        _latency("send_lat_2b", "ib_send_lat", 0.5, "ib_send_lat", whole=False),
        _latency("write_lat_2b", "ib_write_lat", 0.4, "ib_write_lat", whole=False),
        _latency("read_lat_2b", "ib_read_lat", 0.3, "ib_read_lat", whole=True),
        _latency("atomic_lat", "ib_atomic_lat", 0.3, "ib_atomic_lat", whole=True),
        sleeping,
        _bandwidth("write_bw_64k", "ib_write_bw", 0.7),
        _bandwidth("read_bw_64k", "ib_read_bw", 0.7),
        _bandwidth("send_bw_64k", "ib_send_bw", 0.25),
        _rate("write_rate_64b", "ib_write_bw", 10),
        _rate("send_rate_64b", "ib_send_bw", 4),
        *_applications(),
        *_across(),
    ]


def case_names() -> list[str]:
    """Names of all cases."""
    return [one.case.name for one in cases()]


@dataclass(slots=True)
class Place:
    """The subjects of one host, or of two, with the servers for TCP, and whose CPU time counts."""

    pairs: Mapping[str, SubjectPair]
    servers: Servers
    accounts: Accounts


@dataclass(frozen=True, slots=True)
class VerbsSample:
    """A run's result: CPU time per unit of work, and the share of the machine that others used."""

    figure: float
    cpu_us: float
    foreign: float


@dataclass(slots=True)
class VerbsRunner:
    """Makes runs, and reads CPU time before and after each.

    Programs of perftest take longer to start and to end than to send what they measure. `started`
    has CPU time and units of work of a subject's short run in a case; only what a run takes and
    does beyond them counts.
    """

    started: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def take(self, one: VerbsCase, subject: str, place: Place, seconds: float) -> VerbsSample:
        """One run. Raises `ProgramError` if a program failed."""
        ours = os.sched_getaffinity(0)
        server, client = (cores_of(some, ours) for some in one.cores)
        pair = place.pairs[OVERLAY if subject == MEMCPY else subject]
        job, program = Job(pair, place.servers, server, client, seconds), one.of(subject)
        key = (one.case.name, subject)
        if isinstance(program, Perftest) and key not in self.started:
            short, used = _run(program.short, job, place.accounts)
            self.started[key] = (used.cpu_us, short.units)
        done, used = _run(program, job, place.accounts)
        cpu_us, units = self.started.get(key, (0.0, 0.0))
        return VerbsSample(
            done.figure, max(used.cpu_us - cpu_us, 0.0) / (done.units - units), used.foreign
        )


def _run(program: Program, job: Job, accounts: Accounts) -> tuple[ProgramRun, Used]:
    before = accounts.read()
    done = program(job)
    return done, accounts.used_since(before)


@dataclass(slots=True)
class VerbsSuite:
    """One run of the suite: up to `rounds` rounds, as many as fit in `budget` seconds.

    `within` and `between` have the subjects of one host and of two.
    """

    within: Place
    between: Place | None
    names: Sequence[str]
    rounds: int
    seconds: float
    budget: float
    order: random.Random
    say: Say
    take: Callable[[VerbsCase, str, Place, float], VerbsSample]
    clock: Callable[[], float] = time.monotonic
    found: dict[str, Measured] = field(default_factory=dict)
    foreign: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def measure(self) -> dict[str, VerbsRow]:
        """The rows of all chosen cases."""
        chosen = [one for one in cases() if one.case.name in self.names]
        self.found = {one.case.name: Measured(one.case, one.cpu_of) for one in chosen}
        start, longest = self.clock(), 0.0
        for number in range(self.rounds):
            begun = self.clock()
            if number and begun + longest > start + self.budget:
                self.say(f"the time is used up after {number} of {self.rounds} rounds")
                break
            for one in chosen:
                self._each(one, f"round {number + 1}/{self.rounds}")
            longest = max(longest, self.clock() - begun)
        rows = {one.case.name: self._row(one) for one in chosen}
        for name, row in rows.items():
            for subject, met in ((FREEFLOW, row["met"]), (FREEFLOW_DIRECT, row["direct_met"])):
                word = "no figure" if met is None else "met" if met else "MISSED"
                self.say(f"{word}: {name} on {subject}, {row['goal']}")
        return rows

    def _each(self, one: VerbsCase, label: str) -> None:
        """The case on all subjects, in another order each time."""
        place = self.between if one.across else self.within
        if place is None:
            return
        compared = one.copied and OVERLAY in place.pairs
        able = [*place.pairs, *([MEMCPY] if compared else [])]
        found = self.found[one.case.name]
        for subject in self.order.sample(able, len(able)):
            try:
                sample = self.take(one, subject, place, self.seconds)
            except ProgramError as error:
                # The next round tries again; the row has the reason in any case.
                found.failed[subject] = str(error)
                self.say(f"FAILED: {one.case.name} on {subject}: {error}")
                continue
            found.keep(subject, sample.figure, sample.cpu_us, None)
            self.foreign.setdefault(one.case.name, {}).setdefault(subject, []).append(
                sample.foreign
            )
            self.say(
                f"{label}  {subject:<15} {one.case.name} {sample.figure:.5g} {one.case.unit}; "
                f"{sample.cpu_us:.4g} us/{one.cpu_of}; foreign {sample.foreign:.0%}"
            )

    def _row(self, one: VerbsCase) -> VerbsRow:
        row = verbs_row(
            self.found[one.case.name],
            " or ".join(goal.words() for goal in one.goals),
            self.foreign.get(one.case.name, {}),
        )
        row["met"], row["direct_met"] = (
            _any([goal.met(row, subject) for goal in one.goals])
            for subject in (FREEFLOW, FREEFLOW_DIRECT)
        )
        return row


def _any(answers: Sequence[bool | None]) -> bool | None:
    """Whether one is true; None: none is known."""
    known = [answer for answer in answers if answer is not None]
    return any(known) if known else None
