"""`freeflow test`: its options. `plugin/network_test/` does it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from driver.errors import InvalidRequest
from plugin.cli.client import Client
from plugin.cli.command_parts import explained, image_option, registry_option
from plugin.cli.terminal import json_text, say, say_json, shown_all
from plugin.cli.user_files import users_root
from plugin.network_test.interruption import Interruption
from plugin.network_test.plan import TestPlan


@click.command(name="test")
@click.option("--quick", is_flag=True, help="Only what takes some seconds: no measurements.")
@click.option("--perf", is_flag=True, help="Only measure throughput and round trips.")
@click.option("--network", metavar="NAME", default="", help="Test this attachable network.")
@image_option
@registry_option
@click.option("--prepare", is_flag=True, help="Only make the probes' image on this host.")
@click.option(
    "--wait",
    "seconds",
    default=90.0,
    show_default=True,
    type=click.FloatRange(1, 3600),
    help="Seconds until the probes must run on all hosts.",
)
@click.option("--json", "json_file", metavar="FILE", default="", help="Write JSON; - is stdout.")
@click.option("--junit", "junit_file", metavar="FILE", default="", help="Write JUnit's XML.")
@click.pass_obj
@explained()
def network_test(
    client: Client,
    quick: bool,
    perf: bool,
    network: str,
    image: str,
    registry: str,
    prepare: bool,
    seconds: float,
    json_file: str,
    junit_file: str,
) -> None:
    """Test the network of this Swarm, from a manager.

    Runs two containers on each host, on a network of its own, and checks names, VIPs, packets of
    every size, transfers, IPv6, spoofing, published ports and each path; then measures. It removes
    all of them at the end. Exit code: 0 everything works, 1 a check failed, 2 it could not be
    tested.

    The containers' image is made from the plugin's files. Other hosts need it, too: run
    --prepare on each, or name a registry, or an image that they can get.

    \b
    freeflow test
    freeflow test --quick --image python:3-slim
    freeflow test --junit report.xml --network mynet
    """
    if (quick and perf) or (image and registry):
        raise click.UsageError("Give --quick or --perf, and --image or --registry.")
    with Interruption():
        code = _run(
            client,
            TestPlan(image, registry, network, quick, perf, seconds),
            json_file,
            junit_file,
            prepare=prepare,
        )
    sys.exit(code)


def _run(client: Client, plan: TestPlan, json_file: str, junit_file: str, *, prepare: bool) -> int:
    """Do what the options say; the exit code. Raises FreeFlowError."""
    from plugin.network_test.coordinator import Coordinator
    from plugin.network_test.junit import junit_text
    from plugin.network_test.probe_image import IMAGE, make_image
    from plugin.network_test.report_text import show_report

    if prepare:
        make_image(client.engine)
        say(f"this host has the image {IMAGE}")
        return 0
    files = [file for file in (json_file, junit_file) if file and file != "-"]
    for file in files:
        # Not after minutes.
        _write(file, "")
    report = Coordinator(client, plan, lambda line: say(line, err=True)).run()
    if json_file == "-":
        say_json(report)
    else:
        say(show_report(shown_all(report)), newline=False)
        if json_file:
            _write(json_file, json_text(report) + "\n")
    if junit_file:
        _write(junit_file, junit_text(report))
    return report.code


def _write(file: str, text: str) -> None:
    """Raises InvalidRequest."""
    try:
        with users_root():
            Path(file).write_text(text)
    except OSError as error:
        raise InvalidRequest(
            f"{file} can't be written", cause=str(error.strerror), remedy="name another file"
        ) from error
