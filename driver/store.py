"""What was promised to Docker, in SQLite: written before the answer goes out.

Networks must survive a power failure, since Docker doesn't replay local ones: they are written with
`synchronous=FULL`. Endpoints don't outlive a reboot, so `NORMAL` is enough for them: in WAL mode it survives any crash
of the process (sqlite.org/pragma.html#pragma_synchronous).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from ipaddress import IPv4Interface, IPv6Interface, IPv6Network, ip_interface, ip_network
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import structlog

from driver.errors import FreeFlowError
from driver.model import Endpoint, Network, Subnet

SCHEMA: Final = 1
FILE: Final = "freeflow.db"

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS network (id TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS allocation (id TEXT PRIMARY KEY, vni INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS endpoint (id TEXT PRIMARY KEY, network_id TEXT NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS endpoint_network ON endpoint (network_id);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

T = TypeVar("T")
log = structlog.get_logger()


def _encode(value: Network | Endpoint) -> bytes:
    # msgspec has no `ipaddress` types: addresses are strings in a row.
    return msgspec.json.encode(value, enc_hook=str)


class StoreError(FreeFlowError):
    """The state can't be read by this version."""


class Store:
    """The state of this host in `directory`. All methods are safe from any thread."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        self._lock = threading.RLock()
        directory.mkdir(parents=True, exist_ok=True)
        self._connection = self._open()

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            # What it said comes back from Docker and the kernel (recovery.py); keep it for a bug report.
            aside = self.path.with_suffix(".broken")
            log.error("state is unreadable, starting anew", file=str(aside), error=str(error))
            self.path.replace(aside)
            for suffix in ("-wal", "-shm"):
                Path(str(self.path) + suffix).unlink(missing_ok=True)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, isolation_level=None, check_same_thread=False, timeout=5
        )
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if version > SCHEMA:
                raise StoreError(
                    f"the state in {self.path} was written by a newer FreeFlow (schema {version}, this one has {SCHEMA}); "
                    "upgrade the plugin again, or remove it and install it anew to start without state"
                )
            connection.executescript(_TABLES)
            connection.execute(f"PRAGMA user_version={SCHEMA}")
            connection.execute("SELECT count(*) FROM network").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _write(self, durable: bool, statements: list[tuple[str, tuple[Any, ...]]]) -> None:
        with self._lock:
            self._connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for sql, values in statements:
                    self._connection.execute(sql, values)
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _rows(self, sql: str, values: tuple[Any, ...], decode: Callable[[Any], T]) -> list[T]:
        with self._lock:
            rows = self._connection.execute(sql, values).fetchall()
        return [decode(row[0]) for row in rows]

    # --- networks

    def put_network(self, network: Network) -> None:
        body = _encode(network)
        self._write(True, [("INSERT OR REPLACE INTO network VALUES (?, ?)", (network.id, body))])

    def network(self, network_id: str) -> Network | None:
        found = self._rows("SELECT body FROM network WHERE id=?", (network_id,), _network)
        return found[0] if found else None

    def networks(self) -> list[Network]:
        return self._rows("SELECT body FROM network ORDER BY id", (), _network)

    def delete_network(self, network_id: str) -> None:
        """Forget a network and its endpoints."""
        self._write(
            True,
            [
                ("DELETE FROM endpoint WHERE network_id=?", (network_id,)),
                ("DELETE FROM network WHERE id=?", (network_id,)),
            ],
        )

    # --- allocations, on managers

    def put_allocation(self, network: Network) -> None:
        values = (network.id, network.vni, _encode(network))
        self._write(True, [("INSERT OR REPLACE INTO allocation VALUES (?, ?, ?)", values)])

    def allocation(self, network_id: str) -> Network | None:
        found = self._rows("SELECT body FROM allocation WHERE id=?", (network_id,), _network)
        return found[0] if found else None

    def delete_allocation(self, network_id: str) -> None:
        self._write(True, [("DELETE FROM allocation WHERE id=?", (network_id,))])

    def allocations(self) -> list[Network]:
        return self._rows("SELECT body FROM allocation ORDER BY id", (), _network)

    def taken_vnis(self) -> dict[int, str]:
        """VNI -> network ID, of networks here and of allocations."""
        return {n.vni: n.id for n in (*self.allocations(), *self.networks())}

    # --- endpoints

    def put_endpoint(self, endpoint: Endpoint) -> None:
        values = (endpoint.id, endpoint.network_id, _encode(endpoint))
        self._write(False, [("INSERT OR REPLACE INTO endpoint VALUES (?, ?, ?)", values)])

    def endpoint(self, endpoint_id: str) -> Endpoint | None:
        found = self._rows("SELECT body FROM endpoint WHERE id=?", (endpoint_id,), _endpoint)
        return found[0] if found else None

    def endpoints(self, network_id: str | None = None) -> list[Endpoint]:
        if network_id is None:
            return self._rows("SELECT body FROM endpoint ORDER BY id", (), _endpoint)
        sql = "SELECT body FROM endpoint WHERE network_id=? ORDER BY id"
        return self._rows(sql, (network_id,), _endpoint)

    def delete_endpoint(self, endpoint_id: str) -> None:
        self._write(False, [("DELETE FROM endpoint WHERE id=?", (endpoint_id,))])

    def clear_endpoints(self) -> None:
        self._write(False, [("DELETE FROM endpoint", ())])

    # --- facts about this host

    def fact(self, key: str) -> str | None:
        found = self._rows("SELECT value FROM meta WHERE key=?", (key,), str)
        return found[0] if found else None

    def put_fact(self, key: str, value: str) -> None:
        self._write(False, [("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))])


def _network(body: bytes) -> Network:
    raw: dict[str, Any] = msgspec.json.decode(body)
    subnets = tuple(
        Subnet(
            pool=ip_network(item["pool"]),
            gateway=ip_interface(item["gateway"]) if item["gateway"] else None,
        )
        for item in raw.pop("subnets")
    )
    prefix6 = IPv6Network(raw.pop("prefix6"))
    return Network(**raw, subnets=subnets, prefix6=prefix6)


def _endpoint(body: bytes) -> Endpoint:
    raw: dict[str, Any] = msgspec.json.decode(body)
    ipv4, ipv6 = raw.pop("ipv4"), raw.pop("ipv6")
    return Endpoint(
        **raw,
        ipv4=IPv4Interface(ipv4) if ipv4 else None,
        ipv6=IPv6Interface(ipv6) if ipv6 else None,
    )
