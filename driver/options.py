"""Options of a network (`-o KEY=VALUE`). Unknown keys are refused.

One map contains keys of three kinds: the user's, ours (`freeflow.*`, added by AllocateNetwork), and
those that the engine consumes and passes on nevertheless. An option of another driver is refused
rather than ignored: its user must not believe that it is on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network
from typing import Final

from driver.balance import BALANCES, EVEN
from driver.errors import InvalidRequest
from driver.model import ENCRYPTED_FORMAT as SPOKEN

MTU_RANGE: Final = range(1280, 65536)
"""IPv6 needs links of 1280 bytes at least (RFC 8200, section 5)."""
VNI_RANGE: Final = range(1, 1 << 24)
PORT_RANGE: Final = range(1, 1 << 16)
UPGRADE_RANGE: Final = range(1, 1 << 31)

USER_KEYS: Final = {
    "mtu": "MTU of the containers' interfaces, 1280 to 65535",
    "vni": "VXLAN network identifier, 1 to 16777215",
    "ipv6": "IPv6 besides IPv4: on, off, or the /64 to take addresses from",
    "acceleration": "on or off",
    "rdma": "on or off: connections to other hosts over RDMA",
    "relay": "on or off: connections to other hosts over TCP between the relays",
    "verbs": "on or off: RDMA verbs",
    "verbs_direct": "on or off: peers on one host map each other's registered memory",
    "ebpf": "on or off: the eBPF fast path",
    "encrypted": "on or off: encrypt what leaves the host",
    "balance": "even, local or source: which of a service's tasks its VIP leads to",
    "upgrade_operations": "reads and writes after which a connection moves to shared memory",
}
MTU_ALIAS: Final = "com.docker.network.driver.mtu"
ENGINE_PREFIXES: Final = (
    "com.docker.network.advertise_addr_",
    "com.docker.network.enable_ipv",
    "com.docker.network.endpoint.",
    "com.docker.network.internal",
)
IP6: Final = "ip6"
ENDPOINT_PREFIX: Final = "com.docker."
"""Keys of the engine at an endpoint: port lists, DNS servers, MAC address."""
HINTS: Final = {
    "com.docker.network.driver.overlay.vxlanid_list": "use -o vni=NUMBER",
}

OWN_PREFIX: Final = "freeflow."
ENCRYPTED: Final = "encrypted"
FORMAT: Final = "freeflow.format"
VNI: Final = "freeflow.vni"
PORT: Final = "freeflow.port"
MTU: Final = "freeflow.mtu"
PREFIX6: Final = "freeflow.prefix6"
_SWITCH: Final = dict.fromkeys(("on", "true", "1"), True) | dict.fromkeys(
    ("off", "false", "0"), False
)
_EXAMPLES: Final = {"mtu": 9000, MTU_ALIAS: 9000, "vni": 70012}


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """The options of a network; None: not given. AllocateNetwork chose those named `own_*`
    earlier."""

    mtu: int | None = None
    vni: int | None = None
    ipv6: bool = False
    prefix6: IPv6Network | None = None
    acceleration: bool = True
    rdma: bool = True
    relay: bool = True
    verbs: bool = True
    verbs_direct: bool = False
    ebpf: bool = True
    encrypted: bool = False
    balance: str = EVEN
    upgrade_operations: int | None = None
    own_format: int | None = None
    own_vni: int | None = None
    own_port: int | None = None
    own_mtu: int | None = None
    own_prefix6: IPv6Network | None = None


def _invalid(key: str, value: str, cause: str, remedy: str) -> InvalidRequest:
    return InvalidRequest(f"option {key}={value}", cause=cause, remedy=remedy)


def _integer(key: str, value: str, allowed: range) -> int:
    # Not int(): it accepts "9_000", " 9000 " and digits of other scripts.
    if not (value.isascii() and value.isdecimal() and len(value) < 12) or int(value) not in allowed:
        example = f"for example -o {key}={_EXAMPLES.get(key, allowed.start)}"
        cause = f"not a number from {allowed.start} to {allowed.stop - 1}"
        raise _invalid(key, value, cause, example)
    return int(value)


def _switch(key: str, value: str) -> bool:
    if value.lower() not in _SWITCH:
        raise _invalid(key, value, "neither on nor off", f"for example -o {key}=off")
    return _SWITCH[value.lower()]


def balance(options: Mapping[str, str]) -> str:
    """How a network's VIPs are balanced: one of `BALANCES`. Raises InvalidRequest."""
    value = options.get("balance", EVEN)
    if value.lower() not in BALANCES:
        cause = f"not one of {', '.join(BALANCES)}"
        raise _invalid("balance", value, cause, "for example -o balance=local")
    return value.lower()


