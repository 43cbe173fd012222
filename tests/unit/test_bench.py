"""Statistics of the benchmarks, and parsers of load programs; nothing is measured here."""

from __future__ import annotations

import json
import random
import sys
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from bench import load, parse, report, rounds, stats
from bench.errors import ProgramError
from bench.latency import Latency
from bench.machine import Machine, cpu_model
from bench.namespaces import ProcessNamespaces, SubjectPair, run, run_together

MORE = stats.Case("stream_1", "Gbit/s", True, "one stream")
LESS = stats.Case("tcp_rr_one_core", "us", False, "round trips")

MACHINE = Machine(
    when="2026-01-02T03:04:05+00:00",
    cpu="a CPU",
    cores=4,
    memory_gib=8.0,
    kernel="6.1",
    system="Debian",
    load=0.5,
    engines=["26.1.5"],
    congestion_control="cubic",
    rounds=3,
    seconds=2.0,
    absent={},
)


def test_row_has_medians_and_ratios() -> None:
    """A row gives each subject's median and freeflow's ratio to the others' medians."""
    row = stats.row(
        MORE, {"freeflow": [12, 10, 11], "overlay": [10, 10, 100], "host": [20, 22, 24]}
    )
    assert (row["freeflow"], row["overlay"], row["host"]) == (11, 10, 22)
    assert row["ratio_to_overlay"] == pytest.approx(1.1)
    assert row["ratio_to_host"] == pytest.approx(0.5)
    assert row["runs"] == 3
    assert row["better"] == "more"


def test_subject_without_samples_is_null() -> None:
    """A subject without samples is null in the row, and so is every ratio that needs it."""
    row = stats.row(LESS, {"freeflow": [5.0]})
    assert row["freeflow"] == 5.0
    assert row["overlay"] is None
    assert row["host"] is None
    assert row["ratio_to_overlay"] is None
    assert row["ratio_to_host"] is None
    assert row["spread"] is None


def test_case_that_was_not_measured_is_all_null() -> None:
    """A case without any run is a row of nulls, not an error and not a zero."""
    row = stats.row(MORE, {})
    assert [row["freeflow"], row["overlay"], row["host"], row["spread"]] == [None] * 4
    assert row["runs"] == 0


def test_spread_is_that_of_the_most_scattered_subject() -> None:
    """The spread of a row is the largest interquartile range over median among its subjects."""
    row = stats.row(MORE, {"freeflow": [10, 10, 10, 10, 10], "overlay": [8, 9, 10, 11, 12]})
    assert row["spread_of"] == {"freeflow": 0, "overlay": pytest.approx(0.2), "host": None}
    assert row["spread"] == pytest.approx(0.2)


def test_ratio_to_nothing_is_null() -> None:
    """A median of zero gives no ratio instead of a division by zero."""
    assert stats.row(MORE, {"freeflow": [1.0], "overlay": [0.0]})["ratio_to_overlay"] is None


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 50), (99, 99), (100, 100), (0, 1), (99.5, 100)]
)
def test_percentile_was_really_seen(percent: float, expected: float) -> None:
    """A percentile is one of the samples, by nearest rank."""
    assert stats.percentile([float(n) for n in range(100, 0, -1)], percent) == expected


def test_percentile_of_nothing_is_refused() -> None:
    """Without samples there is no percentile."""
    with pytest.raises(ValueError, match="no samples"):
        stats.percentile([], 50)


def test_row_of_a_percentile_case() -> None:
    """A case that is a percentile takes it over all runs of the subject."""
    row = stats.row(LESS, {"freeflow": [float(n) for n in range(1, 101)]}, percent=99)
    assert row["freeflow"] == 99


def test_pingpong_output() -> None:
    """pingpong's JSON becomes counts and microseconds."""
    trips = parse.pingpong(
        '{"count": 10, "lost": 1, "p50_us": 20.5, "p99_us": 40.25, "mean_us": 21.0, "cpu_us": 99}\n'
    )
    assert trips == parse.RoundTrips(10, 1, 20.5, 40.25, 99)


