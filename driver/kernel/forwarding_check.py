"""Whether a container passes on to another of its networks what is addressed to itself.

Packets that aren't cut yet keep the mark of a tunnel when the fast path takes their header off. Who consumes them never
sees it; but a device that they are sent on by may take it at its word. So what a container may pass on reaches it the
kernel's own way. What isn't addressed to itself does that anyway.

What is read here a container may have written: it is asked for by netlink, little of it is decoded, and a container with
more than is worth reading passes on.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Final

from driver.kernel import netfilter, nf_tables
from driver.kernel.namespace import in_netns
from driver.kernel.nf_tables import Chain
from driver.kernel.nlmsg import attributes

_IPVS: Final = Path("/proc/thread-self/net/ip_vs")
_IPVS_HEAD: Final = 3
"""Lines before the first service."""
_LEGACY: Final = Path("/proc/thread-self/net/ip_tables_names")
_HEAD: Final = 4096
"""Bytes of such a file that are read."""
_OWN: Final = (netfilter.IPV4, b"freeflow")
"""Our VIPs: of what the container itself sends."""
_TRIES: Final = 3
"""So often rules are listed that change meanwhile."""
_FEW: Final = 64
"""Chains, and rules of a chain, that are looked through. Docker has one of each."""


def may_forward(sandbox: Path | int) -> bool:
    """Whether it may: it has rules that rewrite addresses of what comes, or of what goes on.

    Raises:
        KernelError: the namespace can't be entered.
    """
    return in_netns(sandbox, _look)


def _look() -> bool:
    if len(_lines(_IPVS)) > _IPVS_HEAD or "nat" in _lines(_LEGACY):
        return True
    for _ in range(_TRIES):
        try:
            return _rewrites()
        except netfilter.InterruptedDumpError:
            continue
        except (OSError, OverflowError, ValueError):
            break
    return True


def _lines(path: Path) -> list[str]:
    try:
        with path.open(errors="replace") as file:
            return file.read(_HEAD).splitlines()
    except OSError:
        return []


def _rewrites() -> bool:
    """Whether there are rules that do, or that hand packets from device to device."""
    suspects = []
    for chain in nf_tables.chains():
        if chain.family == nf_tables.NETDEV:
            return True
        if (
            (chain.family, chain.table) != _OWN
            and chain.kind == b"nat"
            and chain.hook in (nf_tables.PREROUTING, nf_tables.POSTROUTING)
        ):
            suspects.append(chain)
    return len(suspects) > _FEW or any(_has_rules(chain) for chain in suspects)


def _has_rules(chain: Chain) -> bool:
    """Whether it has others than Docker's own."""
    return any(
        number >= _FEW or not is_of_dns(rule) for number, rule in enumerate(nf_tables.rules(chain))
    )


def is_of_dns(rule: list[tuple[bytes, dict[int, bytes]]]) -> bool:
    """Whether it is Docker's own, for its name server at 127.0.0.11: such packets go nowhere."""
    return any(
        _is_destination(loaded) and _is_loopback(compared)
        for loaded, compared in itertools.pairwise(rule)
    )


def _is_destination(expression: tuple[bytes, dict[int, bytes]]) -> bool:
    name, parts = expression
    where = tuple(int.from_bytes(parts.get(key, b""), "big") for key in (2, 3, 4))
    return name == b"payload" and where == (1, 16, 4)


def _is_loopback(expression: tuple[bytes, dict[int, bytes]]) -> bool:
    name, parts = expression
    if name != b"cmp" or parts.get(2) != bytes(4):
        return False
    value = dict(attributes(parts.get(3, b""))).get(1, b"")
    return len(value) == 4 and value[0] == 127
