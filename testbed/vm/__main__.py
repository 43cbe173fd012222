"""`python -m testbed.vm`: virtual machines for experiments, from a shell."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

import click

from testbed.vm.channel import Process
from testbed.vm.guest import MTU, guests
from testbed.vm.guest_images import DEFAULT_KERNEL, KERNELS

_kernel = click.option(
    "--kernel", "name", default=DEFAULT_KERNEL, show_default=True, type=click.Choice([*KERNELS])
)


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@_kernel
@click.option("--memory", default=768, show_default=True, help="MB")
@click.option("--mtu", default=MTU, show_default=True)
def shell(name: str, memory: int, mtu: int) -> None:
    """Open a shell in one guest, with RDMA; the guest ends with the shell."""
    with guests(kernels=[name], memory=memory, mtu=mtu) as (guest,):
        guest.rxe_up()
        click.echo(f"{guest.name}  {guest.address}  {guest.release}  the checkout is /src")
        bash = guest.start(
            ["script", "-qc", "bash -i", "/dev/null"], env={"TERM": "linux"}, stdin=True
        )
        with _raw_terminal():
            _converse(bash)


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Set the terminal to raw mode, so that the guest gets every key, if there is one."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setraw(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _converse(process: Process) -> None:
    shown = 0
    inputs = [sys.stdin]
    while process.poll() is None:
        readable, _, _ = select.select(inputs, [], [], 0.05)
        if readable:
            keys = os.read(sys.stdin.fileno(), 4096)
            if keys:
                process.write(keys)
            else:
                process.close_input()
                inputs = []
        output = process.raw
        sys.stdout.buffer.write(output[shown:])
        sys.stdout.flush()
        shown = len(output)


@main.command()
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--count", default=2, show_default=True, help="Guests.")
@_kernel
def run(script: Path, count: int, name: str) -> None:
    """Run a shell script in guests with RDMA.

    $NUMBER, $ADDRESS and $PEER (the next guest's address) differ in each guest.
    """
    with guests(kernels=[name] * count) as made:
        started = []
        for guest in made:
            guest.rxe_up()
            guest.push(script, "/tmp/script")
            peer = made[guest.number % count]
            env = {
                "NUMBER": str(guest.number),
                "ADDRESS": str(guest.address),
                "PEER": str(peer.address),
            }
            started.append(guest.start(["sh", "/tmp/script"], env=env))
        codes = [process.wait(3600) for process in started]
        for guest, process in zip(made, started, strict=True):
            for line in (process.output + process.errors).splitlines():
                click.echo(f"[{guest.name}] {line}")
    raise SystemExit(max(abs(code) for code in codes))


if __name__ == "__main__":
    main()