def test_iperf3_output() -> None:
    """The receiver's figures are taken, not the sender's."""
    text = json.dumps(
        {
            "end": {
                "sum_sent": {"bits_per_second": 9e9, "bytes": 3},
                "sum_received": {"bits_per_second": 8e9, "bytes": 2},
            }
        }
    )
    assert parse.iperf3(text) == parse.Transfer(8e9, 2)


def test_iperf3_error_is_passed_on() -> None:
    """An error in iperf3's output is raised, although its exit code may be 0."""
    with pytest.raises(ProgramError, match="Connection refused"):
        parse.iperf3('{"error": "unable to connect: Connection refused"}')


@pytest.mark.parametrize(
    "text",
    [
        '"test","rps","avg_latency_ms"\n"GET","61056.12","0.4"\n',
        '"GET","61056.12"\n',
        '"GET: rps=0.0 (overall: 0.0)"\r"GET","61056.12"\n'.replace("\r", "\n"),
    ],
)
def test_redis_benchmark_output(text: str) -> None:
    """The rate is found with and without the header line that newer versions print."""
    assert parse.redis_benchmark(text) == 61056.12


WRK = """Running 2s test @ http://10.0.1.2:7004/
  2 threads and 50 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   702.93us  397.12us   8.82ms   83.59%
  142838 requests in 2.00s, 188.13MB read
{extra}Requests/sec:  71419.44
Transfer/sec:     94.06MB
"""


def test_latencies_of_redis_benchmark() -> None:
    """p50 and p99 are parsed where the version prints them."""
    text = '"test","rps","p50_latency_ms","p99_latency_ms"\n"GET","9.5","0.511","1.25"\n'
    assert parse.redis_latency(text) == Latency(511, 1250)
    assert parse.redis_latency('"GET","61056.12"\n') is None
    with pytest.raises(ProgramError, match="latencies"):
        parse.redis_latency(text.replace("0.511", "fast"))


def test_latencies_of_wrk() -> None:
    """p50 and p99 are parsed in every unit; output without them is an error."""
    text = "  Latency Distribution\n     50%  702.93us\n     75%    1.10ms\n     99%    1.20s\n"
    assert parse.wrk_latency(text) == Latency(702.93, 1_200_000)
    with pytest.raises(ProgramError, match="no latency"):
        parse.wrk_latency("  Latency   702.93us  397.12us   8.82ms   83.59%\n")


def test_wrk_output() -> None:
    """wrk's requests per second are read."""
    assert parse.wrk(WRK.format(extra="")) == 71419.44


@pytest.mark.parametrize(
    "extra",
    [
        "  Non-2xx or 3xx responses: 142838\n",
        "  Socket errors: connect 0, read 12, write 0, timeout 0\n",
    ],
)
def test_wrk_with_failures_gives_no_figure(extra: str) -> None:
    """A run with bad responses or failed connections is refused: errors are fast."""
    with pytest.raises(ProgramError):
        parse.wrk(WRK.format(extra=extra))


@pytest.mark.parametrize(
    "reader", [parse.pingpong, parse.iperf3, parse.redis_benchmark, parse.wrk, parse.busy_ticks]
)
def test_unknown_output_is_refused(reader: object) -> None:
    """Unknown output is an error, not a figure."""
    assert callable(reader)
    for text in ("", "hello", "{}", "[1]"):
        with pytest.raises(ProgramError):
            reader(text)


def test_busy_ticks_count_softirq_and_not_idle() -> None:
    """Busy ticks are user, nice, system, irq and softirq, without idle, iowait, steal and guest."""
    stat = "cpu  1 2 4 1000 2000 8 16 9 7 7\ncpu0 1 1 1 1 1 1 1\n"
    assert parse.busy_ticks(stat) == 31
    assert parse.stolen_ticks(stat) == 9


def test_cpu_model_is_found() -> None:
    """The machine's CPU is named by /proc/cpuinfo's model name."""
    assert cpu_model("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n") == "Some CPU @ 2 GHz"