def _ipv6(value: str) -> tuple[bool, IPv6Network | None]:
    """Whether the network has IPv6, and the prefix that the user chose, if any."""
    if value.lower() in _SWITCH:
        return _SWITCH[value.lower()], None
    try:
        prefix = IPv6Network(value)
    except ValueError as error:
        cause = f"neither on nor off nor an IPv6 prefix ({error})"
        example = "for example -o ipv6=on or -o ipv6=fd00:1:2:3::/64"
        raise _invalid("ipv6", value, cause, example) from error
    if prefix.prefixlen != 64:
        example = f"for example -o ipv6={prefix.network_address}/64"
        raise _invalid("ipv6", value, "not a /64", example)
    if not (prefix.is_global or prefix.is_private) or prefix.is_link_local or prefix.is_multicast:
        cause = "hosts can't have addresses of this kind"
        raise _invalid("ipv6", value, cause, "for example -o ipv6=fd00:1:2:3::/64")
    return True, prefix


def _prefix6(value: str) -> IPv6Network:
    try:
        network = IPv6Network(value)
        if network.prefixlen != 64:
            raise ValueError("not a /64")
    except ValueError as error:
        remedy = "remove it, it is chosen by FreeFlow"
        raise _invalid(PREFIX6, value, str(error), remedy) from error
    return network


def _known() -> str:
    return ", ".join(f"{key} ({meaning})" for key, meaning in USER_KEYS.items())


def _refuse_unknown(options: Mapping[str, str]) -> None:
    unknown = sorted(
        key
        for key in options
        if key not in USER_KEYS
        and key != MTU_ALIAS
        and not key.startswith(ENGINE_PREFIXES)
        # An allocation, perhaps by a later version, wrote these if it wrote a format.
        and not (key.startswith(OWN_PREFIX) and FORMAT in options)
    )
    if not unknown:
        return
    if unknown[0].startswith(OWN_PREFIX):
        raise InvalidRequest(
            f"option {', '.join(unknown)}",
            cause=f"chosen by FreeFlow, not by the user; networks have: {_known()}",
            remedy="for example -o mtu=9000",
        )
    hints = "".join(f" ({HINTS[key]})" for key in unknown if key in HINTS)
    raise InvalidRequest(
        f"unknown option {', '.join(unknown)}{hints}",
        cause=f"FreeFlow networks have: {_known()}",
        remedy="for example -o mtu=9000",
    )


def _mtu(options: Mapping[str, str]) -> int | None:
    given = {
        key: _integer(key, options[key], MTU_RANGE) for key in ("mtu", MTU_ALIAS) if key in options
    }
    if len(set(given.values())) > 1:
        raise InvalidRequest(
            f"options mtu={options['mtu']} and {MTU_ALIAS}={options[MTU_ALIAS]}",
            cause="they contradict each other",
            remedy="give one",
        )
    return given.get("mtu", given.get(MTU_ALIAS))


def _number(options: Mapping[str, str], key: str, allowed: range) -> int | None:
    return _integer(key, options[key], allowed) if key in options else None


