"""`freeflow runtime`: its commands and options. `runtime.py` does the work."""

from __future__ import annotations

import click

from plugin.cli.client import Client
from plugin.cli.command_parts import explained, json_option, say_value
from plugin.cli.terminal import say, shown


@click.group()
def runtime() -> None:
    """Let the engine add the library to containers, without a change of a stack.

    The engine calls a small program, freeflow-runc, at each start of a container. It adds the
    library to containers on accelerated networks, and then calls runc: FreeFlow's own, those of
    other drivers with the label freeflow.accelerate=on (or trust), and with the plugin's setting
    OTHER_NETWORKS=on all of Docker's own drivers. The label freeflow.accelerate=off or the variable
    FREEFLOW=off leaves a container out. RDMA programs need freeflow inject --verbs.
    """


@runtime.command("install")
@click.option(
    "--default",
    is_flag=True,
    help="Use it for all containers that name no runtime; services need it.",
)
@click.pass_obj
@explained()
def runtime_install(client: Client, default: bool) -> None:
    """Register the runtime with this host's engine.

    Changes daemon.json, keeps what else is in it, has the engine check it, and reloads it. No
    container is restarted.
    """
    from plugin.cli.runtime import RuntimeSetup

    for line in RuntimeSetup(client.engine).install(default=default):
        say(shown(line))


@runtime.command("uninstall")
@click.pass_obj
@explained()
def runtime_uninstall(client: Client) -> None:
    """Remove the runtime; while containers have it, it stays registered and changes nothing."""
    from plugin.cli.runtime import RuntimeSetup

    for line in RuntimeSetup(client.engine).uninstall():
        say(shown(line))


@runtime.command("status")
@json_option
@click.pass_obj
@explained()
def runtime_status(client: Client, as_json: bool) -> None:
    """Show whether the runtime is installed, and whether the engine uses it."""
    from plugin.cli.runtime import RuntimeSetup, show

    found = RuntimeSetup(client.engine).status()
    say_value(found, "".join(f"{shown(line)}\n" for line in show(found)), as_json)
