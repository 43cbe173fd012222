"""The plugin's settings: what `docker plugin set` can change, each with its default here.

The defaults must be in code: an upgrade keeps the old settings and doesn't add new ones, so a new setting is absent then.
`config.json` lists the same; a test holds them together. Bad settings are collected, not fatal: a plugin that dies at
start is disabled by Docker without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Final

from driver.errors import SettingError
from driver.options import MTU_RANGE, PORT_RANGE

PLUGIN: Final = "freeflow:latest"
LEAST_KEY: Final = 32
"""Characters: a key that can be guessed opens every host's router."""
MOST_KEY: Final = 512
HIDDEN: Final = "(not shown)"


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `parse` raises ValueError with what would be right."""

    name: str
    default: str
    description: str
    parse: Callable[[str], Any]
    secret: bool = False
    """Its value is never shown."""


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be {' or '.join(allowed)}")
        return text

    return parse


def _number(text: str) -> int:
    """-1 if it is none. Not int(): it takes "4_799", "+4799" and digits of other scripts."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else -1


def _whole(allowed: range, *, optional: bool = False) -> Callable[[str], int | None]:
    def parse(text: str) -> int | None:
        if not text and optional:
            return None
        if _number(text) not in allowed:
            raise ValueError(f"must be a whole number from {allowed.start} to {allowed.stop - 1}")
        return int(text)

    return parse