def upgrade_operations(options: Mapping[str, str]) -> int | None:
    """The network's own number; None: the host's holds. Raises InvalidRequest."""
    return _number(options, "upgrade_operations", UPGRADE_RANGE)


def ebpf(options: Mapping[str, str]) -> bool:
    """Whether a network's packets may take the eBPF fast path. Raises InvalidRequest."""
    return _switch("ebpf", options.get("ebpf", "on"))


def encrypted(options: Mapping[str, str]) -> bool:
    """Whether what leaves the host is encrypted. Raises InvalidRequest.

    An empty value is on, as with Docker's overlay (`--opt encrypted`).
    """
    return _switch(ENCRYPTED, options.get(ENCRYPTED, "off") or "on")


def rdma(options: Mapping[str, str]) -> bool:
    """Whether connections of a network may move to RDMA. Raises InvalidRequest."""
    return _switch("rdma", options.get("rdma", "on"))


def relay(options: Mapping[str, str]) -> bool:
    """Whether connections of a network may move to TCP between relays. Raises InvalidRequest."""
    return _switch("relay", options.get("relay", "on"))


def verbs(options: Mapping[str, str]) -> bool:
    """Whether a network carries queue pairs of RDMA verbs. Raises InvalidRequest."""
    return _switch("verbs", options.get("verbs", "on"))


def verbs_direct(options: Mapping[str, str]) -> bool:
    """Whether peers of a network may map each other's registered memory. Raises InvalidRequest."""
    return _switch("verbs_direct", options.get("verbs_direct", "off"))


def parse(options: Mapping[str, str]) -> NetworkOptions:
    """Check the options of a network.

    Raises:
        InvalidRequest: an unknown key, an invalid value, or a format of a later version.
    """
    own_format = _number(options, FORMAT, range(1, 1 << 16))
    if own_format is not None and own_format > SPOKEN:
        cause = f"allocated by a later FreeFlow, this host's speaks {SPOKEN}"
        remedy = "upgrade the plugin on this host (docker plugin upgrade)"
        raise _invalid(FORMAT, str(own_format), cause, remedy)
    _refuse_unknown(options)
    ipv6, prefix6 = _ipv6(options.get("ipv6", "off"))
    return NetworkOptions(
        mtu=_mtu(options),
        vni=_number(options, "vni", VNI_RANGE),
        ipv6=ipv6,
        prefix6=prefix6,
        acceleration=_switch("acceleration", options.get("acceleration", "on")),
        rdma=rdma(options),
        relay=relay(options),
        verbs=verbs(options),
        verbs_direct=verbs_direct(options),
        ebpf=ebpf(options),
        encrypted=encrypted(options),
        balance=balance(options),
        upgrade_operations=upgrade_operations(options),
        own_format=own_format,
        own_vni=_number(options, VNI, VNI_RANGE),
        own_port=_number(options, PORT, PORT_RANGE),
        own_mtu=_number(options, MTU, MTU_RANGE),
        own_prefix6=_prefix6(options[PREFIX6]) if PREFIX6 in options else None,
    )


def parse_endpoint(options: Mapping[str, object]) -> IPv6Address | None:
    """Check the options of an endpoint (`--network name=n,driver-opt=…`); returns the IPv6 address,
    if any.

    Raises:
        InvalidRequest: a key that is neither ours nor the engine's, or an invalid address.
    """
    unknown = sorted(key for key in options if key != IP6 and not key.startswith(ENDPOINT_PREFIX))
    if unknown:
        raise InvalidRequest(
            f"unknown driver-opt {', '.join(unknown)}",
            cause=f"containers have {IP6} (IPv6 address)",
            remedy=f"remove it (options of a network are: {_known()})",
        )
    if IP6 not in options:
        return None
    try:
        return IPv6Address(str(options[IP6]))
    except ValueError as error:
        raise InvalidRequest(
            f"driver-opt {IP6}={options[IP6]}",
            cause=str(error),
            remedy=f"for example driver-opt={IP6}=fd00:1:2:3::1:5",
        ) from error
