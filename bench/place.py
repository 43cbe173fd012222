"""Where a load program runs: inside the network and file system of a container, entered from outside.

`docker exec` would cost a daemon's work for each run; a program entered with nsenter costs a fork. All subjects are
entered the same way, so what entering costs is in none of the ratios.
"""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from bench.errors import ProgramError

CONGESTION_CONTROL: Final = "cubic"
"""The machine's default may be one that paces (bbr), which hides what the path can carry."""
TCP: Final = "tcp"
UNIX: Final = "unix"
RING: Final = "ring"
TOOLS: Final = "/bench"
"""Where a container finds what isn't in Debian."""


@dataclass(frozen=True, slots=True)
class Place:
    """The namespaces of a process, by its directory in some /proc; `address` is how the other end reaches it.

    A directory, not a PID: a host of the test bed numbers its processes itself, in a /proc of its own.
    """

    process: Path
    address: IPv4Address
    library: str = ""
    """What programs here get as LD_PRELOAD; empty: nothing."""
    tools: str = TOOLS

    @property
    def root(self) -> Path:
        """Its file system, seen from outside."""
        return self.process / "root"

    def enter(
        self,
        *program: str,
        cores: Collection[int] = (),
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> list[str]:
        """The command line that runs `program` in the container's network and file system, on `cores` only if any.

        `before` is a command that runs another: it gets no library.
        """
        variables = {
            **({"LD_PRELOAD": self.library} if self.library else {}),
            **(environment or {}),
        }
        return [
            *("nsenter", f"--net={self.process}/ns/net", f"--mount={self.process}/ns/mnt", "--"),
            *(("taskset", "--cpu-list", ",".join(map(str, sorted(cores)))) if cores else ()),
            *before,
            *(("env", *(f"{k}={v}" for k, v in variables.items())) if variables else ()),
            *program,
        ]

    def enter_network(self, *program: str) -> list[str]:
        """The command line that runs a program of this machine in the container's network."""
        return ["nsenter", f"--net={self.process}/ns/net", "--", *program]

    def set_congestion_control(self) -> None:
        """For all sockets made later in the network namespace, inside `congestion_control_allowed`.

        Raises `ProgramError` if it doesn't hold.
        """
        knob = Path("/proc/sys/net/ipv4/tcp_congestion_control")
        script = f"echo {CONGESTION_CONTROL} >{knob} && cat {knob}"
        said = run(self.enter_network("sh", "-c", script), 10)
        if said.strip() != CONGESTION_CONTROL:
            raise ProgramError(f"{knob} of {self.process} says {said.strip()!r} after setting it")


@contextmanager
def congestion_control_allowed() -> Iterator[None]:
    """A network namespace may choose only from the machine's allowed list: cubic is on it while this lasts."""
    knob = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
    before = knob.read_text().split()
    if CONGESTION_CONTROL in before:
        yield
        return
    try:
        knob.write_text(" ".join([*before, CONGESTION_CONTROL]))
    except OSError as error:
        raise ProgramError(
            f"{knob}: {error.strerror}: add {CONGESTION_CONTROL} to it where this machine's kernel is set up"
        ) from error
    try:
        yield
    finally:
        knob.write_text(" ".join(before))


@dataclass(frozen=True, slots=True)
class Pair:
    """One subject: two ends that can reach each other, over TCP unless `transport` says otherwise."""

    subject: str
    client: Place
    server: Place
    transport: str = TCP


def run(argv: Sequence[str], timeout: float) -> str:
    """What the program printed. Raises `ProgramError` when it fails or takes longer than `timeout` seconds."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise ProgramError(f"{' '.join(argv)}: no end after {timeout:g} s") from error
    except OSError as error:
        raise ProgramError(f"{argv[0]}: {error.strerror}: is it installed?") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-500:]
        raise ProgramError(f"{' '.join(argv)}: exit code {done.returncode}: {said}")
    return done.stdout


def run_together(commands: Sequence[Sequence[str]], timeout: float) -> list[str]:
    """What programs started at the same moment printed, in their order; none is left behind on failure."""
    started: list[subprocess.Popen[str]] = []
    try:
        for argv in commands:
            started.append(
                subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        said = []
        for process, argv in zip(started, commands, strict=True):
            try:
                out, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired as error:
                raise ProgramError(f"{' '.join(argv)}: no end after {timeout:g} s") from error
            if process.returncode != 0:
                raise ProgramError(
                    f"{' '.join(argv)}: exit code {process.returncode}: {out.strip()[-500:]}"
                )
            said.append(out)
        return said
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
