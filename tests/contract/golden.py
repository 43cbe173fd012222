"""The golden cases: exact requests and exact answers, one file per call.

A case is a list of steps. Each step is `{"call", "request", "status", "response"}`, or the name of
a step in `common.json`. Without `status`, 200 is expected; without `request`, the body is empty.
`settings` are the plugin's, `links` the links that exist after the last step. IDs are written
`<net>`: see `IDS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from tests.contract.places import Place, call

DIRECTORY: Final = Path(__file__).parent / "golden"
COMMON: Final = DIRECTORY / "common.json"

T = TypeVar("T")

IDS: Final = {
    "<net>": "p3l8f1w0gk2c9d7h5m6n4b0aq",
    "<net2>": "q7x2r5v8sl3b6c1j9k4m0d8ez",
    "<local>": "4c9d" * 16,
    "<ep>": "9f0c12ab34de" + "e" * 52,
    "<ep2>": "1a2b3c4d5e6f" + "e" * 52,
}
"""The IDs: Swarm's networks have 25 characters, local networks and endpoints 64 hexadecimal
ones.
"""
NETWORKS: Final = ("<net>", "<net2>", "<local>")
ENDPOINTS: Final = ("<ep>", "<ep2>")


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    call: str
    response: Any
    request: Any = None
    status: int = 200


class _Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    steps: list[Step | str]
    settings: dict[str, str] = {}
    links: list[str] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    steps: tuple[Step, ...]
    settings: dict[str, str]
    links: frozenset[str] | None

    @property
    def networks(self) -> frozenset[str]:
        """IDs of the objects that a case may have made."""
        ids = {
            step.request.get("NetworkID") for step in self.steps if isinstance(step.request, dict)
        }
        return frozenset(IDS[name] for name in NETWORKS if IDS[name] in ids)


def _read(path: Path, kind: type[T]) -> T:
    text = path.read_text()
    for name, identifier in IDS.items():
        text = text.replace(name, identifier)
    return msgspec.json.decode(text, type=kind)


def cases() -> list[Case]:
    """All cases; a case's name begins with the name of its file."""
    common = _read(COMMON, dict[str, Step])
    return [
        Case(
            f"{path.stem}: {case.name}",
            tuple(common[step] if isinstance(step, str) else step for step in case.steps),
            case.settings,
            None if case.links is None else frozenset(case.links),
        )
        for path in sorted(DIRECTORY.glob("*.json"))
        if path != COMMON
        for case in _read(path, list[_Case])
    ]


ALL_NETWORKS: Final = tuple(IDS[name] for name in NETWORKS)


def forget_all(place: Place, networks: Iterable[str] = ALL_NETWORKS) -> None:
    """Remove whatever a case has left, as Docker does; it may already be absent."""
    for network in networks:
        for endpoint in ENDPOINTS:
            both = {"NetworkID": network, "EndpointID": IDS[endpoint]}
            # 400: it belongs to another network.
            assert call(place, "DeleteEndpoint", both).status in (200, 400)
        for last in ("DeleteNetwork", "FreeNetwork"):
            assert call(place, last, {"NetworkID": network}).status == 200
