"""The promises made to Docker, in SQLite: written before the answer goes out.

Networks must survive a power failure, since Docker doesn't repeat calls for local ones: they are
written with `synchronous=FULL`. Endpoints don't outlive a reboot, so `NORMAL` is enough for them:
in WAL mode it survives any crash of the process (sqlite.org/pragma.html#pragma_synchronous).

A file that SQLite can't read is moved aside; its content is recovered from Docker and the kernel
(`recovery.py`). A file of a newer version is refused and left unchanged.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from driver import names, records
from driver.errors import StateError
from driver.model import Endpoint, Network

FILE: Final = "freeflow.db"
ASIDE: Final = "freeflow.db.broken"

MIGRATIONS: Final = (
    """
    CREATE TABLE network (id TEXT PRIMARY KEY, vni INTEGER NOT NULL, body BLOB NOT NULL);
    CREATE TABLE allocation (id TEXT PRIMARY KEY, vni INTEGER NOT NULL, body BLOB NOT NULL);
    CREATE TABLE endpoint (
        id TEXT PRIMARY KEY, network_id TEXT NOT NULL, ipv4 TEXT, body BLOB NOT NULL
    );
    CREATE INDEX endpoint_network ON endpoint (network_id, ipv4);
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
)
"""Step N brings a file from schema N (`user_version`) to N+1; steps are only ever added."""

_UNREADABLE: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_BUSY_TIMEOUT: Final = 5.0
_TABLES: Final = ("network", "allocation", "endpoint", "meta")

T = TypeVar("T")
log = structlog.get_logger()


def _unreadable(error: sqlite3.Error) -> bool:
    # The low byte is the error, the rest its detail (sqlite.org/rescode.html).
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _UNREADABLE


