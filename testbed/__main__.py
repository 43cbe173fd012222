"""`python -m testbed`: a test bed for experiments, from a shell."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import click

from testbed.bed import HOME, Bed, remove_leftovers, take
from testbed.process import BedInUseError


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.option("--name", default="play", show_default=True)
@click.option(
    "--hosts", default="28.5,20.10", show_default=True, help="Engine versions, one per host."
)
@click.option(
    "--plugin", type=click.Path(exists=True, path_type=Path), help="Install the plugin from here."
)
def up(name: str, hosts: str, plugin: Path | None) -> None:
    """Start hosts in one Swarm, and wait for Ctrl-C, which stops and removes them."""
    with Bed(name, hosts.split(",")) as bed:
        bed.swarm()
        bed.load_workload()
        if plugin is not None:
            bed.install_plugin(plugin)
        for host in bed.hosts:
            click.echo(
                f"{host.name}  {host.address}  engine {host.engine}  "
                f"nsenter -t {host.pid} -m -u -n -p bash"
            )
        click.echo("Ctrl-C removes the hosts")
        signal.pause()


@main.command()
@click.option(
    "--name",
    default="",
    help="Remove this bed, even if it is in use; by default, all that are not in use.",
)
def down(name: str) -> None:
    """Remove what killed beds have left behind."""
    for work in sorted(HOME.glob(name or "*")):
        if not name:
            try:
                os.close(take(work.name))
            except BedInUseError as error:
                click.echo(str(error))
                continue
        remove_leftovers(work.name)
        click.echo(f"{work.name} is removed")


if __name__ == "__main__":
    main()
