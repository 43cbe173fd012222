"""The commands and their options; large ones are in `commands_*.py`, and what they share in
`command_parts.py`. `show.py` formats what they print, `doctor.py` has the checks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from driver.errors import FreeFlowError
from plugin.cli.client import Client, Engine, InUse
from plugin.cli.command_parts import PROBLEMS, UNUSABLE, explained, json_option, say_value
from plugin.cli.commands_runtime import runtime
from plugin.cli.commands_test import network_test
from plugin.cli.commands_top import top
from plugin.cli.commands_ui import ui
from plugin.cli.commands_upgrade import upgrade
from plugin.cli.show import findings, show_connections, show_peers, show_status, show_verbs
from plugin.cli.terminal import json_text, lines, say, say_json, shown, shown_all
from plugin.cli.user_files import users_root
from plugin.version import VERSION

TRACEBACK = "FREEFLOW_TRACEBACK"
"""If this variable is set, a bug ends a command with its traceback."""


class _Guarded(click.Group):
    """Reports a bug in one line, without a traceback: that may hold text of containers or hosts."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as error:
            if TRACEBACK in os.environ:
                raise
            reason = f"{type(error).__name__}: {error}"[:300]
            say(f"freeflow: this command failed because of a bug ({shown(reason)})", err=True)
            say(f"    do: report it, with the output of {TRACEBACK}=1 freeflow …", err=True)
            ctx.exit(UNUSABLE)


@click.group(
    cls=_Guarded,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(VERSION, prog_name="freeflow")
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    default=None,
    envvar="FREEFLOW_SOCKET",
    help="The plugin's admin socket.",
)
@click.option(
    "--engine",
    type=click.Path(path_type=Path),
    default=None,
    envvar="FREEFLOW_ENGINE",
    help="Docker's socket.",
)
@click.pass_context
def cli(context: click.Context, socket: Path | None, engine: Path | None) -> None:
    """Show and check FreeFlow, the network plugin for Docker Swarm, on this host.

    Without a command: status.

    \b
    freeflow                    what is wrong, if anything; networks, endpoints, peers
    freeflow ping web           which host runs this task, container or VIP, path and round trips
    freeflow doctor             more checks, for when something doesn't work
    """
    context.obj = Client(socket, Engine(engine))
    if context.invoked_subcommand is None:
        context.invoke(status)


cli.add_command(runtime)
cli.add_command(top)
cli.add_command(ui)
cli.add_command(network_test)
cli.add_command(upgrade)


@cli.command()
@json_option
@click.pass_obj
@explained()
def status(client: Client, as_json: bool = False) -> None:
    """Show problems, networks, endpoints and peers.

    Exit code: 0 everything works, 1 something is wrong (the last lines say what, and what to type),
    2 the plugin is not running or can't be used.
    """
    found = client.status()
    say_value(found, show_status(found), as_json)
    sys.exit(0 if found.healthy else PROBLEMS)


@cli.command()
@json_option
@click.pass_obj
@explained()
def peers(client: Client, as_json: bool) -> None:
    """List the other hosts and the shared networks."""
    found = client.status()
    say_value({network.id: network.peers for network in found.networks}, show_peers(found), as_json)


@cli.command()
@click.option("--verbs", is_flag=True, help="List devices and queue pairs of RDMA verbs instead.")
@json_option
@click.pass_obj
@explained()
def connections(client: Client, verbs: bool, as_json: bool) -> None:
    """List TCP connections with their paths.

    Connections are those of this host's containers, each with the reason for its path. A connection
    between two containers of this host is listed twice, once for each end. shm: the bytes go
    through shared memory instead of the kernel's TCP. rdma: the RDMA device writes them into the
    other host's memory. relay: the hosts' relays carry them over TCP connections of their own.
    """
    if verbs:
        objects = client.verbs()
        say_value(objects, show_verbs(objects), as_json)
        return
    found = client.connections()
    say_value(found, show_connections(found), as_json)


@cli.command()
@click.argument("target", metavar="NAME|ADDRESS")
@click.option(
    "-c",
    "--count",
    default=3,
    show_default=True,
    type=click.IntRange(1, 20),
    help="Number of echo requests.",
)
@json_option
@click.pass_obj
@explained(problems=(FreeFlowError,))
def ping(client: Client, target: str, count: int, as_json: bool) -> None:
    """Ping a container, task or service.

    The echo requests leave from a container of this host. Shows which host has the target, the
    path, and the round-trip times. NAME is a container of this host, or a task (web.1 is enough) or
    service of any host; ADDRESS is an address of one of them, or a VIP. If a name is on several
    networks, write NAME.NETWORK. Exit code 1 if nothing answered.

    \b
    freeflow ping web
    freeflow ping web.1
    freeflow ping 10.0.1.7
    """
    result = client.ping(target, count)
    if as_json:
        say_json(result)
    else:
        result = shown_all(result)
        times = result.round_trips_ms
        where = f"{result.host} ({'this host' if result.local else result.host_address})"
        behind = f", task {result.task}" if result.task else ""
        who = f"{result.name}, {result.address}" if result.name else result.address
        say(f"{who}{behind} on network {result.network}, from {result.source}")
        by = f", encrypted by {result.encryption}" if result.encryption else ""
        say(f"host {where if result.host else 'not found'}, path {result.path}{by}")
        if result.tcp:
            say(
                f"TCP of programs with the library: {result.tcp}"
                + (f" ({result.reason})" if result.reason else "")
            )
        if times:
            say(
                f"{len(times)} of {result.sent} answered, round trip {min(times):.3f} / "
                f"{sorted(times)[len(times) // 2]:.3f} / {max(times):.3f} ms (least, median, most)"
            )
        else:
            say(f"0 of {result.sent} answered\n    do: freeflow doctor")
    sys.exit(0 if result.round_trips_ms else PROBLEMS)