def _seconds(least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not least <= value <= most:
            raise ValueError(f"must be seconds from {least:g} to {most:g}")
        return value

    return parse


def _listen(text: str) -> tuple[str, int] | None:
    if not text:
        return None
    host, _, port = text.rpartition(":")
    number = _number(port)
    try:
        address = ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        number = -1
    else:
        if (address.version == 6) != (host.startswith("[") and host.endswith("]")):
            number = -1
    if number not in PORT_RANGE:
        raise ValueError("must be ADDRESS:PORT, for example 127.0.0.1:9477 or [::1]:9477")
    return str(address), number


def _power(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = _number(text)
        if not least <= number <= most or number & (number - 1):
            raise ValueError(f"must be a power of two from {least} to {most}")
        return number

    return parse


def _key(text: str) -> str:
    if text and not (LEAST_KEY <= len(text) <= MOST_KEY and text.isascii() and text.isprintable()):
        raise ValueError(
            f"must be {LEAST_KEY} to {MOST_KEY} printable characters, the same on all hosts: openssl rand -hex 32"
        )
    return text


def _underlay(text: str) -> str:
    if text and (
        len(text) > 45 or any(character.isspace() or character == "/" for character in text)
    ):
        raise ValueError("must be an interface or an address of this host")
    return text


SETTINGS: Final = (
    Setting(
        "SCOPE",
        "global",
        "global: networks of the Swarm; local: of this host alone, outside a Swarm",
        _choice("global", "local"),
    ),
    Setting("VXLAN_PORT", "4799", "UDP port of the overlay on the underlay", _whole(PORT_RANGE)),
    Setting(
        "UNDERLAY",
        "",
        "interface or address that carries the overlay; empty: what Docker advertises",
        _underlay,
    ),
    Setting(
        "MTU",
        "",
        "MTU of new networks that set none; empty: from the underlay",
        _whole(MTU_RANGE, optional=True),
    ),
    Setting(
        "METRICS_ADDR",
        "",
        "ADDRESS:PORT that serves Prometheus metrics; empty: off",
        _listen,
    ),
    Setting(
        "LOG_LEVEL",
        "info",
        "debug, info, warning or error",
        _choice("debug", "info", "warning", "error"),
    ),
    Setting(
        "SYNC_INTERVAL",
        "0.5",
        "seconds between two looks at peers and services",
        _seconds(0.1, 60),
    ),
    Setting(
        "REQUEST_DEADLINE",
        "10",
        "seconds after which a request of Docker is answered with an error",
        _seconds(1, 300),
    ),
    Setting(
        "ACCELERATION",
        "on",
        "on or off: whether connections between containers may move to shared memory, and to RDMA",
        _choice("on", "off"),
    ),
    Setting(
        "EBPF",
        "on",
        "on or off: whether packets of the overlay may take the eBPF fast path",
        _choice("on", "off"),
    ),
    Setting(
        "RDMA",
        "on",
        "on or off: whether connections to containers of other hosts may move to RDMA",
        _choice("on", "off"),
    ),
    Setting(
        "SESSION_PORT",
        "",
        "TCP port on which the hosts' routers speak with each other; empty: the number of VXLAN_PORT",
        _whole(PORT_RANGE, optional=True),
    ),
    Setting(
        "SESSION_KEY",
        "",
        "secret of the hosts that share networks, in place of the Swarm's certificates; empty: those",
        _key,
        secret=True,
    ),
    Setting(
        "REMOTE_RING",
        "262144",
        "bytes that may be under way in one direction of a connection over RDMA, a power of two",
        _power(64 << 10, 2 << 20),
    ),
    Setting(
        "REMOTE_MEMORY",
        "1073741824",
        "bytes of memory that connections over RDMA may have altogether; more stay on the overlay",
        _whole(range(10**11)),
    ),
    Setting(
        "UPGRADE_OPERATIONS",
        "4",
        "reads and writes after which a connection moves, if UPGRADE_AGE and UPGRADE_BYTES are reached too",
        _whole(range(1, 1 << 31)),
    ),
    Setting(
        "UPGRADE_AGE",
        "10000",
        "microseconds since it began after which a connection moves",
        _whole(range(1 << 31)),
    ),
    Setting(
        "UPGRADE_BYTES",
        "0",
        "bytes, of both directions together, after which a connection moves",
        _whole(range(1 << 31)),
    ),
    Setting(
        "UPGRADE_BULK",
        "1048576",
        "bytes after which a connection moves whatever the other rules say",
        _whole(range(1, 1 << 31)),
    ),
    Setting(
        "SPIN",
        "50",
        "microseconds to look for a message before sleeping, while the peer runs on another core",
        _whole(range(1001)),
    ),
    Setting(
        "RING_LIMIT",
        "4194304",
        "bytes that may be under way in one direction of a connection",
        _whole(range(4096, (4 << 20) + 1)),
    ),
    Setting(
        "SHM_LIMIT",
        "1073741824",
        "bytes of shared memory that one container may have in use; more connections stay on TCP",
        _whole(range(10**11)),
    ),
    Setting(
        "CONNECTIONS_LIMIT",
        "16384",
        "connections of one container in shared memory, and as many that wait for it",
        _whole(range(1 << 20)),
    ),
    Setting(
        "PROCESSES_LIMIT",
        "2048",
        "processes of one container that may speak with the router",
        _whole(range(1 << 16)),
    ),
    Setting(
        "ASKS_LIMIT",
        "5000",
        "connections per second for which one container may ask",
        _whole(range(1, 1 << 20)),
    ),
    Setting(
        "BELLS_LIMIT",
        "16384",
        "wake-up descriptors of one container that the router keeps",
        _whole(range(1 << 20)),
    ),
)

# What the runtime gives every process; all else in a plugin's environment is a setting.
_FOREIGN: Final = ("PATH", "HOME", "HOSTNAME", "TERM", "LANG", "PWD", "SHLVL", "_")
_FOREIGN_PREFIXES: Final = ("LC_", "PYTHON", "GUNICORN_")


@dataclass(frozen=True, slots=True)
class Settings:
    """Checked settings; units as in `SETTINGS`."""

    scope: str = "global"
    vxlan_port: int = 4799
    underlay: str = ""
    mtu: int | None = None
    metrics_addr: tuple[str, int] | None = None
    log_level: str = "info"
    sync_interval: float = 0.5
    request_deadline: float = 10.0
    acceleration: str = "on"
    ebpf: str = "on"
    rdma: str = "on"
    session_port: int | None = None
    session_key: str = field(default="", repr=False)
    remote_ring: int = 256 << 10
    remote_memory: int = 1 << 30
    upgrade_operations: int = 4
    upgrade_age: int = 10_000
    upgrade_bytes: int = 0
    upgrade_bulk: int = 1 << 20
    spin: int = 50
    ring_limit: int = 4 << 20
    shm_limit: int = 1 << 30
    connections_limit: int = 16384
    processes_limit: int = 2048
    asks_limit: int = 5000
    bells_limit: int = 16384


def _mend(name: str, value: str) -> str:
    return (
        f"docker plugin disable -f {PLUGIN} && docker plugin set {PLUGIN} {name}={value} && "
        f"docker plugin enable {PLUGIN}"
    )


def read(environment: Mapping[str, str]) -> tuple[Settings, tuple[SettingError, ...]]:
    """The settings in an environment, defaults in place of bad ones, and what is wrong, each with what mends it."""
    values: dict[str, Any] = {}
    errors = []
    for setting in SETTINGS:
        text = environment.get(setting.name, setting.default)
        try:
            values[setting.name.lower()] = setting.parse(text.strip())
        except ValueError as error:
            values[setting.name.lower()] = setting.parse(setting.default)
            shown = HIDDEN if setting.secret else text[:80]
            errors.append(
                SettingError(
                    f"setting {setting.name}={shown}",
                    cause=str(error),
                    remedy=_mend(setting.name, setting.default),
                )
            )
    known = {setting.name for setting in SETTINGS}
    for name in sorted(environment):
        if name not in known and name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES):
            errors.append(
                SettingError(
                    f"setting {name[:80]} is unknown; FreeFlow has {', '.join(sorted(known))}",
                    remedy="after a downgrade it stays until the plugin is installed anew: "
                    f"docker plugin rm -f {PLUGIN}, then docker plugin install",
                )
            )
    return Settings(**values), tuple(errors)
