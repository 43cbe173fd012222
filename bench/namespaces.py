"""Runs load programs in the network and mount namespaces of a container, from outside.

`docker exec` would make the daemon work for each run; nsenter costs one fork. All subjects are
entered in the same way, so that cost is in none of the ratios.

Each load program gets a session of its own (`start`). The kernel shares processors between sessions
first (autogroup, sched(7)). In a session with dozens of programs that wake each other all the time,
Linux 6.18 let other processes wait for up to a minute: engines, routers, and its own RCU thread,
without which no program can join a control group.
"""

from __future__ import annotations

import re
import select
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import IO, Any, Final

from bench.errors import ProgramError

CONGESTION_CONTROL: Final = "cubic"
"""The machine's default may pace (bbr), which hides the capacity of the path."""
TCP: Final = "tcp"
UNIX: Final = "unix"
RING: Final = "ring"
TOOLS: Final = "/bench"
"""The folder of our load programs in a container."""


@dataclass(frozen=True, slots=True)
class ProcessNamespaces:
    """The namespaces of a process, by its directory in a /proc, and its address.

    A directory, not a PID: each host of the test bed has a PID namespace and a /proc of its own.
    """

    process: Path
    address: IPv4Address
    library: str = ""
    """LD_PRELOAD of programs that run here; empty: not set."""
    tools: str = TOOLS
    group: Path | None = None
    """The control group that is charged for programs; None: that of the caller."""

    @property
    def root(self) -> Path:
        """The root of its file system, seen from outside."""
        return self.process / "root"

    def enter(
        self,
        *program: str,
        cores: Collection[int] = (),
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        own_pids: bool = False,
    ) -> list[str]:
        """The command line that runs `program` in these namespaces, on `cores` if there are any.

        `before` is a command that runs the program; it is not preloaded. With `own_pids` it runs in
        the PID namespace too, as a child of the command line's program.
        """
        variables = {
            **({"LD_PRELOAD": self.library} if self.library else {}),
            **(environment or {}),
        }
        # A process that joins a group before it executes a program is charged for all of it.
        join = ("sh", "-c", 'echo $$ >"$0" && exec "$@"', f"{self.group}/cgroup.procs")
        return [
            *(join if self.group else ()),
            *("nsenter", f"--net={self.process}/ns/net", f"--mount={self.process}/ns/mnt"),
            *((f"--pid={self.process}/ns/pid", "--") if own_pids else ("--",)),
            *(("taskset", "--cpu-list", ",".join(map(str, sorted(cores)))) if cores else ()),
            *before,
            *(("env", *(f"{k}={v}" for k, v in variables.items())) if variables else ()),
            *program,
        ]

    def enter_network(self, *program: str) -> list[str]:
        """The command line that runs a program of this machine in the network namespace."""
        return ["nsenter", f"--net={self.process}/ns/net", "--", *program]

    def set_congestion_control(self) -> None:
        """Set it for later sockets of the network namespace; needs `congestion_control_allowed`.

        Raises:
            ProgramError: the kernel did not accept it.

        """
        knob = Path("/proc/sys/net/ipv4/tcp_congestion_control")
        script = f"echo {CONGESTION_CONTROL} >{knob} && cat {knob}"
        said = run(self.enter_network("sh", "-c", script), 10)
        if said.strip() != CONGESTION_CONTROL:
            raise ProgramError(f"{knob} of {self.process} says {said.strip()!r} after setting it")


@contextmanager
def congestion_control_allowed() -> Iterator[None]:
    """Keep cubic on the machine's list of algorithms that network namespaces may choose."""
    knob = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
    before = knob.read_text().split()
    if CONGESTION_CONTROL in before:
        yield
        return
    try:
        knob.write_text(" ".join([*before, CONGESTION_CONTROL]))
    except OSError as error:
        raise ProgramError(
            f"{knob}: {error.strerror}: add {CONGESTION_CONTROL} to it on this machine"
        ) from error
    try:
        yield
    finally:
        knob.write_text(" ".join(before))


@dataclass(frozen=True, slots=True)
class SubjectPair:
    """One subject: client and server, and how they are connected."""

    subject: str
    client: ProcessNamespaces
    server: ProcessNamespaces
    transport: str = TCP


def start(
    argv: Sequence[str],
    stdin: int = subprocess.DEVNULL,
    stdout: int | IO[Any] = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start a load program in a session of its own."""
    return subprocess.Popen(
        argv, stdin=stdin, stdout=stdout, stderr=stderr, text=True, start_new_session=True
    )


def next_line(process: subprocess.Popen[str], patience: float) -> str | None:
    """The next line that a program says, "" at its end; None: none in `patience` seconds.

    The program has to flush each line, and to wait for us after it: what is behind it is not seen
    by the next call.
    """
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], patience)
    return process.stdout.readline() if ready else None


def doing_now(pid: int, proc: Path = Path("/proc")) -> str:
    """What a process does at this moment, for an error: its program, its state, and the function of
    the kernel that it is in (proc(5): comm, status, stack, wchan). "": it has ended.
    """

    def read(name: str) -> str:
        try:
            return (proc / str(pid) / name).read_text()
        except OSError:
            return ""

    state = re.search(r"^State:\s+\S+ \((.*)\)$", read("status"), re.MULTILINE)
    if not state:
        return ""
    # `wchan` is 0 for a process that waits for a processor, wherever it is.
    stack = re.match(r"\[<\w+>] (\w+)", read("stack"))
    where = stack[1] if stack else read("wchan").strip("0")
    return f"{read('comm').strip()} is {state[1]}" + (f" in {where}" if where else "")


def run(argv: Sequence[str], timeout: float) -> str:
    """Run a program; its output. Raises `ProgramError` if it fails or exceeds `timeout` seconds."""
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise ProgramError(f"{' '.join(argv)}: still running after {timeout:g} s") from error
    except OSError as error:
        raise ProgramError(f"{argv[0]}: {error.strerror}: is it installed?") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-500:]
        raise ProgramError(f"{' '.join(argv)}: exit code {done.returncode}: {said}")
    return done.stdout


def run_together(commands: Sequence[Sequence[str]], timeout: float) -> list[str]:
    """Run programs at the same time; their outputs. None is left running after an error."""
    started: list[subprocess.Popen[str]] = []
    try:
        for argv in commands:
            started.append(start(argv, stderr=subprocess.STDOUT))
        said = []
        for process, argv in zip(started, commands, strict=True):
            try:
                out, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired as error:
                raise ProgramError(
                    f"{' '.join(argv)}: still running after {timeout:g} s"
                ) from error
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
