"""Processes whose queue pairs the real router pairs: what becomes of one when the other, or the
router, goes. See `partner.c`.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from dataplane.control import Limits, RouterSettings
from testbed.patience import patience, within
from tests.dataplane.places import LIBRARY, compile_c
from tests.verbs.conftest import HEADER, HERE
from tests.verbs.router import TestRouter, router

SUCCESS: Final = "success"
LOST: Final = "transport retry counter exceeded"
FLUSHED: Final = "Work Request Flushed Error"
FATAL: Final = "local work queue catastrophic error"
OPEN: Final = 16
"""Requests that `flood` keeps open."""


class Partner:
    """A process of `partner.c`."""

    def __init__(self, command: list[Path], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def tell(self, line: str) -> None:
        """Send it a line."""
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """Its next answer."""
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        """Its answer to a line."""
        self.tell(line)
        return self.hear()

    def kill(self) -> None:
        """Kill it, as a crash does."""
        self.process.kill()
        self.process.wait()


class Partners:
    """Two of them, and their router."""

    def __init__(self, made: TestRouter, program: Path, library: Path) -> None:
        self.router = made
        self.command = [program]
        preloaded = (LIBRARY, library, library.with_name("libibverbs.so"))
        self.environment = {"LD_PRELOAD": ":".join(map(str, preloaded)), **made.environment}
        self.both = [self.start(), self.start()]

    def start(self) -> Partner:
        """A process, without a queue pair."""
        return Partner(self.command, self.environment)

    def connect(self) -> list[int]:
        """Make a queue pair in each, connected with each other. Where their memory is."""
        made = [partner.ask("make") for partner in self.both]
        for partner, of_peer in zip(self.both, reversed(made), strict=True):
            assert partner.ask(f"connect {of_peer}") == "connected"
        return [int(each.split()[1]) for each in made]

    def join(self, count: int) -> None:
        """Make so many queue pairs in each, connected with those of the other."""
        made = [partner.ask(f"many {count}") for partner in self.both]
        for partner, of_peer in zip(self.both, reversed(made), strict=True):
            assert partner.ask(f"join {of_peer}") == "connected"

    def signal_router(self, number: signal.Signals) -> None:
        """Stop the router, or let it go on."""
        assert self.router.process
        self.router.process.send_signal(number)


@contextlib.contextmanager
def two_partners(
    program: Path,
    library: Path,
    folder: Path,
    settings: RouterSettings | None = None,
    *,
    direct: bool = False,
) -> Iterator[Partners]:
    """Two processes that are not connected yet, with a router of these settings."""
    with router(folder, settings=settings, direct=direct) as made:
        pair = Partners(made, program, library)
        try:
            yield pair
        finally:
            for partner in pair.both:
                partner.kill()


@pytest.fixture(scope="module")
def program(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program `partner.c`."""
    if shutil.which("gcc") is None or not HEADER.exists() or not LIBRARY.exists():
        pytest.skip(f"missing: gcc, {HEADER} (make setup), {LIBRARY} (make library)")
    to = tmp_path_factory.mktemp("partner") / "partner"
    return compile_c(HERE / "partner.c", to, "-Wl,--no-as-needed", str(library))


@pytest.fixture(params=[False, True], ids=["records", "direct"])
def partners(
    program: Path, library: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Partners]:
    """Two processes that are not connected yet, whose memory is direct or not."""
    with two_partners(program, library, tmp_path, direct=request.param) as pair:
        yield pair


@pytest.fixture
def direct_partners(program: Path, library: Path, tmp_path: Path) -> Iterator[Partners]:
    """Two processes that are not connected yet, with direct memory."""
    with two_partners(program, library, tmp_path, direct=True) as pair:
        yield pair


