"""`freeflow ui`: where the live page is, or the page itself, served by the command.

The command asks the plugin by its admin socket, as all commands do, so the page needs no setting.
"""

from __future__ import annotations

import secrets
import sys
import threading
from ipaddress import ip_address
from typing import Final

import click
import msgspec

from driver.errors import FreeFlowError, SettingError
from plugin.cli.client import Client
from plugin.cli.command_parts import explained, json_option, say_value
from plugin.settings import SETTINGS, correction
from plugin.status import Status

DEFAULT: Final = "127.0.0.1:9478"
_LISTEN: Final = "freeflow ui --listen shows the page now, without a setting"


class PageLink(msgspec.Struct, frozen=True):
    """Where the page is."""

    url: str
    asks_for_token: bool = False


@click.command()
@click.option(
    "--listen",
    metavar="[ADDRESS:PORT]",
    is_flag=False,
    flag_value=DEFAULT,
    default=None,
    help=f"Serve the page here until Ctrl-C; {DEFAULT} if no address is given.",
)
@json_option
@click.pass_obj
@explained(problems=(FreeFlowError,))
def ui(client: Client, listen: str | None, as_json: bool) -> None:
    """Show this host in a browser, live.

    The page has a map of containers and their connections, coloured by path, tables of the same,
    and problems with what to do about them. The plugin serves it beside the metrics, if its setting
    METRICS_ADDR is set; this command then prints the address. With --listen the command serves it
    itself, and prints a link with a token that holds until it ends.

    \b
    freeflow ui
    freeflow ui --listen
    ssh -t -L 9478:127.0.0.1:9478 HOST freeflow ui --listen
    """
    if listen is not None:
        _serve(client, listen, as_json)
        return
    found = _address(client.status())
    asks = " (it asks for the token, UI_TOKEN)" if found.asks_for_token else ""
    say_value(found, f"{found.url}{asks}\n", as_json)


def _address(status: Status) -> PageLink:
    """Where the plugin serves the page. Raises SettingError: nowhere."""
    from plugin.page_app import is_loopback

    text = status.settings.get("METRICS_ADDR", "")
    if not text:
        raise SettingError(
            "the plugin does not serve the page",
            cause="its setting METRICS_ADDR is empty",
            remedy=f"{_LISTEN}; or {correction('METRICS_ADDR', '127.0.0.1:9477')}",
        )
    host, _, port = text.rpartition(":")
    token = bool(status.settings.get("UI_TOKEN"))
    if not token and not is_loopback(host):
        raise SettingError(
            f"the plugin does not serve the page on {text}",
            cause="other hosts may reach this address, and the setting UI_TOKEN is empty",
            remedy=f"{_LISTEN}; or {correction('UI_TOKEN', '$(openssl rand -hex 32)')}",
        )
    if ip_address(host.strip("[]")).is_unspecified:
        host = status.host.address or host
    return PageLink(f"http://{host}:{port}/", token)


def _serve(client: Client, listen: str, as_json: bool) -> None:
    """Serve the page until Ctrl-C."""
    # Not imported at the top: other commands need none of it.
    from plugin.bounded_server import BoundedServer
    from plugin.page_app import PageAccess, create_page, is_loopback
    from plugin.page_feed import PageFeed, PageSource

    (kind,) = (each.kind for each in SETTINGS if each.name == "METRICS_ADDR")
    try:
        address = kind.parse(listen)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--listen") from error
    if address is None:
        raise click.BadParameter("is empty", param_hint="--listen")
    # Before the link is printed: without the plugin there is nothing to show.
    status = client.status()
    token = secrets.token_urlsafe(24)
    source = PageSource(client.status, client.addresses, client.traffic)
    page = create_page(PageFeed(source), PageAccess(token, is_loopback(address[0])))
    try:
        server = BoundedServer(address, page)
    except OSError as error:
        raise SettingError(
            f"the page is not served on {listen}",
            cause=str(error),
            remedy="freeflow ui --listen with another address",
        ) from error
    shown = address[0]
    if ip_address(shown).is_unspecified:
        shown = status.host.address or shown
    host = f"[{shown}]" if ":" in shown else shown
    link = PageLink(f"http://{host}:{address[1]}/#token={token}")
    say_value(link, f"{link.url}\nCtrl-C ends it.\n", as_json)
    sys.stdout.flush()
    server.start()
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.stop()
