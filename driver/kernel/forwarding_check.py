"""Detects containers that forward packets addressed to themselves (DNAT, masquerade, IPVS).

GSO packets keep their tunnel GSO type when the fast path decapsulates them. A program that receives
such a packet never notices, but a device through which the container forwards it may rely on the
type. So packets for such a container take the kernel path. Packets that aren't addressed to the
container take it in any case.

A container may have written what is read here. So it is read by netlink, little of it is decoded,
and a container with too many rules counts as forwarding.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Final

from dataplane.nlmsg import attributes
from driver.kernel import netfilter, nf_tables
from driver.kernel.namespace import in_netns
from driver.kernel.nf_tables import Chain

_IPVS: Final = Path("/proc/thread-self/net/ip_vs")
_IPVS_HEAD: Final = 3
"""Lines before the first service."""
_LEGACY: Final = Path("/proc/thread-self/net/ip_tables_names")
_HEAD: Final = 4096
"""Bytes that are read of such a file."""
_OWN: Final = (netfilter.IPV4, b"freeflow")
"""Our VIP rules, which concern packets that the container itself sends."""
_TRIES: Final = 3
"""Attempts to list rules that change meanwhile."""
_FEW: Final = 64
"""Chains, and rules of a chain, that are checked. Docker has one of each."""


def may_forward(sandbox: Path | int) -> bool:
    """Whether it has rules that rewrite addresses of received or forwarded packets.

    Raises:
        KernelError: the namespace can't be entered.
    """
    return in_netns(sandbox, _check)


def _check() -> bool:
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
    """Whether there are such rules, or rules that move packets between devices."""
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
    """Whether a chain has rules other than Docker's own."""
    return any(
        number >= _FEW or not is_of_dns(rule) for number, rule in enumerate(nf_tables.rules(chain))
    )


def is_of_dns(rule: list[tuple[bytes, dict[int, bytes]]]) -> bool:
    """Whether a rule is Docker's own, for its DNS at 127.0.0.11: it forwards nothing."""
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