def used(pid: int) -> int:
    """The time that a process has used, in ticks of the kernel's clock."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(words[11]) + int(words[12])


@pytest.mark.parametrize("how", ["poll", "sleep"])
def test_killed_at_work(partners: Partners, how: str) -> None:
    """If a process is killed while both read, write and add, its peer's oldest request fails, the
    others are flushed and the program has an event, also if it sleeps.
    """
    for _ in range(3):
        partners.connect()
        for partner in partners.both:
            assert partner.ask(f"flood {how}") == "begun"
        time.sleep(0.1)
        assert [partner.process.poll() for partner in partners.both] == [None, None]
        killed, other = partners.both
        killed.kill()
        assert other.hear() == ", ".join([LOST] + [FLUSHED] * (OPEN - 1))
        assert other.ask("event") == FATAL
        assert other.ask("destroy") == "destroyed"
        partners.both = [partners.start(), other]


def test_killed_while_idle(partners: Partners) -> None:
    """If a process is killed while nothing is open, its peer hears of it at its next request, or,
    if that needs nothing of the other process, soon.
    """
    partners.connect()
    killed, other = partners.both
    assert other.ask("write 3") == f"3 {SUCCESS}"
    killed.kill()
    until = time.monotonic() + patience(5)
    while (said := other.ask("write 1")) == f"1 {SUCCESS}":
        assert partners.router.direct
        assert time.monotonic() < until
    assert said == f"0 {LOST}"
    assert other.ask("event") == FATAL


def test_another_router(partners: Partners) -> None:
    """When the router is lost, what is paired goes on; what waits is paired by the next one, which
    also tells of a peer's end.
    """
    first, second = partners.both
    partners.connect()
    assert [partner.ask("write 1") for partner in partners.both] == [f"1 {SUCCESS}"] * 2
    partners.router.kill()
    assert [partner.ask("write 100") for partner in partners.both] == [f"100 {SUCCESS}"] * 2
    assert first.ask("sleep 100") == f"100 {SUCCESS}"
    partners.router.start()
    assert first.ask("write 100") == f"100 {SUCCESS}"
    time.sleep(patience(2))  # for the queue pairs to be told of
    first.tell("send 1")
    second.kill()
    assert first.hear() == f"0 {LOST}"
    assert first.ask("event") == FATAL


def test_paired_later(partners: Partners) -> None:
    """Queue pairs that ask while there is no router, or ask one that is lost, are paired in the
    end.
    """
    first, second = partners.both
    made = [partner.ask("make") for partner in partners.both]
    assert first.ask(f"connect {made[1]}") == "connected"
    time.sleep(0.2)
    partners.router.kill()
    assert second.ask(f"connect {made[0]}") == "connected"
    first.tell("sleep 10")
    time.sleep(0.2)
    partners.router.start()
    assert first.hear() == f"10 {SUCCESS}"
    assert second.ask("write 10") == f"10 {SUCCESS}"


def test_child(partners: Partners) -> None:
    """A child of fork has nothing of its parent's queue pairs, and disturbs neither of them; it may
    have its own.
    """
    first, second = partners.both
    partners.connect()
    first.tell("fork")
    assert first.hear() == "-5"  # -EIO
    assert second.ask("write 10") == f"10 {SUCCESS}"
    partners.connect()
    assert [partner.ask("write 10") for partner in partners.both] == [f"10 {SUCCESS}"] * 2


def is_shared(partner: Partner, address: int) -> bool:
    """Whether the pages at an address are a file's, and not a process's own."""
    for line in Path(f"/proc/{partner.process.pid}/maps").read_text().splitlines():
        place, flags, *_ = line.split()
        first, end = (int(text, 16) for text in place.split("-"))
        if first <= address < end:
            return flags.endswith("s")
    raise AssertionError(f"{address:x} is not mapped")


def warm_up(partners: Partners) -> list[int]:
    """Connect them, and write until the first one needs nothing of the second one any more. Where
    their memory is.
    """
    first, second = partners.both
    assert first.process.stdout
    addresses = partners.connect()
    until = time.monotonic() + patience(10)
    while True:
        assert first.ask("write 10") == f"10 {SUCCESS}"
        second.process.send_signal(signal.SIGSTOP)
        first.tell("write 10")
        direct = bool(select.select([first.process.stdout], [], [], 0.2)[0])
        second.process.send_signal(signal.SIGCONT)
        assert first.hear() == f"10 {SUCCESS}"
        if direct:
            return addresses
        assert time.monotonic() < until


def test_direct(direct_partners: Partners) -> None:
    """Direct memory needs nothing of the process that owns it."""
    warm_up(direct_partners)


def test_another_client(direct_partners: Partners) -> None:
    """When a client is killed, the server's memory is its own again, whatever the server does; and
    the next client writes there directly.
    """
    for _ in range(2):
        _, address = warm_up(direct_partners)
        client, server = direct_partners.both
        assert is_shared(server, address)
        client.kill()
        until = time.monotonic() + patience(10)
        while is_shared(server, address):
            assert time.monotonic() < until
            time.sleep(0.01)
        direct_partners.both = [direct_partners.start(), server]


def test_children(direct_partners: Partners) -> None:
    """Children have copies of direct memory, while a peer writes to their parent's."""
    warm_up(direct_partners)
    first, second = direct_partners.both
    assert first.ask("flood poll") == "begun"
    assert second.ask("breed 20") == "bred"
    assert first.process.poll() is None
    second.kill()
    assert first.hear().startswith(LOST)


def test_discarded(direct_partners: Partners) -> None:
    """Direct memory that its program discards reads as 0."""
    warm_up(direct_partners)
    assert direct_partners.both[1].ask("discard") == "discarded"


def test_moved(direct_partners: Partners) -> None:
    """Direct memory that its program moves is its own again."""
    partner = direct_partners.both[0]
    address, _ = direct_partners.connect()
    assert is_shared(partner, address)
    assert not is_shared(partner, int(partner.ask("move")))


def test_confined(partners: Partners) -> None:
    """The peer of a process that confines itself to certain system calls loses it."""
    first, second = partners.both
    partners.connect()
    assert second.ask("write 10") == f"10 {SUCCESS}"
    assert first.ask("confine") == "confined"
    assert second.ask("send 1") == f"0 {LOST}"
    assert second.ask("event") == FATAL


