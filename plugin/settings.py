"""The plugin's settings: what `docker plugin set` can change.

Each is described once, as a field of `Settings`: its values, default and text. `config.json` and
the tables of docs/options.md are generated from that (`make settings`), and a test compares them.

The defaults must be in code: an upgrade keeps the old settings and doesn't add new ones, so a new
setting is absent then. Bad settings are collected and not fatal: Docker silently disables a plugin
that dies at start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from ipaddress import ip_address
from typing import Any, Final, Generic, TypeVar

from dataplane import control
from driver.errors import SettingError
from driver.options import MTU_RANGE, PORT_RANGE

T = TypeVar("T")

PLUGIN: Final = "freeflow:latest"
RESTART: Final = f"docker plugin disable -f {PLUGIN} && docker plugin enable {PLUGIN}"
LEAST_KEY: Final = 32
"""Characters: a key that can be guessed opens every host's router."""
MOST_KEY: Final = 512
HIDDEN: Final = "(not shown)"

_ROUTER: Final = control.RouterSettings()
_KEY_LENGTH: Final = f"{LEAST_KEY} to {MOST_KEY} printable characters"


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """The values that a setting can have. `parse` raises ValueError with what would be right."""

    parse: Callable[[str], T]
    values: str
    """For people."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    `text` says what it does, `details` is for the documentation alone; both are Markdown.
    `empty` is the meaning of an empty value. `tuning`: few users, if any, need to change it. The
    value of a `secret` is never shown.
    """

    kind: Kind[Any]
    default: str
    text: str
    empty: str = ""
    details: str = ""
    tuning: bool = False
    secret: bool = False
    name: str = ""

    @property
    def description(self) -> str:
        """In plain text."""
        text = f"{self.text}; empty: {self.empty}" if self.empty else self.text
        return text.replace("`", "")


def _setting(kind: Kind[T], default: object, text: str, **rest: Any) -> T:
    """The field of a setting."""
    found = Setting(kind, str(default), text, **rest)
    value = kind.parse(found.default)
    # dataclasses.field claims to return the type of its default.
    return field(default=value, repr=not found.secret, metadata={"setting": found})


