"""The API of a Docker engine, on its socket: measures the engine, not the start of a command.

It has only the calls that measurements need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from bench.errors import EngineRefusedError
from driver.unix_http import UnixConnection


@dataclass(frozen=True, slots=True)
class EngineApi:
    """One engine's API. Each call has a connection of its own, so many threads can call at once."""

    socket: Path
    timeout: float = 120.0

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The decoded answer; None if it is empty. Raises `EngineRefusedError` from status 400."""
        connection = UnixConnection(self.socket, self.timeout)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status >= 400:
            try:
                text = json.loads(text)["message"]
            except (ValueError, KeyError, TypeError):
                pass
            raise EngineRefusedError(response.status, f"{method} {path}", text)
        return json.loads(text) if text else None

    def version(self) -> str:
        return str(self.call("GET", "/version")["Version"])

    def import_image(self, archive: Path, name: str) -> None:
        """Make an image from a tar archive of a file system, as `docker import` does."""
        path = f"/images/create?fromSrc=-&repo={quote(name)}"
        connection = UnixConnection(self.socket, self.timeout)
        try:
            with archive.open("rb") as body:
                size = str(archive.stat().st_size)
                headers = {"Content-Type": "application/x-tar", "Content-Length": size}
                connection.request("POST", path, body, headers)
                response = connection.getresponse()
                text = response.read().decode()
        finally:
            connection.close()
        # The status is sent before the work begins: failures are in the progress messages.
        if response.status >= 400 or '"error"' in text:
            raise EngineRefusedError(response.status, f"import of {archive.name}", text.strip())

    def create_network(
        self,
        name: str,
        driver: str,
        labels: Mapping[str, str],
        options: Mapping[str, str] | None = None,
    ) -> str:
        body = {
            "Name": name,
            "Driver": driver,
            "Attachable": True,
            "CheckDuplicate": True,
            "Labels": labels,
            "Options": options or {},
        }
        return str(self.call("POST", "/networks/create", body)["Id"])

    def network(self, name: str) -> dict[str, Any]:
        return cast("dict[str, Any]", self.call("GET", f"/networks/{quote(name)}"))

    def remove_network(self, name: str) -> None:
        self.call("DELETE", f"/networks/{quote(name)}")

    def create_container(self, body: dict[str, Any], name: str = "") -> str:
        path = "/containers/create" + (f"?name={quote(name)}" if name else "")
        return str(self.call("POST", path, body)["Id"])

    def start(self, container: str) -> None:
        self.call("POST", f"/containers/{container}/start")

    def remove(self, container: str) -> None:
        """Remove a container, running or not. One that does not exist is no error."""
        try:
            self.call("DELETE", f"/containers/{container}?force=1&v=1")
        except EngineRefusedError as error:
            if error.status != 404:
                raise

    def inspect(self, container: str) -> dict[str, Any]:
        return cast("dict[str, Any]", self.call("GET", f"/containers/{container}/json"))

    def labelled(self, label: str) -> list[str]:
        """IDs of all containers with this label, running or not."""
        filters = quote(json.dumps({"label": [label]}))
        found = self.call("GET", f"/containers/json?all=1&filters={filters}")
        return [str(one["Id"]) for one in found]


def address(inspected: dict[str, Any], network: str) -> IPv4Address:
    return IPv4Address(inspected["NetworkSettings"]["Networks"][network]["IPAddress"])
