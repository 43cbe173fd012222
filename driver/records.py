"""Rows of the store: values of `model` as JSON, in a form that outlives changes of the model.

Unknown fields are ignored and new ones have defaults, so that neighbouring versions can read each
other's rows. Decoded rows are cached: while hundreds of containers start, all rows are read many
times a second.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv6Network, ip_interface, ip_network
from typing import Any, Final, TypeVar

import msgspec

from driver.model import FORMAT, Endpoint, Network, Subnet

T = TypeVar("T")

KEPT: Final = 4096
"""Number of decoded rows that are kept."""


class _Subnet(msgspec.Struct):
    pool: str
    gateway: str | None = None


class _Network(msgspec.Struct):
    """A row of a network; msgspec can't decode a field that may be of either address family."""

    id: str
    vni: int
    port: int
    mtu: int
    prefix6: IPv6Network
    subnets: list[_Subnet] = []
    ipv6: bool = False
    internal: bool = False
    acceleration: bool = True
    overlay: bool = True
    encrypted: bool = False
    format: int = FORMAT
    options: dict[str, str] = {}


def _decode(body: bytes, row: type[T]) -> T:
    def address(kind: Any, text: Any) -> Any:
        return kind(text)

    try:
        return msgspec.json.decode(body, type=row, dec_hook=address)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error


def encode(value: Network | Endpoint) -> bytes:
    return msgspec.json.encode(value, enc_hook=str)


def decode_network(body: bytes) -> Network:
    """Decode a row. Raises ValueError."""
    row = _decode(body, _Network)
    subnets = tuple(
        Subnet(ip_network(item.pool), ip_interface(item.gateway) if item.gateway else None)
        for item in row.subnets
    )
    return Network(**{**msgspec.structs.asdict(row), "subnets": subnets})


@lru_cache(KEPT)
def decode_endpoint(body: bytes) -> Endpoint:
    """Decode a row. Raises ValueError."""
    return _decode(body, Endpoint)