class Store:
    """The state of this host in `directory`. All methods are safe from any thread.

    One connection writes and one reads, so that no reader waits for a writer's fsync. `moved_aside`
    is where this start has moved an unreadable file, if it had to.

    Every method raises StateError.
    """

    def __init__(
        self,
        directory: Path,
        *,
        migrations: tuple[str, ...] = MIGRATIONS,
        busy_timeout: float = _BUSY_TIMEOUT,
    ) -> None:
        self.path = directory / FILE
        self.moved_aside: Path | None = None
        self._migrations = migrations
        self._busy_timeout = busy_timeout
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._writer = self._open()
            self._reader = self._connect()
            self._drop_undecodable()
        except (OSError, sqlite3.Error) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> StateError:
        if isinstance(error, sqlite3.Error) and _unreadable(error):
            remedy = "disable and enable the plugin: it then reads its state from Docker again"
        else:
            remedy = "check the file system's free space and permissions"
        return StateError(f"state in {self.path}", cause=str(error), remedy=remedy)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self.path,
            isolation_level=None,
            check_same_thread=False,
            timeout=self._busy_timeout,
        )

    def _open(self) -> sqlite3.Connection:
        try:
            return self._prepare()
        except sqlite3.DatabaseError as error:
            if not _unreadable(error):
                raise
            reason = str(error)
        # Only the last such file is kept, for a bug report.
        self.moved_aside = self.path.with_name(ASIDE)
        self.path.replace(self.moved_aside)
        for suffix in ("-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        log.error(
            "state unreadable, started without it",
            moved_to=str(self.moved_aside),
            reason=reason,
        )
        return self._prepare()

    def _prepare(self) -> sqlite3.Connection:
        """A connection to a file of the current schema."""
        connection = self._connect()
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            found = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if found > len(self._migrations):
                raise StateError(
                    f"state in {self.path}",
                    cause=f"written by a newer FreeFlow (schema {found}, this version has "
                    f"{len(self._migrations)})",
                    remedy="upgrade the plugin to that version again, or remove and install it to "
                    "start without state",
                )
            for number in range(found, len(self._migrations)):
                connection.executescript(
                    f"BEGIN IMMEDIATE;{self._migrations[number]};"
                    f"PRAGMA user_version={number + 1};COMMIT;"
                )
                log.info("state migrated", schema=number + 1)
            if connection.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise _corrupt("quick_check found damage")
            for table in _TABLES:
                connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _drop_undecodable(self) -> None:
        """Delete rows that can't be decoded: recovery reads their content from Docker again."""
        decoders: dict[str, Callable[[bytes], object]] = {
            "network": records.decode_network,
            "allocation": records.decode_network,
            "endpoint": records.decode_endpoint,
        }
        for table, decode in decoders.items():
            for identifier, body in self._read(f"SELECT id, body FROM {table}"):
                try:
                    decode(body)
                except ValueError as error:
                    log.error(
                        "invalid row dropped",
                        table=table,
                        id=identifier,
                        reason=str(error),
                    )
                    self._write(f"DELETE FROM {table} WHERE id=?", identifier, durable=True)

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    # --- transactions

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[sqlite3.Connection]:
        with self._write_lock:
            connection = self._writer
            try:
                connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._failed(error) from error
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def _write(self, sql: str, *values: Any, durable: bool) -> None:
        with self._transaction(durable=durable) as connection:
            connection.execute(sql, values)

    def _read(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._read_lock:
            try:
                return self._reader.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise self._failed(error) from error

    def _bodies(self, decode: Callable[[bytes], T], sql: str, *values: Any) -> list[T]:
        return [decode(body) for (body,) in self._read(sql, *values)]

    # --- networks, and allocations on managers

    def put_network(self, network: Network) -> None:
        self._put("network", network)

    def network(self, network_id: str) -> Network | None:
        return self._one("network", network_id)

    def networks(self) -> list[Network]:
        return self._all("network")

    def delete_network(self, network_id: str) -> None:
        """Forget a network and its endpoints."""
        with self._transaction(durable=True) as connection:
            connection.execute("DELETE FROM endpoint WHERE network_id=?", (network_id,))
            connection.execute("DELETE FROM network WHERE id=?", (network_id,))

    def put_allocation(self, network: Network) -> None:
        self._put("allocation", network)

    def allocation(self, network_id: str) -> Network | None:
        return self._one("allocation", network_id)

    def allocations(self) -> list[Network]:
        return self._all("allocation")

    def delete_allocation(self, network_id: str) -> None:
        if self._read("SELECT 1 FROM allocation WHERE id=?", network_id):
            self._write("DELETE FROM allocation WHERE id=?", network_id, durable=True)

    def _put(self, table: str, network: Network) -> None:
        sql = f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)"
        self._write(sql, network.id, network.vni, records.encode(network), durable=True)

    def _one(self, table: str, network_id: str) -> Network | None:
        sql = f"SELECT body FROM {table} WHERE id=?"
        return next(iter(self._bodies(records.decode_network, sql, network_id)), None)

    def _all(self, table: str) -> list[Network]:
        return self._bodies(records.decode_network, f"SELECT body FROM {table} ORDER BY id")

    def taken_vnis(self) -> dict[int, str]:
        """VNI → network ID, of this host's networks and of allocations."""
        return dict(
            self._read(
                "SELECT vni, id FROM allocation UNION SELECT vni, id FROM network ORDER BY 2"
            )
        )

    # --- endpoints

    def put_endpoint(self, endpoint: Endpoint) -> None:
        self._write(
            "INSERT OR REPLACE INTO endpoint VALUES (?, ?, ?, ?)",
            endpoint.id,
            endpoint.network_id,
            None if endpoint.ipv4 is None else str(endpoint.ipv4.ip),
            records.encode(endpoint),
            durable=False,
        )

    def endpoint(self, endpoint_id: str) -> Endpoint | None:
        sql = "SELECT body FROM endpoint WHERE id=?"
        return next(iter(self._bodies(records.decode_endpoint, sql, endpoint_id)), None)

    def endpoints(self, network_id: str | None = None) -> list[Endpoint]:
        if network_id is None:
            return self._bodies(records.decode_endpoint, "SELECT body FROM endpoint ORDER BY id")
        sql = "SELECT body FROM endpoint WHERE network_id=? ORDER BY id"
        return self._bodies(records.decode_endpoint, sql, network_id)

    def has_endpoints(self, network_id: str) -> bool:
        """Whether a network, given by its ID or short ID, has endpoints."""
        sql = "SELECT 1 FROM endpoint WHERE network_id GLOB ? LIMIT 1"
        return bool(self._read(sql, network_id + "*"))

    def endpoints_at(self, network_id: str, ipv4: IPv4Interface) -> list[Endpoint]:
        """The endpoints of a network with this address."""
        sql = "SELECT body FROM endpoint WHERE network_id=? AND ipv4=?"
        return self._bodies(records.decode_endpoint, sql, network_id, str(ipv4.ip))

    def endpoint_ids(self, short_id: str) -> list[str]:
        """IDs of the endpoints whose short ID this is."""
        pattern = names.short(short_id) + "*"
        return [row[0] for row in self._read("SELECT id FROM endpoint WHERE id GLOB ?", pattern)]

    def delete_endpoint(self, endpoint_id: str) -> None:
        self._write("DELETE FROM endpoint WHERE id=?", endpoint_id, durable=False)

    def clear_endpoints(self) -> None:
        self._write("DELETE FROM endpoint", durable=False)

    # --- facts about this host

    def fact(self, key: str) -> str | None:
        rows = self._read("SELECT value FROM meta WHERE key=?", key)
        return str(rows[0][0]) if rows else None

    def put_fact(self, key: str, value: str) -> None:
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value, durable=False)


def _corrupt(reason: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(reason)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error
