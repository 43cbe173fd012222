"""The store: promises to Docker on disk."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver import records
from driver.errors import StateError
from driver.model import Endpoint, Network, Subnet
from driver.store import ASIDE, FILE, MIGRATIONS, Store

NETWORK = Network(
    id="n" * 25,
    vni=70012,
    port=4799,
    mtu=1450,
    prefix6=IPv6Network("fd00:1:2:3::/64"),
    subnets=(
        Subnet(IPv4Network("10.0.4.0/24"), IPv4Interface("10.0.4.1/24")),
        Subnet(IPv6Network("fd01::/64")),
    ),
    ipv6=True,
    internal=True,
    acceleration=False,
    options={"mtu": "1450"},
)
ENDPOINT = Endpoint(
    id="e" * 64,
    network_id=NETWORK.id,
    mac="02:42:0a:00:04:07",
    ipv4=IPv4Interface("10.0.4.7/24"),
    ipv6=IPv6Interface("fd00:1:2:3::a00:407/64"),
    sandbox_key="/var/run/docker/netns/1a2b3c",
    created=12.5,
)


def test_survives_restart(tmp_path: Path) -> None:
    """Stored rows exist after the process has ended without closing."""
    store = Store(tmp_path)
    store.put_network(NETWORK)
    store.put_allocation(NETWORK)
    store.put_endpoint(ENDPOINT)
    store.put_fact("boot_id", "b")
    again = Store(tmp_path)
    assert again.networks() == [NETWORK]
    assert again.network(NETWORK.id) == NETWORK
    assert again.allocation(NETWORK.id) == NETWORK
    assert again.endpoints() == again.endpoints(NETWORK.id) == [ENDPOINT]
    assert again.endpoint(ENDPOINT.id) == ENDPOINT
    assert again.fact("boot_id") == "b"
    assert again.moved_aside is None


def test_deleted_is_gone(tmp_path: Path) -> None:
    """Deleted rows are gone, a second deletion succeeds, and a network's endpoints go with it."""
    store = Store(tmp_path)
    store.put_network(NETWORK)
    store.put_endpoint(ENDPOINT)
    for _ in range(2):
        store.delete_network(NETWORK.id)
        store.delete_endpoint(ENDPOINT.id)
        store.delete_allocation(NETWORK.id)
    assert store.network(NETWORK.id) is None
    assert store.endpoint(ENDPOINT.id) is None
    assert not store.has_endpoints(NETWORK.id)


def test_look_ups(tmp_path: Path) -> None:
    """Endpoints are found by network, address and short ID only."""
    store = Store(tmp_path)
    store.put_network(NETWORK)
    store.put_endpoint(ENDPOINT)
    other = replace(ENDPOINT, id="f" * 64, ipv4=IPv4Interface("10.0.4.8/24"))
    store.put_endpoint(other)
    assert store.endpoints_at(NETWORK.id, IPv4Interface("10.0.4.8/16")) == [other]
    assert store.endpoints_at("m" * 25, IPv4Interface("10.0.4.8/24")) == []
    assert store.endpoint_ids("e" * 12) == [ENDPOINT.id]
    assert store.has_endpoints(NETWORK.id)
    assert store.has_endpoints(NETWORK.id[:12])
    assert not store.has_endpoints("m" * 25)
    assert store.taken_vnis() == {70012: NETWORK.id}


@pytest.mark.parametrize("damage", ["text", "middle", "torn"])
def test_unreadable_file_is_moved_aside(tmp_path: Path, damage: str) -> None:
    """A file that SQLite cannot read does not keep the plugin from starting, and is kept for a bug
    report.
    """
    store = Store(tmp_path)
    for number in range(300):
        store.put_endpoint(replace(ENDPOINT, id=f"{number:064x}"))
    store.close()
    file = tmp_path / FILE
    content = bytearray(file.read_bytes())
    if damage == "text":
        content = bytearray(b"this is no database\n" * 500)
    elif damage == "middle":
        content[8192 : len(content) - 4096] = b"\xff" * (len(content) - 12288)
    else:
        del content[len(content) // 2 :]
    file.write_bytes(content)
    again = Store(tmp_path)
    assert again.endpoints() == []
    assert again.moved_aside == tmp_path / ASIDE
    assert (tmp_path / ASIDE).read_bytes() == content
    again.put_endpoint(ENDPOINT)
    assert Store(tmp_path).endpoints() == [ENDPOINT]


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    """After a downgrade the newer version's file is not changed, and the message gives the
    remedy.
    """
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute(f"PRAGMA user_version={len(MIGRATIONS) + 1}")
    with pytest.raises(StateError, match=r"newer FreeFlow .*upgrade the plugin"):
        Store(tmp_path)
    assert not (tmp_path / ASIDE).exists()
    with sqlite3.connect(tmp_path / FILE) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)


