"""The guest's agent: runs commands for the test, over a virtio serial port.

It is process 1, so it also reaps orphans.

A frame is a header (kind, process, length) and its content; `channel.py` is the other end. The
agent never waits for a program: it keeps input until the program reads it. It imports little,
because imports take seconds on an emulated processor.
"""

from __future__ import annotations

import glob
import json
import os
import select
import signal
import struct
import time

HEADER = struct.Struct("!BII")
# From the test.
START, INPUT, END_OF_INPUT, KILL = 1, 2, 3, 4
# To the test.
HELLO, OUTPUT, ERRORS, EXIT = 5, 6, 7, 8
CHUNK = 65536


class GuestProgram:
    """A program that the test has started."""

    def __init__(self, number: int, pid: int, stdin: int | None) -> None:
        self.number = number
        self.pid = pid
        self.stdin = stdin
        self.unwritten = bytearray()
        self.last_input = False


class Agent:
    """Serves the commands that arrive on a port."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.received = bytearray()
        self.poll = select.poll()
        self.poll.register(port, select.POLLIN)
        self.programs: dict[int, GuestProgram] = {}
        """The running programs, by the number that the test gave them."""
        self.outputs: dict[int, tuple[GuestProgram, int]] = {}
        """Descriptor to (program, kind)."""
        self.inputs: dict[int, GuestProgram] = {}
        """Descriptor to program, for programs with unwritten input."""
        self.woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.poll.register(self.woken, select.POLLIN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def send(self, kind: int, number: int, content: bytes = b"") -> None:
        rest = memoryview(HEADER.pack(kind, number, len(content)) + content)
        while rest:
            try:
                rest = rest[os.write(self.port, rest) :]
            except BlockingIOError:
                select.select([], [self.port], [])

    def run(self) -> None:
        """Serve until the test closes its end of the port."""
        self.send(HELLO, 0, os.uname().release.encode())
        while True:
            for descriptor, events in self.poll.poll():
                if descriptor == self.port:
                    if events & (select.POLLHUP | select.POLLERR) or not self.receive():
                        return
                elif descriptor == self.woken:
                    os.read(self.woken, CHUNK)
                    self.bury()
                elif descriptor in self.outputs:
                    self.forward(descriptor)
                elif descriptor in self.inputs:
                    self.feed(self.inputs[descriptor])

    def receive(self) -> bool:
        data = os.read(self.port, CHUNK)
        self.received += data
        while len(self.received) >= HEADER.size:
            kind, number, length = HEADER.unpack_from(self.received)
            end = HEADER.size + length
            if len(self.received) < end:
                break
            content = bytes(self.received[HEADER.size : end])
            del self.received[:end]
            self.handle(kind, number, content)
        return bool(data)

    def handle(self, kind: int, number: int, content: bytes) -> None:
        if kind == START:
            self.start(number, **json.loads(content))
            return
        program = self.programs.get(number)
        if program is None:
            return  # It has ended meanwhile.
        if kind == KILL:
            try:
                os.killpg(program.pid, json.loads(content))
            except ProcessLookupError:
                pass
        elif program.stdin is not None:
            program.unwritten += content
            program.last_input |= kind == END_OF_INPUT
            self.feed(program)

    def start(
        self, number: int, command: list[str], env: dict[str, str], cwd: str | None, stdin: bool
    ) -> None:
        out, errors = os.pipe(), os.pipe()
        into = os.pipe() if stdin else (os.open(os.devnull, os.O_RDONLY), None)
        given = (into[0], out[1], errors[1])
        if cwd is not None:
            command = ["env", "-C", cwd, *command]
        try:
            # Not fork: copying this process's page tables is slow on an emulated processor.
            pid = os.posix_spawnp(
                command[0],
                command,
                {**os.environ, **env},
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate(given)],
                setsid=True,
                setsigdef=[signal.SIGPIPE],
            )
        except OSError as error:
            # The same message and code as a shell's.
            self.send(ERRORS, number, f"{command[0]}: {error.strerror}\n".encode())
            self.send(EXIT, number, b"127")
            for descriptor in (*into, *out, *errors):
                if descriptor is not None:
                    os.close(descriptor)
            return
        for descriptor in given:
            os.close(descriptor)
        program = GuestProgram(number, pid, into[1])
        self.programs[number] = program
        if program.stdin is not None:
            os.set_blocking(program.stdin, False)
        for descriptor, kind in ((out[0], OUTPUT), (errors[0], ERRORS)):
            os.set_blocking(descriptor, False)
            self.outputs[descriptor] = (program, kind)
            self.poll.register(descriptor, select.POLLIN)

    def forward(self, descriptor: int) -> bool:
        """Forward a program's output; return whether there was any."""
        program, kind = self.outputs[descriptor]
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return False
        if data:
            self.send(kind, program.number, data)
        else:
            self.poll.unregister(descriptor)
            del self.outputs[descriptor]
            os.close(descriptor)
        return bool(data)

    def feed(self, program: GuestProgram) -> None:
        """Write as much of a program's input as it accepts now."""
        if program.stdin is None:
            return
        try:
            while program.unwritten:
                del program.unwritten[: os.write(program.stdin, program.unwritten[:CHUNK])]
        except BlockingIOError:
            if program.stdin not in self.inputs:
                self.inputs[program.stdin] = program
                self.poll.register(program.stdin, select.POLLOUT)
            return
        except BrokenPipeError:
            program.unwritten.clear()
            program.last_input = True
        if self.inputs.pop(program.stdin, None):
            self.poll.unregister(program.stdin)
        if program.last_input:
            os.close(program.stdin)
            program.stdin = None

    def bury(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for program in list(self.programs.values()):
                if program.pid == pid:
                    self.ended(program, os.waitstatus_to_exitcode(status))

    def ended(self, program: GuestProgram, code: int) -> None:
        # Its own output precedes its end. Output of its children may still follow.
        for descriptor in [fd for fd, (owner, _) in self.outputs.items() if owner is program]:
            while self.forward(descriptor):
                pass
        del self.programs[program.number]
        program.unwritten.clear()
        program.last_input = True
        self.feed(program)
        self.send(EXIT, program.number, json.dumps(code).encode())


def main() -> None:
    # Not pathlib, which takes long to import here.
    while not (ports := glob.glob("/dev/vport*p*")):  # noqa: PTH207
        time.sleep(0.01)
    try:
        Agent(os.open(ports[0], os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)).run()
    finally:
        # The test has ended, or this agent has failed: switch the guest off.
        with open("/proc/sysrq-trigger", "w") as trigger:  # noqa: PTH123
            trigger.write("o")
        time.sleep(10)


if __name__ == "__main__":
    main()
