"""Rows of the store: values of `model` as JSON, in a form that outlives changes of the model.

Unknown fields are ignored and new ones have defaults, so that neighbouring versions can read each
other's rows. Decoded rows are cached: while hundreds of containers start, all rows are read many
times a second.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import (
    IPv4Interface,
    IPv6Interface,
    IPv6Network,
    ip_interface,
    ip_network,
)
from typing import Final, TypeVar

import msgspec

from driver.model import FORMAT, Endpoint, Network, Subnet

T = TypeVar("T")

KEPT: Final = 4096
"""Number of decoded rows that are kept."""


class _Subnet(msgspec.Struct):
    pool: str
    gateway: str | None = None


class _Network(msgspec.Struct):
    id: str
    vni: int
    port: int
    mtu: int
    prefix6: str
    subnets: list[_Subnet] = []
    ipv6: bool = False
    internal: bool = False
    acceleration: bool = True
    overlay: bool = True
    format: int = FORMAT
    options: dict[str, str] = {}


class _Endpoint(msgspec.Struct):
    id: str
    network_id: str
    mac: str
    ipv4: str | None = None
    ipv6: str | None = None
    sandbox_key: str | None = None
    created: float = 0.0
    engine_ipv6: str | None = None


def _decode(body: bytes, row: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=row)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from error


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def encode_network(network: Network) -> bytes:
    return msgspec.json.encode(
        _Network(
            id=network.id,
            vni=network.vni,
            port=network.port,
            mtu=network.mtu,
            prefix6=str(network.prefix6),
            subnets=[_Subnet(str(item.pool), _text(item.gateway)) for item in network.subnets],
            ipv6=network.ipv6,
            internal=network.internal,
            acceleration=network.acceleration,
            overlay=network.overlay,
            format=network.format,
            options=network.options,
        )
    )


def decode_network(body: bytes) -> Network:
    """Decode a row. Raises ValueError."""
    row = _decode(body, _Network)
    return Network(
        id=row.id,
        vni=row.vni,
        port=row.port,
        mtu=row.mtu,
        prefix6=IPv6Network(row.prefix6),
        subnets=tuple(
            Subnet(
                ip_network(item.pool),
                ip_interface(item.gateway) if item.gateway else None,
            )
            for item in row.subnets
        ),
        ipv6=row.ipv6,
        internal=row.internal,
        acceleration=row.acceleration,
        overlay=row.overlay,
        format=row.format,
        options=row.options,
    )


def encode_endpoint(endpoint: Endpoint) -> bytes:
    return msgspec.json.encode(
        _Endpoint(
            id=endpoint.id,
            network_id=endpoint.network_id,
            mac=endpoint.mac,
            ipv4=_text(endpoint.ipv4),
            ipv6=_text(endpoint.ipv6),
            sandbox_key=endpoint.sandbox_key,
            created=endpoint.created,
            engine_ipv6=_text(endpoint.engine_ipv6),
        )
    )


@lru_cache(KEPT)
def decode_endpoint(body: bytes) -> Endpoint:
    """Decode a row. Raises ValueError."""
    row = _decode(body, _Endpoint)
    return Endpoint(
        id=row.id,
        network_id=row.network_id,
        mac=row.mac,
        ipv4=IPv4Interface(row.ipv4) if row.ipv4 else None,
        ipv6=IPv6Interface(row.ipv6) if row.ipv6 else None,
        sandbox_key=row.sandbox_key,
        created=row.created,
        engine_ipv6=IPv6Interface(row.engine_ipv6) if row.engine_ipv6 else None,
    )
