"""The relay and the program that stands for its processes, built once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from testbed import relays as client
from tests.dataplane.places import ROOT, compile_c

HERE = Path(__file__).parent
BUILD = ROOT / "dataplane" / "relay" / "build.sh"
FAULTS = (HERE / "faults.c", HERE / "tcp_faults.c")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.kernel)


def build(to: Path, sanitizer: str = "", *sources: Path) -> Path:
    """A relay: with a sanitizer or without, as it is shipped or with further sources for tests."""
    subprocess.run([BUILD, to, sanitizer, *sources], check=True, capture_output=True, text=True)
    return to


@pytest.fixture(params=[client.LOOPBACK, client.TCP], ids=["memory", "tcp"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The transport of the relays that a test starts."""
    kind: int = request.param
    monkeypatch.setattr(client.usual, "transport", kind)
    return kind


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("gcc is missing")
    return tmp_path_factory.mktemp("relay")


@pytest.fixture(scope="session")
def binary(folder: Path) -> Path:
    """Built for tests: with faults on request, and with sanitizers (address, undefined)."""
    return build(folder / "freeflow-relay", "address,undefined", *FAULTS)


@pytest.fixture(scope="session")
def shipped(folder: Path) -> Path:
    """The relay as the plugin's image has it."""
    return build(folder / "freeflow-relay-shipped")


@pytest.fixture(scope="session")
def plain(folder: Path) -> Path:
    """The same, and it can use the transport `loopback`."""
    binary = folder / "freeflow-relay-memory"
    subprocess.run([BUILD, "--memory", binary], check=True, capture_output=True)
    return binary


@pytest.fixture(scope="session")
def end(folder: Path) -> Path:
    """The program that is one end of a connection."""
    return compile_c(HERE / "end.c", folder / "end")