def test_closed(partners: Partners) -> None:
    """A process that closes descriptors of the library gets others, and is woken by them."""
    first, second = partners.both
    partners.connect()
    for _ in range(2):
        assert first.ask("sleep 100") == f"100 {SUCCESS}"
        assert second.ask("close") == "closed"
        assert first.ask("sleep 100") == f"100 {SUCCESS}"
        assert second.ask("sleep 100") == f"100 {SUCCESS}"
        assert first.ask("close") == "closed"
        assert first.ask("sleep 100") == f"100 {SUCCESS}"


def test_many(partners: Partners) -> None:
    """A thousand queue pairs between two processes all work, whether the program polls or sleeps,
    and each process sleeps when they have nothing to do.
    """
    partners.join(1000)
    for how in ("poll", "sleep"):
        for _ in range(3):
            for partner in partners.both:
                assert partner.ask(f"each {how}") == f"1000 {SUCCESS}"
    time.sleep(patience(1))
    before = [used(partner.process.pid) for partner in partners.both]
    time.sleep(1)
    after = [used(partner.process.pid) for partner in partners.both]
    assert max(map(int.__sub__, after, before)) <= 2


def test_router_that_does_not_read(partners: Partners) -> None:
    """No program waits for a router that does not read for a while, and nothing that was to be told
    is lost: all queue pairs are paired in the end, and their slots are given back.
    """
    made = [partner.ask("many 1000") for partner in partners.both]
    partners.signal_router(signal.SIGSTOP)
    begin = time.monotonic()
    for partner, of_peer in zip(partners.both, reversed(made), strict=True):
        assert partner.ask(f"join {of_peer}") == "connected"
    assert time.monotonic() - begin < within(5)
    for partner in partners.both:
        partner.tell("each sleep")
    partners.signal_router(signal.SIGCONT)
    assert [partner.hear() for partner in partners.both] == [f"1000 {SUCCESS}"] * 2
    partners.signal_router(signal.SIGSTOP)
    begin = time.monotonic()
    assert [partner.ask("part") for partner in partners.both] == ["parted"] * 2
    assert time.monotonic() - begin < within(5)
    partners.signal_router(signal.SIGCONT)
    until = time.monotonic() + patience(10)
    while partners.router.client.verbs().queue_pairs:
        assert time.monotonic() < until
        time.sleep(0.05)
    partners.connect()
    assert partners.both[0].ask("write 10") == f"10 {SUCCESS}"


def test_refused_for_the_moment(program: Path, library: Path, tmp_path: Path) -> None:
    """A queue pair that the router refuses because there are too many is paired when there are no
    more.
    """
    few = RouterSettings(limits=Limits(queue_pairs=3))
    with two_partners(program, library, tmp_path, few) as partners:
        partners.join(2)
        second = partners.both[1]
        second.tell("each poll")
        time.sleep(0.5)
        partners.router.settings = RouterSettings()
        partners.router.learn(partners.router.containers)
        assert second.hear() == f"2 {SUCCESS}"
        assert partners.both[0].ask("each sleep") == f"2 {SUCCESS}"


def test_no_descriptor_for_the_moment(partners: Partners) -> None:
    """Two processes of which one has no descriptor left for their arena are paired when it has."""
    first, second = partners.both
    made = [partner.ask("make") for partner in partners.both]
    assert first.ask("files 3") == "limited"
    for partner, of_peer in zip(partners.both, reversed(made), strict=True):
        assert partner.ask(f"connect {of_peer}") == "connected"
    second.tell("write 10")
    time.sleep(0.5)
    assert first.ask("files 1000") == "limited"
    assert second.hear() == f"10 {SUCCESS}"
    assert first.ask("sleep 10") == f"10 {SUCCESS}"


def sleeps(pid: int) -> int:
    """How often the main thread of a process has gone to sleep."""
    status = Path(f"/proc/{pid}/task/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


@pytest.mark.parametrize("partners", [False], ids=["records"], indirect=True)
def test_busy_core(partners: Partners) -> None:
    """Two programs that poll on one core with a third give way by sleeping: who yields gets the
    core after all others.
    """
    core = {min(os.sched_getaffinity(0))}
    pids = [partner.process.pid for partner in partners.both]
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as busy:
        try:
            for pid in [*pids, busy.pid]:
                os.sched_setaffinity(pid, core)
            partners.connect()
            assert [partner.ask("flood poll") for partner in partners.both] == ["begun"] * 2
            before = [sleeps(pid) for pid in pids]
            time.sleep(patience(1))
            assert min(sleeps(pid) - at for pid, at in zip(pids, before, strict=True)) > 20
        finally:
            busy.kill()


def test_itself(partners: Partners) -> None:
    """A queue pair that is connected with itself needs no peer."""
    partner = partners.both[0]
    assert partner.ask(f"connect {partner.ask('make')}") == "connected"
    assert partner.ask("write 100") == f"100 {SUCCESS}"
    assert partner.ask("sleep 100") == f"100 {SUCCESS}"
    assert partner.ask("destroy") == "destroyed"