def test_migration(tmp_path: Path) -> None:
    """An older file is migrated to the newer schema once, with its content."""
    store = Store(tmp_path)
    store.put_network(NETWORK)
    store.close()
    later = (*MIGRATIONS, "CREATE TABLE later (x); INSERT INTO later VALUES (1);")
    for _ in range(2):
        store = Store(tmp_path, migrations=later)
        assert store.networks() == [NETWORK]
        store.close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        assert connection.execute("SELECT count(*) FROM later").fetchone() == (1,)


def test_failed_migration_changes_nothing(tmp_path: Path) -> None:
    """A migration that fails half-way leaves the older file usable by the older version."""
    store = Store(tmp_path)
    store.put_network(NETWORK)
    store.close()
    with pytest.raises(StateError):
        Store(tmp_path, migrations=(*MIGRATIONS, "CREATE TABLE later (x); DROP TABLE missing;"))
    assert Store(tmp_path).networks() == [NETWORK]
    with sqlite3.connect(tmp_path / FILE) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    assert "later" not in tables


def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    """A file that cannot be opened is an error that names it, and nothing is moved or removed."""
    (tmp_path / FILE).mkdir()
    with pytest.raises(StateError, match=FILE):
        Store(tmp_path)
    assert (tmp_path / FILE).is_dir()


def test_busy_file_is_not_damage(tmp_path: Path) -> None:
    """A write that another process blocks is an error of that call; the state stays, and the next
    call works.
    """
    store = Store(tmp_path, busy_timeout=0.05)
    store.put_network(NETWORK)
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StateError, match="locked"):
        store.put_endpoint(ENDPOINT)
    assert store.networks() == [NETWORK]
    other.execute("ROLLBACK")
    store.put_endpoint(ENDPOINT)
    assert store.endpoints() == [ENDPOINT]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"id": 1}', b'{"id":"x","mac":null}'])
def test_senseless_row_is_dropped(tmp_path: Path, body: bytes) -> None:
    """An invalid row costs that row, not the start."""
    store = Store(tmp_path)
    store.put_network(NETWORK)
    store.put_endpoint(ENDPOINT)
    store.close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("INSERT INTO endpoint VALUES ('bad', ?, NULL, ?)", ("b" * 25, body))
    again = Store(tmp_path)
    assert again.endpoints() == [ENDPOINT]
    assert not again.has_endpoints("b" * 25)


def test_many_threads(tmp_path: Path) -> None:
    """Threads write and read in parallel, and no write is lost."""
    store = Store(tmp_path)
    store.put_network(NETWORK)

    def work(worker: int) -> None:
        for number in range(40):
            endpoint = replace(ENDPOINT, id=f"{worker:02x}{number:062x}")
            store.put_endpoint(endpoint)
            assert store.endpoint(endpoint.id) == endpoint
            if number % 10 == 0:
                store.put_network(replace(NETWORK, id=f"{worker:02x}{number:023d}"))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [None] * 8
    assert len(store.endpoints()) == 8 * 40


def test_rows_of_neighbouring_versions() -> None:
    """A row with unknown fields, or without some known ones, can be read."""
    body = b'{"id":"e","network_id":"n","mac":"02:00:00:00:00:01","colour":"blue"}'
    assert records.decode_endpoint(body) == Endpoint("e", "n", "02:00:00:00:00:01")


pools = st.one_of(
    st.builds(
        lambda a, p: IPv4Network((a, p), strict=False), st.ip_addresses(v=4), st.integers(0, 32)
    ),
    st.builds(
        lambda a, p: IPv6Network((a, p), strict=False), st.ip_addresses(v=6), st.integers(0, 128)
    ),
)


@given(
    st.lists(st.builds(Subnet, pools), max_size=4),
    st.booleans(),
    st.booleans(),
    st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=4),
)
def test_network_rows(
    subnets: list[Subnet], ipv6: bool, internal: bool, options: dict[str, str]
) -> None:
    """A network read from its row is unchanged."""
    network = replace(
        NETWORK, subnets=tuple(subnets), ipv6=ipv6, internal=internal, options=options
    )
    assert records.decode_network(records.encode(network)) == network
