"""`freeflow upgrade`: its options. `plugin/swarm_upgrade/` does it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import click

from plugin.cli.client import Client
from plugin.cli.command_parts import explained, image_option, registry_option
from plugin.cli.terminal import say
from plugin.swarm_upgrade.upgrade_task import UpgradeFailed

COMMAND: Final = Path("/usr/local/bin/freeflow")
_OUTSIDE: Final = ("nsenter", "--mount=/proc/1/ns/mnt", str(COMMAND))
"""In the mount namespace that the script of this command had before."""


@click.command()
@click.argument("reference", metavar="REGISTRY/NAME:TAG")
@image_option
@registry_option
@click.option(
    "--wait",
    "seconds",
    default=90.0,
    show_default=True,
    type=click.FloatRange(1, 3600),
    help="Seconds until the probes of each test must run on all hosts.",
)
@click.option(
    "--grant-all-permissions",
    "granted",
    is_flag=True,
    help="Grant the new version all privileges that it asks for, without a question.",
)
@click.pass_obj
@explained(problems=(UpgradeFailed,))
def upgrade(
    client: Client, reference: str, image: str, registry: str, seconds: float, granted: bool
) -> None:
    """Upgrade the plugin on all hosts of this Swarm, from a manager.

    One host after another, this one last. After each `freeflow test --quick` must pass; at the
    first failure the command stops and says why. Nothing is drained: containers keep their
    connections. If the new version asks for privileges that the installed one does not have, the
    command shows them and asks. Exit code: 0 all hosts have the new version and the network works,
    1 it stopped at a host, 2 it could not begin.

    The hosts need the image of `freeflow test`, and a registry that asks for no password.

    \b
    freeflow test --prepare                # on each host
    freeflow upgrade registry:5000/freeflow:2.0
    """
    from plugin.network_test.plan import TestPlan
    from plugin.swarm_upgrade.rollout import Rollout, installed_version

    if image and registry:
        raise click.UsageError("Give --image or --registry.")
    plan = TestPlan(image=image, registry=registry, seconds=seconds)

    def consent(new: list[str]) -> bool:
        return granted or _ask(new)

    words = Rollout(client, reference, plan, lambda line: say(line, err=True), consent).run()
    version = installed_version(_OUTSIDE)
    say(f"this host has {version}; its own command tests it now", err=True)
    os.execvp(_OUTSIDE[0], [*_OUTSIDE, *words])  # noqa: S606 — it takes the place of this command


def _ask(new: list[str]) -> bool:
    """Whether the user grants these; without a terminal nobody can be asked."""
    if not sys.stdin.isatty():
        return False
    say("the installed version does not have these privileges:", err=True)
    for each in new:
        say(f"  {each}", err=True)
    return click.confirm("Grant them to the new version, on all hosts?", err=True)