def pair(subject: str) -> SubjectPair:
    namespaces = ProcessNamespaces(Path("/proc/self"), IPv4Address("192.0.2.1"))
    return SubjectPair(subject, namespaces, namespaces)


def test_rounds_measure_every_subject_each_time() -> None:
    """In each round each load runs once on each subject before the next load begins."""
    log: list[tuple[str, str]] = []

    def load_of(name: str) -> load.Load:
        def measure(where: SubjectPair, seconds: float) -> load.Figures:
            log.append((name, where.subject))
            return {name: seconds}

        return load.Load(name, measure)

    pairs = [pair("freeflow"), pair("overlay"), pair("host")]
    samples = rounds.interleaved(
        [load_of("a"), load_of("b")], pairs, 4, 0.25, random.Random(7), lambda _: None
    )
    assert samples["a"] == {"freeflow": [0.25] * 4, "overlay": [0.25] * 4, "host": [0.25] * 4}
    turns = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert [{name for name, _ in turn} for turn in turns] == [{"a"}, {"b"}] * 4
    assert all(len({subject for _, subject in turn}) == 3 for turn in turns)
    assert len({tuple(subject for _, subject in turn) for turn in turns}) > 1


def test_rounds_end_when_time_is_up() -> None:
    """No round begins after the time limit; each one is completed, and at least one is made."""
    clock = iter(range(100))

    def measure(_: SubjectPair, seconds: float) -> load.Figures:
        return {"a": seconds}

    pairs = [pair("freeflow"), pair("host")]
    arguments = ([load.Load("a", measure)], pairs, 9, 1.0, random.Random(1), lambda _: None)
    some = rounds.interleaved(*arguments, lambda: next(clock) >= 2)
    assert {subject: len(values) for subject, values in some["a"].items()} == {
        "freeflow": 3,
        "host": 3,
    }
    assert len(rounds.interleaved(*arguments, lambda: True)["a"]["host"]) == 1


def test_json_and_table_show_the_same() -> None:
    """The table has a line per case of the JSON, with dashes where it has nulls."""
    rows = {"stream_1": stats.row(MORE, {"freeflow": [11.0, 11.0], "overlay": [10.0, 10.0]})}
    made = report.BenchReport(machine=MACHINE, results=rows)
    assert json.loads(report.as_json(made)) == made
    line = next(line for line in report.as_table(made).splitlines() if line.startswith("stream_1 "))
    assert line.split() == ["stream_1", "Gbit/s", "11", "10", "-", "1.10x", "-", "0%", "2"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "-"), (0.0, "0"), (0.05123, "0.0512"), (12.3456, "12.35"), (61056.12, "61,056")],
)
def test_numbers_for_people(value: float | None, expected: str) -> None:
    """Figures in the table have at most four significant digits."""
    assert report.number(value) == expected


def test_failing_program_says_why() -> None:
    """The error of a failed load program has its output and exit code."""
    with pytest.raises(ProgramError, match="exit code 3: no such luck"):
        run([sys.executable, "-c", "import sys; sys.exit(print('no such luck') or 3)"], 10)


def test_missing_program_is_named() -> None:
    """A load program that is not installed is named in the error."""
    with pytest.raises(ProgramError, match="no-such-program"):
        run(["no-such-program"], 10)


def test_hanging_program_is_ended(tmp_path: Path) -> None:
    """A load program that does not end in time is an error, and no other one keeps running."""
    notes = [tmp_path / "a", tmp_path / "b"]
    commands = [["sh", "-c", f"echo $$ >{note}; exec sleep 60"] for note in notes]
    with pytest.raises(ProgramError, match="still running after"):
        run_together(commands, 1)
    assert not [note for note in notes if Path("/proc", note.read_text().strip()).exists()]


def test_programs_together_answer_in_their_order() -> None:
    """Output of programs started together comes back in the order in which they were given."""
    assert run_together([["sh", "-c", "sleep 0.1; echo a"], ["echo", "b"]], 10) == ["a\n", "b\n"]
