"""`freeflow ui`: where the page is, and the page served by the command itself."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

import pytest
from click.testing import CliRunner, Result

from plugin.admin import create_admin
from plugin.cli.commands import cli
from plugin.settings import HIDDEN
from testbed.patience import patience
from tests.unit.sockets import served
from tests.unit.statuses import admin_answers, status

TOP: Final = Path(__file__).parents[2]


def run(directory: Path, *arguments: str, **settings: str) -> Result:
    path = directory / "admin.sock"
    answers = admin_answers(status=lambda: status(settings=settings))
    with served(create_admin(answers), path):
        return CliRunner().invoke(
            cli, ["--socket", str(path), "ui", *arguments], prog_name="freeflow"
        )


@pytest.mark.parametrize(
    ("address", "token", "expected"),
    [
        ("127.0.0.1:9477", "", "http://127.0.0.1:9477/"),
        ("[::1]:9477", "", "http://[::1]:9477/"),
        ("192.0.2.1:80", "(not shown)", "http://192.0.2.1:80/ (it asks for the token, UI_TOKEN)"),
        ("0.0.0.0:80", "(not shown)", "http://192.0.2.1:80/ (it asks for the token, UI_TOKEN)"),
    ],
)
def test_where_the_page_is(tmp_path: Path, address: str, token: str, expected: str) -> None:
    """The address is one that a browser can open, and the token isn't shown."""
    done = run(tmp_path, METRICS_ADDR=address, UI_TOKEN=token)
    assert (done.exit_code, done.output) == (0, f"{expected}\n")


def test_as_json(tmp_path: Path) -> None:
    """For programs, the address is JSON."""
    done = run(tmp_path, "--json", METRICS_ADDR="127.0.0.1:9477", UI_TOKEN=HIDDEN)
    expected = {"url": "http://127.0.0.1:9477/", "asks_for_token": True}
    assert json.loads(done.output) == expected


def test_the_page_is_off(tmp_path: Path) -> None:
    """Without the setting, the command says both ways to get the page."""
    done = run(tmp_path, METRICS_ADDR="")
    assert done.exit_code == 1
    assert "its setting METRICS_ADDR is empty" in done.output
    assert "freeflow ui --listen" in done.output
    assert "docker plugin set freeflow:latest METRICS_ADDR=127.0.0.1:9477" in done.output


def test_other_hosts_need_a_token(tmp_path: Path) -> None:
    """On an address that other hosts reach, the page is off without a token, with the remedy."""
    done = run(tmp_path, METRICS_ADDR="0.0.0.0:9477", UI_TOKEN="")
    assert done.exit_code == 1
    assert "the setting UI_TOKEN is empty" in done.output
    assert "UI_TOKEN=$(openssl rand -hex 32)" in done.output


@pytest.mark.parametrize("address", ["9478", "localhost:9478", "127.0.0.1:0", ""])
def test_invalid_addresses(tmp_path: Path, address: str) -> None:
    """An invalid address is refused before anything is served."""
    done = run(tmp_path, "--listen", address)
    assert done.exit_code == 2
    assert "--listen" in done.output


def test_a_taken_port(tmp_path: Path) -> None:
    """If the port is in use, the command says so."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(tmp_path, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.exit_code == 1
    assert "Address already in use" in done.output


def test_without_a_plugin(tmp_path: Path) -> None:
    """Without a plugin there is nothing to serve, and the command says why."""
    where = ["--socket", str(tmp_path / "none"), "--engine", str(tmp_path / "none")]
    done = CliRunner().invoke(cli, [*where, "ui", "--listen"], prog_name="freeflow")
    assert done.exit_code == 2
    assert "the plugin does not answer" in done.output


def test_the_command_serves_the_page(tmp_path: Path) -> None:
    """The link works, its token is needed, and Ctrl-C ends the command."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    path = tmp_path / "admin.sock"
    arguments = ["--socket", str(path), "ui", "--listen", f"127.0.0.1:{port}"]
    with served(create_admin(admin_answers()), path):
        process = subprocess.Popen(
            [sys.executable, "-m", "plugin.cli", *arguments],
            cwd=TOP,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is ignored in programs that a shell starts in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        try:
            assert process.stdout is not None
            link = process.stdout.readline().strip()
            found = re.fullmatch(rf"http://127\.0\.0\.1:{port}/#token=([\w-]{{32}})", link)
            assert found, link
            url = f"http://127.0.0.1:{port}/snapshot"
            request = urllib.request.Request(url, headers={"Authorization": f"Bearer {found[1]}"})
            assert b'"host":"host1"' in _answer(request)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                _answer(urllib.request.Request(url))
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(patience(10)) == 0
        finally:
            process.kill()
            process.communicate()


def test_a_link_that_a_browser_can_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On all addresses, the link has this host's."""

    class Served:
        def __init__(self, *_: object) -> None:
            """Nothing is served."""

        def start(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("plugin.bounded_server.BoundedServer", Served)
    done = run(tmp_path, "--listen", "0.0.0.0:9478")
    assert done.output.startswith("http://192.0.2.1:9478/#token=")


def _answer(request: urllib.request.Request) -> bytes:
    deadline = time.monotonic() + patience(5)
    while True:
        try:
            with urllib.request.urlopen(request, timeout=patience(5)) as answer:
                body: bytes = answer.read()
                return body
        except urllib.error.HTTPError:
            raise
        except OSError:
            # It listens a moment after it has printed the link.
            assert time.monotonic() < deadline
            time.sleep(0.05)
