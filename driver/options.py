"""Options of a network (`-o KEY=VALUE`): checked once, by name; what isn't known is refused.

Keys of three kinds meet in one map: the user's, ours (`freeflow.*`, added by AllocateNetwork), and the engine's own
(`com.docker.network.*`), which the engine consumes itself and which are let through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv6Network
from typing import Final

from driver.errors import InvalidRequest

MTU_RANGE: Final = range(1280, 65536)
"""IPv6 needs links of 1280 bytes at least (RFC 8200, section 5)."""
VNI_RANGE: Final = range(1, 1 << 24)
PORT_RANGE: Final = range(1, 1 << 16)

USER_KEYS: Final = {
    "mtu": "MTU of the containers' interfaces, 1280 to 65535",
    "vni": "VXLAN network identifier, 1 to 16777215",
    "acceleration": "on or off",
}
MTU_ALIAS: Final = "com.docker.network.driver.mtu"
ENGINE_PREFIX: Final = "com.docker.network."

FORMAT: Final = "freeflow.format"
VNI: Final = "freeflow.vni"
PORT: Final = "freeflow.port"
MTU: Final = "freeflow.mtu"
PREFIX6: Final = "freeflow.prefix6"
OWN_KEYS: Final = (FORMAT, VNI, PORT, MTU, PREFIX6)


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """The options of one network; None: not given. `own_*` are those that AllocateNetwork chose earlier."""

    mtu: int | None = None
    vni: int | None = None
    acceleration: bool = True
    own_format: int | None = None
    own_vni: int | None = None
    own_port: int | None = None
    own_mtu: int | None = None
    own_prefix6: IPv6Network | None = None


def _integer(key: str, value: str, allowed: range) -> int:
    try:
        number = int(value)
    except ValueError:
        number = allowed.start - 1
    if number not in allowed:
        raise InvalidRequest(
            f"option {key}={value}: not a number from {allowed.start} to {allowed.stop - 1}; "
            f"for example -o {key}={allowed.start}"
        )
    return number


def _switch(key: str, value: str) -> bool:
    meaning = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
    if value.lower() not in meaning:
        raise InvalidRequest(f"option {key}={value}: neither on nor off; for example -o {key}=off")
    return meaning[value.lower()]


def _prefix6(value: str) -> IPv6Network:
    try:
        network = IPv6Network(value)
    except ValueError as error:
        raise InvalidRequest(
            f"option {PREFIX6}={value}: {error}; remove it, it is chosen by FreeFlow"
        ) from error
    if network.prefixlen != 64:
        raise InvalidRequest(
            f"option {PREFIX6}={value}: not a /64; remove it, it is chosen by FreeFlow"
        )
    return network


def parse(options: Mapping[str, str]) -> NetworkOptions:
    """Check the options of a network.

    Raises:
        InvalidRequest: an unknown key, with the known ones listed, or a bad value.
    """
    unknown = [
        key
        for key in options
        if key not in USER_KEYS and key not in OWN_KEYS and not key.startswith(ENGINE_PREFIX)
    ]
    if unknown:
        known = ", ".join(f"{key} ({meaning})" for key, meaning in USER_KEYS.items())
        raise InvalidRequest(
            f"unknown option {', '.join(sorted(unknown))}; FreeFlow networks have: {known}; "
            "for example -o mtu=9000"
        )
    mtu = options.get("mtu", options.get(MTU_ALIAS))
    return NetworkOptions(
        mtu=None if mtu is None else _integer("mtu", mtu, MTU_RANGE),
        vni=_integer("vni", options["vni"], VNI_RANGE) if "vni" in options else None,
        acceleration=_switch("acceleration", options.get("acceleration", "on")),
        own_format=_integer(FORMAT, options[FORMAT], range(1, 1 << 16))
        if FORMAT in options
        else None,
        own_vni=_integer(VNI, options[VNI], VNI_RANGE) if VNI in options else None,
        own_port=_integer(PORT, options[PORT], PORT_RANGE) if PORT in options else None,
        own_mtu=_integer(MTU, options[MTU], MTU_RANGE) if MTU in options else None,
        own_prefix6=_prefix6(options[PREFIX6]) if PREFIX6 in options else None,
    )


def check_endpoint(options: Mapping[str, object]) -> None:
    """Check per-endpoint options (`--network name=n,driver-opt=…`): FreeFlow has none.

    Raises:
        InvalidRequest: any key that isn't the engine's own.
    """
    unknown = sorted(key for key in options if not key.startswith(ENGINE_PREFIX))
    if unknown:
        raise InvalidRequest(
            f"unknown driver-opt {', '.join(unknown)}: FreeFlow has no options per container; remove it"
        )
