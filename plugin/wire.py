"""Docker's JSON, as structs with Go's field names (libnetwork `drivers/remote/api`).

All other modules use checked values only. Requests are decoded from raw bytes, since Docker sends
no content type. Fields that are unknown, or not used here, are ignored, as in Go; null means an
empty list or map. An invalid field raises InvalidRequest with its name.
"""

from __future__ import annotations

import re
from ipaddress import (
    IPv4Interface,
    IPv6Interface,
    ip_interface,
    ip_network,
)
from typing import Any, Final, TypeVar

import msgspec

from driver.errors import InvalidRequest
from driver.model import IPInterface, IPNetwork, Subnet

GENERIC: Final = "com.docker.network.generic"
ENABLE_IPV6: Final = "com.docker.network.enable_ipv6"
INTERNAL: Final = "com.docker.network.internal"
NAME_MAX: Final = 255
"""Bytes of a file name (limits.h)."""
_MAC: Final = re.compile(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}")


class IPData(msgspec.Struct):
    Pool: str = ""
    Gateway: str | None = None


class AllocateNetwork(msgspec.Struct):
    NetworkID: str
    Options: dict[str, str] | None = None
    IPv4Data: list[IPData] | None = None
    IPv6Data: list[IPData] | None = None


class NetworkOnly(msgspec.Struct):
    NetworkID: str


class CreateNetwork(msgspec.Struct):
    NetworkID: str
    Options: dict[str, Any] | None = None
    IPv4Data: list[IPData] | None = None
    IPv6Data: list[IPData] | None = None


class Interface(msgspec.Struct):
    Address: str = ""
    AddressIPv6: str = ""
    MacAddress: str = ""


class CreateEndpoint(msgspec.Struct):
    NetworkID: str
    EndpointID: str
    Interface: Interface | None = None
    Options: dict[str, Any] | None = None


class EndpointOnly(msgspec.Struct):
    NetworkID: str
    EndpointID: str


class Join(msgspec.Struct):
    NetworkID: str
    EndpointID: str
    SandboxKey: str = ""
    Options: dict[str, Any] | None = None


class NodeAddress(msgspec.Struct):
    Address: str = ""
    Self: bool = False


class Discovery(msgspec.Struct):
    DiscoveryType: int
    DiscoveryData: Any = None


T = TypeVar("T")


def decode(body: bytes, kind: type[T]) -> T:
    """A request from its body.

    Raises:
        InvalidRequest: empty, not JSON, or not this request.
    """
    if not body.strip():
        raise InvalidRequest(
            "the request has no body; Docker repeats a request without its body when the first answer "
            "got lost",
            remedy="repeat the command",
        )
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(
            "the request's body can't be understood",
            cause=str(error),
            remedy="is the caller Docker?",
        ) from error


def address(name: str, text: str) -> IPInterface | None:
    """An address with prefix length; empty: None. Raises InvalidRequest with the field's name."""
    if not text:
        return None
    try:
        if "/" not in text:
            raise ValueError("has no prefix length")
        return ip_interface(text)
    except ValueError as error:
        raise InvalidRequest(
            f"{name} {text!r}", cause=str(error), remedy="expected an address such as 10.0.4.7/24"
        ) from error


def ipv4(name: str, text: str) -> IPv4Interface | None:
    value = address(name, text)
    if isinstance(value, IPv6Interface):
        raise InvalidRequest(
            f"{name} {text!r} is not an IPv4 address", remedy="expected one such as 10.0.4.7/24"
        )
    return value


def ipv6(name: str, text: str) -> IPv6Interface | None:
    value = address(name, text)
    if isinstance(value, IPv4Interface):
        raise InvalidRequest(
            f"{name} {text!r} is not an IPv6 address", remedy="expected one such as fd00::7/64"
        )
    return value


def mac(name: str, text: str) -> str | None:
    """A unicast MAC address in lower case; empty: None. Raises InvalidRequest."""
    if not text:
        return None
    if not _MAC.fullmatch(text):
        raise InvalidRequest(
            f"{name} {text!r} is not a MAC address", remedy="expected one such as 02:42:0a:00:04:07"
        )
    if int(text[:2], 16) & 1:
        raise InvalidRequest(
            f"{name} {text!r} is a group address", remedy="a container needs a unicast one"
        )
    return text.lower()


def sandbox(text: str) -> str:
    """The path of a container's namespace; empty: none.

    Raises:
        InvalidRequest: no file can have this name.
    """
    name = text.rpartition("/")[2]
    if text and (not name.strip(".") or "\0" in text or len(name.encode()) > NAME_MAX):
        raise InvalidRequest(
            f"SandboxKey {text!r:.200} is not the path of a namespace",
            remedy="expected one such as /var/run/docker/netns/1a2b3c4d5e6f",
        )
    return text


def subnets(*groups: list[IPData] | None) -> tuple[Subnet, ...]:
    """The pools of a network. Raises InvalidRequest."""
    result = []
    for item in (item for group in groups for item in group or ()):
        try:
            pool: IPNetwork = ip_network(item.Pool)
        except ValueError as error:
            raise InvalidRequest(
                f"Pool {item.Pool!r}", cause=str(error), remedy="expected one such as 10.0.4.0/24"
            ) from error
        result.append(Subnet(pool, address("Gateway", item.Gateway or "")))
    return tuple(result)


def generic(options: dict[str, Any] | None) -> dict[str, str]:
    """The driver options (-o) among a network's options.

    Raises:
        InvalidRequest: they aren't strings.
    """
    found = (options or {}).get(GENERIC)
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, str) for key, value in found.items()
    ):
        raise InvalidRequest(
            f"{GENERIC} is not a map of strings",
            cause=f"{found!r:.200}",
            remedy="is the caller Docker?",
        )
    return found


def flag(options: dict[str, Any] | None, name: str) -> bool:
    """A switch among a network's options; absent: off."""
    value = (options or {}).get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    if value in ("true", "false"):
        return bool(value == "true")
    raise InvalidRequest(
        f"{name} is neither true nor false",
        cause=f"{value!r:.80}",
        remedy="is the caller Docker?",
    )