@cli.command()
@click.argument("container", required=False)
@json_option
@click.pass_obj
def doctor(client: Client, container: str | None, as_json: bool) -> None:
    """Check what can keep FreeFlow from working.

    Checks ports, MTU, kernel features, stale state and other overlays. With CONTAINER: whether the
    library is mounted in it, whether its processes have loaded it, and whether it is this host's
    version.

    Each finding has a cause and a remedy. Works with the plugin disabled, too. Exit code 1 if
    something was found.
    """
    from plugin.cli.container_check import examine_container
    from plugin.cli.doctor import examine

    report = examine(client) if container is None else examine_container(client, container)
    if as_json:
        say_json(report)
    else:
        for check in report.passed:
            say(f"ok: {shown(check)}")
        for note in report.notes:
            say(f"note: {shown(note)}")
        say(findings(report.findings), newline=False)
        say("nothing is wrong" if not report.findings else f"{len(report.findings)} found")
    sys.exit(PROBLEMS if report.findings else 0)


@cli.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="Write here instead of printing.",
)
@json_option
@click.pass_obj
def bugreport(client: Client, output: Path | None, as_json: bool) -> None:
    """Collect what a bug report needs, without secrets.

    That is status, findings, links, rules and versions. The report has names and addresses of
    containers, networks and hosts: read it before you send it.
    """
    from plugin.cli.bugreport import collect, render

    report = collect(client)
    text = json_text(report) if as_json else lines(render(report))
    if output is None:
        say(text)
    else:
        with users_root():
            output.write_text(text)
        say(f"written to {output}")


@cli.command()
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also remove state, /run/freeflow* and this command; use it before docker plugin rm.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Do it even if containers use FreeFlow networks; they lose their connections.",
)
@json_option
@click.pass_obj
@explained(problems=(InUse,))
def cleanup(client: Client, everything: bool, force: bool, as_json: bool) -> None:
    """Remove what FreeFlow has made on this host.

    That is links, rules, namespaces and files. Refuses, with their names, while containers of this
    host are on FreeFlow networks. Works with the plugin disabled, too.
    """
    from plugin.cli.clean import clean

    removed = clean(client, everything=everything, force=force)
    if as_json:
        say_json({"removed": removed})
    else:
        for name in removed:
            say(f"removed {shown(name)}")
        say(f"{len(removed)} removed" if removed else "nothing to remove")


@cli.command()
@click.argument("stack", metavar="[STACK.yml]", required=False)
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    default="-",
    help="Write the second file here instead of printing it.",
)
@click.option(
    "--service",
    "services",
    multiple=True,
    metavar="NAME",
    help="Only this service, whatever its networks; may be given several times.",
)
@click.option(
    "--image",
    metavar="IMAGE",
    help="Print the options of docker run or docker service create for IMAGE, instead of a file.",
)
@click.option("--verbs", is_flag=True, help="Add RDMA verbs, too: our libibverbs.")
@click.pass_obj
@explained(err=True)
def inject(
    client: Client,
    stack: str | None,
    output: str,
    services: tuple[str, ...],
    image: str | None,
    verbs: bool,
) -> None:
    """Add the library to a stack, by a second compose file, or to a container.

    The file adds the library's mount and LD_PRELOAD to services. STACK.yml is as for docker stack
    deploy; `-` is stdin. Services on a FreeFlow network get the library, and services on networks
    whose driver this host doesn't know. Warnings about programs that can't be accelerated go to
    stderr, as far as their images are on this host.

    \b
    freeflow inject stack.yml | docker stack deploy -c stack.yml -c - mystack
    docker run $(freeflow inject --image IMAGE) --network NETWORK IMAGE
    """
    from plugin.cli.inject import inject_file, inject_image

    if (stack is None) == (image is None) or (image is not None and (services or output != "-")):
        raise click.UsageError("Give either STACK.yml, with --service and -o, or --image.")
    if image is not None:
        outcome = inject_image(client.engine, image, verbs=verbs)
        click.echo(outcome.text, nl=False)
    else:
        assert stack is not None
        outcome = inject_file(client.engine, stack, output, services, verbs=verbs)
    for note in outcome.notes:
        say(f"freeflow: {shown(note)}", err=True)
    if image is None:
        injected = shown(", ".join(outcome.injected))
        say(f"freeflow: the library is added to {injected}", err=True)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    freeflow completion bash > /etc/bash_completion.d/freeflow
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise click.ClickException(f"no completion for {shell}")
    click.echo(kind(cli, {}, "freeflow", "_FREEFLOW_COMPLETE").source())
