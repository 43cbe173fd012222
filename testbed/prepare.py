"""`python -m testbed.prepare [NAME…]`: make what test beds, guests, demo and benchmarks need.

Each part is made separately, and appears in the cache when it is complete. So an interrupted run is
simply repeated.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Final

import click

from testbed.debian_suite import SuiteAbsentError
from testbed.images import ENGINES, make_bench_base, make_engine, make_workload
from testbed.process import CommandError
from testbed.verbs_packages import RDMA_CORE, make_rdma_core, make_valkey
from testbed.versions import VersionAbsentError, make_last
from testbed.vm.guest_images import KERNELS, KernelAbsentError, make_kernel, make_root_image

THINGS: Final[dict[str, Callable[[], object]]] = {
    **{f"engine-{version}": lambda v=version: make_engine(v) for version in ENGINES},  # type: ignore[misc]
    "workload": make_workload,
    "guest": make_root_image,
    **{f"kernel-{name}": lambda n=name: make_kernel(n) for name in KERNELS},  # type: ignore[misc]
    "bench": make_bench_base,
    "last-version": make_last,
    **{f"rdma-core-{suite}": lambda s=suite: make_rdma_core(s) for suite in RDMA_CORE},  # type: ignore[misc]
    "valkey": make_valkey,
}
GROUPS: Final = {
    "swarm": [
        *(name for name in THINGS if name.startswith("engine-")),
        *("workload", "last-version"),
    ],
    "verbs": [*(f"rdma-core-{suite}" for suite in RDMA_CORE), "valkey"],
    "vm": ["guest", *(name for name in THINGS if name.startswith("kernel-"))],
}


def prepare(names: Iterable[str], say: Callable[[str], None]) -> None:
    """Make the absent ones of these parts, one after another.

    Raises:
        CommandError: one of them could not be made.
    """
    for name in names:
        start = time.monotonic()
        say(f"{name} …")
        try:
            THINGS[name]()
        except (KernelAbsentError, SuiteAbsentError, VersionAbsentError) as error:
            # The archive drops old releases at some time, and a checkout may lack the history.
            # Tests that need them say so.
            say(f"{name}: {error}")
        else:
            say(f"{name}: ready, after {time.monotonic() - start:.0f} s")


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice([*THINGS, *GROUPS]))
def main(names: tuple[str, ...]) -> None:
    chosen = [one for name in names or THINGS for one in GROUPS.get(name, [name])]
    try:
        prepare(chosen, lambda line: click.echo(f"prepare {line}"))
    except CommandError as error:
        click.echo(f"prepare: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
