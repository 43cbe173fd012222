"""`freeflow top`: its options. `top.py` has the report, `top_screen.py` the screen."""

from __future__ import annotations

import sys
import time

import click

from plugin.cli.client import Client
from plugin.cli.command_parts import explained, json_option, say_value
from plugin.cli.table import draws
from plugin.cli.top import BY, SORTS, Top, TopView, head, show


@click.command()
@click.option(
    "--by", type=click.Choice(BY), default=BY[0], show_default=True, help="Group by this."
)
@click.option("--sort", type=click.Choice(SORTS), default=SORTS[0], show_default=True)
@click.option("--filter", "wanted", default="", help="Only connections with this in a text.")
@click.option(
    "-i",
    "--interval",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0.2, 60),
    help="Seconds between two reports.",
)
@click.option("--once", is_flag=True, help="Print one report of one interval.")
@json_option
@click.pass_obj
@explained()
def top(
    client: Client, by: str, sort: str, wanted: str, interval: float, once: bool, as_json: bool
) -> None:
    """Show what connections carry, live.

    Connections are those of `freeflow connections`, each with bytes, messages and sent-again
    segments per second. A message is a segment with data on TCP, and a write into shared memory
    otherwise; `-`: nobody counts them. --by shows sums over the ends of connections: of each
    container or service of this host, of each host at the far end, or of each path.

    Keys: q quit, p pause, b group, s sort, r reverse, / filter, + and - interval.

    \b
    freeflow top
    freeflow top --by service --sort messages
    freeflow top --once --json
    """
    live = Top(TopView(by, sort, False, wanted))
    if not (once or as_json):
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise click.UsageError("freeflow top needs a terminal; --once prints one report.")
        from plugin.cli.top_screen import Fetcher, TopScreen

        TopScreen(live, Fetcher(client.traffic, interval)).run()
        return
    live.add(client.traffic())
    time.sleep(interval)
    live.add(client.traffic())
    report = live.report()
    assert report is not None
    plain = not draws(click.get_text_stream("stdout").encoding)
    say_value(report, f"{head(report)}\n{show(report, plain=plain)}", as_json)