def _choice(*allowed: str) -> Kind[str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be {' or '.join(allowed)}")
        return text

    return Kind(parse, ", ".join(f"`{word}`" for word in allowed))


def _number(text: str) -> int:
    """-1 if it is none. Not int(): it takes "4_799", "+4799" and digits of other scripts."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else -1


def _whole(least: int, most: int) -> Kind[int]:
    def parse(text: str) -> int:
        number = _number(text)
        if not least <= number <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return number

    return Kind(parse, f"{least} to {most}")


def _optional(kind: Kind[T]) -> Kind[T | None]:
    return Kind(lambda text: kind.parse(text) if text else None, kind.values)


def _seconds(least: float, most: float) -> Kind[float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not least <= value <= most:
            raise ValueError(f"must be seconds from {least:g} to {most:g}")
        return value

    return Kind(parse, f"{least:g} to {most:g}")


def _power(least: int, most: int) -> Kind[int]:
    def parse(text: str) -> int:
        number = _number(text)
        if not least <= number <= most or number & (number - 1):
            raise ValueError(f"must be a power of two from {least} to {most}")
        return number

    return Kind(parse, f"a power of two, {least} to {most}")


def _parse_address(text: str) -> tuple[str, int]:
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


def _parse_key(text: str) -> str:
    if text and not (LEAST_KEY <= len(text) <= MOST_KEY and text.isascii() and text.isprintable()):
        raise ValueError(f"must be {_KEY_LENGTH}: openssl rand -hex 32")
    return text


def _parse_underlay(text: str) -> str:
    if text and (
        len(text) > 45 or any(character.isspace() or character == "/" for character in text)
    ):
        raise ValueError("must be an interface or an address of this host")
    return text


def _parse_rotation(text: str) -> int:
    number = _number(text)
    if number != 0 and not 60 <= number <= 31536000:
        raise ValueError("must be 0, or a whole number from 60 to 31536000")
    return number


_PORT: Final = _whole(PORT_RANGE.start, PORT_RANGE.stop - 1)
_BYTES: Final = _whole(0, 10**11 - 1)
_SWITCH: Final = _choice("on", "off")


@dataclass(frozen=True, slots=True)
class Settings:
    """Checked settings. Bytes, seconds and microseconds as their texts say."""

    scope: str = _setting(
        _choice("global", "local"),
        "global",
        "`global`: networks of the Swarm; `local`: networks of this host alone, outside a Swarm",
    )
    vxlan_port: int = _setting(
        _PORT,
        4799,
        "UDP port of the overlay on the underlay",
        details="The manager's value is used for each new network.",
    )
    underlay: str = _setting(
        Kind(_parse_underlay, "an interface or an address"),
        "",
        "interface or address that carries the overlay",
        empty="the address that Docker advertises",
        details="Docker advertises `--data-path-addr`, or else `--advertise-addr`.",
    )
    mtu: int | None = _setting(
        _optional(_whole(MTU_RANGE.start, MTU_RANGE.stop - 1)),
        "",
        "MTU of new networks that don't set one",
        empty="derived from the underlay",
    )
    metrics_addr: tuple[str, int] | None = _setting(
        _optional(Kind(_parse_address, "`ADDRESS:PORT`")),
        "",
        "`ADDRESS:PORT` that serves Prometheus metrics, and the live page of this host",
        empty="off",
        details="For example `127.0.0.1:9477`. See [Monitoring](monitoring.md) and "
        "[The page](ui.md).",
    )
    ui_token: str = _setting(
        Kind(_parse_key, _KEY_LENGTH),
        "",
        "secret that a browser has to know for the live page",
        empty="the page is served on loopback addresses alone, without a secret",
        details="`openssl rand -hex 32` makes one. See [The page](ui.md).",
        secret=True,
    )
    log_level: str = _setting(
        _choice("debug", "info", "warning", "error"),
        "info",
        "least severity of logged events: debug, info, warning or error",
        details="The log is dockerd's (`journalctl -u docker`).",
    )
    sync_interval: float = _setting(
        _seconds(0.1, 60),
        0.5,
        "seconds between two refreshes of the peers and services of networks in use",
        tuning=True,
    )
    request_deadline: float = _setting(
        _seconds(1, 300),
        10,
        "seconds after which a request of Docker is answered with an error",
        tuning=True,
    )
    acceleration: str = _setting(
        _SWITCH,
        "on",
        "`off`: no connection of this host moves to shared memory, RDMA or the relays; "
        "[the runtime](runtime.md) adds no library",
    )
    other_networks: str = _setting(
        _SWITCH,
        "off",
        "`on`: connections on networks of Docker's own drivers move to shared memory, RDMA or the "
        "relays too, unless the network has the label `freeflow.accelerate=off`",
        details="`off`: only on those with the label `freeflow.accelerate=on` or `trust`. Networks "
        "of other plugins need it in any case. See [Other networks](other-networks.md).",
    )
    ebpf: str = _setting(
        _SWITCH,
        "on",
        "`off`: all packets stay on the kernel path",
        details="See [The fast path](fast-path.md).",
    )
    encrypted: str = _setting(
        _SWITCH,
        "off",
        "`on`: new networks are encrypted between hosts, unless they have `-o encrypted=off`",
        details="The manager's value is used. See [Encrypted networks](encryption.md).",
    )
    encryption_port: int = _setting(
        _whole(PORT_RANGE.start, PORT_RANGE.stop - 2),
        4797,
        "UDP port of encrypted packets on the underlay; the next one is used too",
        details="The hosts tell each other their ports.",
    )
    encryption_rotation: int = _setting(
        Kind(_parse_rotation, "0, or 60 to 31536000"),
        86400,
        "seconds after which this host changes the key of its encrypted networks; `0`: never",
        tuning=True,
    )
    rdma_encrypted: str = _setting(
        _SWITCH,
        "off",
        "`on`: the RDMA devices of all hosts encrypt by themselves, so connections on encrypted "
        "networks may move to RDMA",
    )
    rdma: str = _setting(
        _SWITCH,
        "on",
        "`off`: no connection to a container of another host moves to RDMA, and queue pairs of "
        "[verbs](verbs.md) with other hosts don't use it",
        details="Both can still use TCP between the relays, and shared memory within the host. See "
        "[RDMA](rdma.md).",
    )
    relay: str = _setting(
        _SWITCH,
        "on",
        "`off`: no connection to a container of another host moves to TCP between the relays, and "
        "queue pairs of [verbs](verbs.md) don't use it: without RDMA they reach this host only",
        details="See [TCP between relays](relay.md).",
    )
    verbs: str = _setting(
        _SWITCH,
        "on",
        "`off`: programs in containers find no device for RDMA verbs",
        details="See [RDMA verbs](verbs.md).",
    )
    verbs_zero_copy: str = _setting(
        _SWITCH,
        "off",
        "`on`: RDMA devices write between registered memory of containers on two hosts, without the "
        "rings, on networks with `verbs_direct`",
        details="Both hosts need it. See [RDMA verbs](verbs.md#zero-copy-between-hosts).",
    )
    session_port: int | None = _setting(
        _optional(_PORT),
        "",
        "TCP port of the sessions between the hosts' routers, the same on all hosts",
        empty="the number of `VXLAN_PORT`",
        details="Only hosts that share a network connect to it.",
    )
    session_key: str = _setting(
        Kind(_parse_key, _KEY_LENGTH),
        "",
        "secret with which the hosts' routers authenticate each other, the same on all hosts",
        empty="the Swarm's certificates",
        details="`openssl rand -hex 32` makes one. FreeFlow never shows it, but whoever may run "
        "`docker plugin inspect` can read it.",
        secret=True,
    )
    remote_ring: int = _setting(
        _power(64 << 10, 2 << 20),
        _ROUTER.remote_ring,
        "bytes in flight in one direction of a connection over RDMA",
        details="Two hosts use the smaller of their values.",
        tuning=True,
    )
    remote_memory: int = _setting(
        _BYTES,
        _ROUTER.remote_memory,
        "bytes of memory for all connections over RDMA; at the limit, new ones stay on the overlay",
        details="The memory is locked, so that the device can reach it.",
    )
    relay_spin: int = _setting(
        _whole(0, 1000),
        _ROUTER.relay_spin,
        "microseconds for which a relay without an RDMA device waits for more before it sleeps, and "
        "lets others run meanwhile, on hosts with two processor cores or more",
        details="See [TCP between relays](relay.md#the-rule).",
        tuning=True,
    )
    relay_busy: int = _setting(
        _whole(1, 10**6),
        _ROUTER.relay_rule.busy,
        "messages per second from which a connection counts as busy, for the relays' TCP",
        details="This and the following ones are the numbers of [a rule](relay.md#the-rule).",
        tuning=True,
    )
    relay_connections: int = _setting(
        _whole(1, 4096),
        _ROUTER.relay_rule.connections,
        "busy connections of two processes, in their harmonic mean, from which they go over the "
        "relays' TCP",
        tuning=True,
    )
    relay_messages: int = _setting(
        _whole(0, 10**8),
        _ROUTER.relay_rule.messages,
        "messages per second of two processes with each other from which they go over the relays' "
        "TCP",
        tuning=True,
    )
    relay_bulk: int = _setting(
        _whole(1, 1 << 30),
        _ROUTER.relay_rule.bulk,
        "bytes of a message, on average, from which a connection carries bulk data",
        tuning=True,
    )
    relay_bulk_rate: int = _setting(
        _whole(1, 10**11 - 1),
        _ROUTER.relay_rule.bulk_rate,
        "bytes per second from which a connection carries bulk data",
        tuning=True,
    )
    relay_batch: int = _setting(
        _whole(0, 64),
        _ROUTER.relay_rule.batch,
        "connections per wake-up of a process, and blocks per message between relays: with fewer "
        "of both, connections go back to TCP on the overlay",
        tuning=True,
    )
    relay_pause: int = _setting(
        _whole(1, 86400),
        _ROUTER.relay_rule.pause,
        "seconds until connections that went back may come again; doubled each time",
        tuning=True,
    )
    relay_pause_most: int = _setting(
        _whole(1, 86400),
        _ROUTER.relay_rule.pause_most,
        "the longest such pause, in seconds",
        tuning=True,
    )
    relay_cpu: int = _setting(
        _whole(1, 100),
        _ROUTER.relay_rule.cpu,
        "percent of one processor that the relay may use for one container",
        details="Nor more than the container's own `--cpus`.",
    )
    relay_ring: int = _setting(
        _power(64 << 10, 2 << 20),
        _ROUTER.relay_ring,
        "bytes in flight in one direction of a connection over TCP between the relays",
        details="Two hosts use the smaller of their values. Only what is used costs memory.",
        tuning=True,
    )
    relay_encryption: str = _setting(
        _choice("messages", "all", "off"),
        _ROUTER.relay_encryption,
        "what the relays encrypt on TCP: `messages`, all but bulk data; `all`; `off`, nothing but "
        "their own control data",
        details="Two hosts use the stricter of their values. Whatever it is, the relays "
        "authenticate each other.",
    )
    upgrade_operations: int = _setting(
        _whole(1, (1 << 31) - 1),
        _ROUTER.rule.operations,
        "reads and writes after which a connection moves, once `UPGRADE_AGE` and `UPGRADE_BYTES` "
        "are reached too",
        tuning=True,
    )
    upgrade_age: int = _setting(
        _whole(0, (1 << 31) - 1),
        _ROUTER.rule.age,
        "microseconds of a connection's life after which it moves",
        tuning=True,
    )
    upgrade_bytes: int = _setting(
        _whole(0, (1 << 31) - 1),
        _ROUTER.rule.bytes,
        "bytes in both directions together after which a connection moves",
        tuning=True,
    )
    upgrade_bulk: int = _setting(
        _whole(1, (1 << 31) - 1),
        _ROUTER.rule.bulk,
        "bytes after which a connection moves whatever the other rules say",
        tuning=True,
    )
    spin: int = _setting(
        _whole(0, 1000),
        _ROUTER.rule.spin,
        "microseconds for which a reader spins before it sleeps, while its peer runs on another "
        "core",
        details="`0`: it never spins.",
        tuning=True,
    )
    ring_limit: int = _setting(
        _whole(4096, control.DEFAULT_RING_LIMIT),
        _ROUTER.rule.ring_limit,
        "bytes in flight in one direction of a connection in shared memory",
        tuning=True,
    )
    shm_limit: int = _setting(
        _BYTES,
        _ROUTER.limits.memory,
        "bytes of shared memory that one container may use; at the limit, new connections stay on "
        "TCP",
        details="At most half of it is for connections with any one other container.",
    )
    connections_limit: int = _setting(
        _whole(0, (1 << 20) - 1),
        _ROUTER.limits.connections,
        "connections of one container in shared memory, and as many that wait for their peer",
        tuning=True,
    )
    processes_limit: int = _setting(
        _whole(0, (1 << 16) - 1),
        _ROUTER.limits.processes,
        "processes of one container that may connect to the router",
        tuning=True,
    )
    asks_limit: int = _setting(
        _whole(1, (1 << 20) - 1),
        _ROUTER.limits.asks,
        "requests for shared memory per second of one container",
        tuning=True,
    )
    bells_limit: int = _setting(
        _whole(0, (1 << 20) - 1),
        _ROUTER.limits.bells,
        "bells (sockets for waking threads) of one container that the router keeps",
        tuning=True,
    )
    verbs_qps: int = _setting(
        _whole(0, (1 << 16) - 1),
        _ROUTER.limits.queue_pairs,
        "queue pairs of verbs of one container that are connected, or wait for their peer",
        details="A process has 4096 of them at most. Each counts as a connection, too.",
        tuning=True,
    )
    verbs_memory: int = _setting(
        _BYTES,
        _ROUTER.limits.direct_memory,
        "bytes of registered memory of one container that peers on its host may map, on networks "
        "with `verbs_direct`",
        tuning=True,
    )


SETTINGS: Final[tuple[Setting, ...]] = tuple(
    replace(item.metadata["setting"], name=item.name.upper()) for item in fields(Settings)
)

# What the runtime gives every process; all else in a plugin's environment is a setting.
_FOREIGN: Final = ("PATH", "HOME", "HOSTNAME", "TERM", "LANG", "PWD", "SHLVL", "_")
_FOREIGN_PREFIXES: Final = ("LC_", "PYTHON", "GUNICORN_")


def correction(name: str, value: str) -> str:
    """The commands that give a setting a value."""
    return (
        f"docker plugin disable -f {PLUGIN} && docker plugin set {PLUGIN} {name}={value} && "
        f"docker plugin enable {PLUGIN}"
    )


def read(environment: Mapping[str, str]) -> tuple[Settings, tuple[SettingError, ...]]:
    """The settings in an environment, with defaults in place of bad ones, and what is wrong."""
    values: dict[str, Any] = {}
    errors = []
    for setting in SETTINGS:
        text = environment.get(setting.name, setting.default)
        try:
            values[setting.name.lower()] = setting.kind.parse(text.strip())
        except ValueError as error:
            shown = HIDDEN if setting.secret else text[:80]
            errors.append(
                SettingError(
                    f"setting {setting.name}={shown}",
                    cause=str(error),
                    remedy=correction(setting.name, setting.default),
                )
            )
    known = {setting.name for setting in SETTINGS}
    errors += [
        SettingError(
            f"setting {name[:80]} is unknown",
            cause=f"FreeFlow has {', '.join(sorted(known))}",
            remedy="after a downgrade it stays until the plugin is installed anew: "
            f"docker plugin rm -f {PLUGIN}, then docker plugin install",
        )
        for name in sorted(environment)
        if name not in known and name not in _FOREIGN and not name.startswith(_FOREIGN_PREFIXES)
    ]
    return Settings(**values), tuple(errors)
