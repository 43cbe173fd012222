"""One guest: QEMU with a kernel, a temporary disk, the wire, and an agent for commands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final

from testbed.images import TOP
from testbed.patience import patience
from testbed.process import CommandError, wait_until
from testbed.vm.channel import Channel, GuestGoneError, Process
from testbed.vm.guest_images import DEFAULT_KERNEL, BootKernel, kernel, root_image
from testbed.vm.switch import Switch

_BOOT: Final = 240.0
SOURCES: Final = {"PYTHONPATH": "/src", "PYTHONDONTWRITEBYTECODE": "1"}
"""The environment of programs that run the checkout's Python code."""
MTU: Final = 4200
"""RoCE's largest MTU, 4096, and room for its headers."""


def accelerator() -> list[str]:
    """QEMU's options for acceleration. /dev/kvm alone is not enough: it may only run special
    kernels.
    """
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    if os.access("/dev/kvm", os.W_OK) and flags and {"vmx", "svm"} & set(flags[1].split()):
        return ["-accel", "kvm", "-cpu", "host"]
    # Emulating a newer processor is slower, mostly for vectors of 256 bits in the C library.
    return ["-accel", "tcg,thread=multi", "-cpu", "Nehalem"]


class Guest:
    """A guest with the addresses 10.99.0.`number` and fd99::`number`; made by `guests`."""

    def __init__(
        self,
        number: int,
        wire: Switch,
        booted: BootKernel,
        *,
        cpus: int,
        memory: int,
        mtu: int,
        disk: Path | None = None,
    ) -> None:
        self.number = number
        self.name = f"guest{number}"
        self.address = IPv4Address("10.99.0.0") + number
        self.address6 = IPv6Address("fd99::") + number
        self.wire = wire
        self.kernel = booted
        self.release = ""
        self._cpus, self._memory, self._mtu, self._disk = cpus, memory, mtu, disk
        self._work = Path(tempfile.mkdtemp(prefix=f"freeflow-{self.name}-"))
        self._qemu: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._monitor: socket.socket | None = None
        self._negotiated = False

    # --- life

    def switch_on(self) -> None:
        """Start QEMU with a new disk; `wait_up` waits until the guest is up."""
        # The sockets of the agent, of the monitor and of the network.
        agent, agents = socket.socketpair()
        self._monitor, monitors = socket.socketpair()
        self._monitor.settimeout(patience(30))
        network = self.wire.plug(self.number)
        ends = [agents, monitors, network]
        try:
            self._qemu = subprocess.Popen(
                self._command(*(end.fileno() for end in ends)),
                pass_fds=[end.fileno() for end in ends],
                stdin=subprocess.DEVNULL,
                stdout=(self._work / "qemu.log").open("ab"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # QEMU writes the disk's changes to an unnamed file in there.
                env={**os.environ, "TMPDIR": str(self._work)},
            )
        finally:
            for end in ends:
                end.close()
        self._channel = Channel(agent, self._why_gone)

    def _command(self, agent: int, monitor: int, network: int) -> list[str]:
        disk = "format=raw,if=virtio,cache=unsafe"
        more = [f"file={self._disk},snapshot=on,{disk}"] if self._disk else []
        mac = f"52:54:00:99:00:{self.number:02x}"
        # no_timer_check: on a busy machine the kernel's check of its timer fails, and it panics.
        words = f"console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr no_timer_check apparmor=0 freeflow.number={self.number}"
        return [
            # QEMU ends with the thread that has started it, even when that is killed.
            *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-M", "q35", *accelerator()),
            *(
                "-smp",
                str(self._cpus),
                "-m",
                str(self._memory),
                "-nodefaults",
                "-display",
                "none",
                "-no-reboot",
            ),
            *("-kernel", str(self.kernel.vmlinux), "-initrd", str(self.kernel.initrd)),
            *("-append", f"{words} freeflow.mtu={self._mtu}"),
            *("-drive", f"file={root_image()},snapshot=on,{disk}"),
            *("-drive", f"file={self.kernel.modules},readonly=on,{disk}"),
            *(word for drive in more for word in ("-drive", drive)),
            *(
                "-virtfs",
                f"local,path={TOP},mount_tag=src,security_model=none,readonly=on,multidevs=remap",
            ),
            *("-netdev", f"dgram,id=wire,local.type=fd,local.str={network}"),
            *("-device", f"virtio-net-pci,id=eth0,netdev=wire,mac={mac},romfile="),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
            *(
                "-chardev",
                f"socket,id=agent,fd={agent}",
                "-device",
                "virtserialport,chardev=agent,name=agent",
            ),
            *(
                "-chardev",
                f"socket,id=monitor,fd={monitor}",
                "-mon",
                "chardev=monitor,mode=control",
            ),
            *("-serial", f"file:{self._work / 'console.log'}"),
        ]

    def wait_up(self, timeout: float = _BOOT) -> None:
        assert self._channel is not None
        self.release = self._channel.hello(timeout)

    def power_off(self) -> None:
        """Power the guest off; no error if it is off."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait(patience(30))
            self._qemu = None
        self.wire.unplug(self.number)
        if self._channel is not None:
            self._channel.close()
        if self._monitor is not None:
            self._monitor.close()
        self._channel = self._monitor = None
        self._negotiated = False

    def reboot(self) -> None:
        """Power the guest off and on again, with a new disk."""
        self.power_off()
        self.switch_on()
        self.wait_up()

    def destroy(self) -> None:
        self.power_off()
        for left in self._work.iterdir():
            left.unlink()
        self._work.rmdir()

    @property
    def console(self) -> str:
        """The kernel's messages since the guest was first switched on."""
        log = self._work / "console.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def _why_gone(self) -> str:
        qemu = (self._work / "qemu.log").read_text(errors="replace")
        return f"{self.name} is off; its console and QEMU's messages end with:\n{self.console[-3000:]}\n{qemu[-1000:]}"

    # --- commands

    def start(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bool = False,
    ) -> Process:
        """Start a program and return at once; it is killed with the guest."""
        if self._channel is None:
            raise GuestGoneError(f"{self.name} is switched off")
        return self._channel.start(command, env, cwd, stdin)

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bytes | str = b"",
        timeout: float = 120,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; return its exit code and output.

        Raises:
            CommandError: it failed (with `check`) or took longer than `timeout` seconds.
        """
        program = self.start(command, env=env, cwd=cwd, stdin=bool(stdin))
        if stdin:
            program.write(stdin.encode() if isinstance(stdin, str) else stdin)
            program.close_input()
        try:
            code = program.wait(timeout)
        except TimeoutError as error:
            program.kill()
            raise CommandError(command, -1, f"{self.name}: {error}") from error
        if check and code != 0:
            raise CommandError([f"{self.name}:", *command], code, program.output + program.errors)
        return subprocess.CompletedProcess(list(command), code, program.output, program.errors)

    def sh(self, script: str, *, timeout: float = 120, check: bool = True) -> str:
        """Run a shell script and return its standard output."""
        return self.run(["sh", "-euc", script], timeout=timeout, check=check).stdout

    def pytest(self, *arguments: str, timeout: float = 300) -> str:
        """Run tests of the project in the guest; return pytest's output. Raises CommandError if one
        fails.
        """
        command = ["python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        return self.run(command, env=SOURCES, cwd="/src", timeout=timeout).stdout

    def push(self, content: bytes | str | Path, path: str, mode: int = 0o755) -> None:
        """Write a file in the guest, with this content or that of a file on this machine."""
        data = content.encode() if isinstance(content, str) else content
        data = data.read_bytes() if isinstance(data, Path) else data
        command = f'mkdir -p "$(dirname {shlex.quote(path)})"; cat >{shlex.quote(path)}; chmod {mode:o} {shlex.quote(path)}'
        program = self.start(["sh", "-euc", command], stdin=True)
        program.write(data)
        program.close_input()
        program.check(120)

    def pull(self, path: str) -> bytes:
        """The content of a file in the guest."""
        program = self.start(["cat", path])
        program.check(120)
        return program.raw

    def wait_listening(self, port: int, namespace: str = "", timeout: float = 60) -> None:
        """Wait until a program listens on a TCP port, in the named network namespace if one is
        given.
        """
        there = f"ip netns exec {namespace} " if namespace else ""
        self.sh(
            f"until {there}ss -Htln sport = :{port} | grep -q .; do sleep 0.05; done",
            timeout=timeout,
        )

    # --- the underlay

    def cut_underlay(self) -> None:
        """Drop all frames from and to the guest, without its knowledge."""
        self.wire.cut(self.number)

    def heal_underlay(self) -> None:
        self.wire.heal(self.number)

    def set_carrier(self, up: bool) -> None:
        """Set the carrier of the guest's NIC up or down."""
        self.monitor("set_link", name="wire", up=up)
        wait_until(
            f"{self.name}: eth0's carrier",
            lambda: (
                self.run(["cat", "/sys/class/net/eth0/carrier"], check=False).stdout.strip()
                == f"{up:d}"
            ),
        )

    def monitor(self, command: str, **arguments: Any) -> Any:
        """Send QEMU a command in its machine protocol (QMP) and return its answer."""
        assert self._monitor is not None
        if not self._negotiated:
            self._negotiated = True
            self.monitor("qmp_capabilities")
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        with self._monitor.makefile() as answers:
            # Its greeting and its events come first.
            for line in answers:
                answer = json.loads(line)
                if "error" in answer:
                    raise CommandError([command], -1, answer["error"]["desc"])
                if "return" in answer:
                    return answer["return"]
        raise GuestGoneError(self._why_gone())

    # --- RDMA

    def rxe_up(self, device: str = "rxe0", link: str = "eth0") -> None:
        """Make an RDMA device of a NIC, which must have its address and MTU."""
        self.run(["modprobe", "-a", "rdma_rxe", "ib_uverbs", "rdma_ucm"])
        self.run(["rdma", "link", "add", device, "type", "rxe", "netdev", link])


@contextlib.contextmanager
def guests(
    count: int = 1,
    *,
    kernels: Sequence[str] = (),
    cpus: int = 1,
    memory: int = 768,
    mtu: int = MTU,
    disk: Path | None = None,
) -> Iterator[list[Guest]]:
    """Running guests on one wire, with the default kernel, or one guest for each of `kernels`.

    Each has `cpus` processors. More than the machine has in all make everything slower, most of all
    verbs, because their users spin.
    `memory` is in MB; an engine needs 1536. `disk` is the image of one more disk for each guest,
    /dev/vdc, and is not changed.
    """
    wire = Switch()
    made: list[Guest] = []
    try:
        for number, name in enumerate(kernels or [DEFAULT_KERNEL] * count, 1):
            guest = Guest(number, wire, kernel(name), cpus=cpus, memory=memory, mtu=mtu, disk=disk)
            made.append(guest)
            guest.switch_on()
        for guest in made:
            guest.wait_up()
        yield made
    finally:
        for guest in made:
            guest.destroy()
        wire.close()
