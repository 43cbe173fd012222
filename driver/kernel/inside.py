"""Whether a container passes on to another of its networks what is addressed to itself.

Packets that aren't cut yet keep the mark of a tunnel when the shorter way takes their header off. Who consumes them never
sees it; but a device that they are sent on by may take it at its word. So what a container may pass on reaches it the
kernel's own way. What isn't addressed to itself does that anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from driver.kernel.namespace import in_netns
from driver.kernel.nft import Session

_IPVS: Final = Path("/proc/thread-self/net/ip_vs")
_IPVS_HEAD: Final = 3
"""Lines before the first service."""
_LEGACY: Final = Path("/proc/thread-self/net/ip_tables_names")
_OWN: Final = "freeflow"
"""Our VIPs: of what the container itself sends."""


def passes_on(sandbox: Path | int) -> bool:
    """Whether it may: it has rules that rewrite addresses of what comes, or of what goes on.

    Raises:
        KernelError: the namespace can't be entered, or its rules not be read.
    """
    return in_netns(sandbox, _look)


def _look() -> bool:
    if len(_lines(_IPVS)) > _IPVS_HEAD or "nat" in _lines(_LEGACY):
        return True
    session = Session()
    try:
        return rewrites(session.query("list ruleset"))
    finally:
        session.close()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []


def rewrites(objects: Iterable[dict[str, Any]]) -> bool:
    """Whether a listing (libnftables-json(5)) has such rules, or hands packets from device to device."""
    chains: set[tuple[str, str, str]] = set()
    rules: list[dict[str, Any]] = []
    for item in objects:
        chain = item.get("chain")
        if chain is not None and chain["table"] != _OWN:
            if chain["family"] == "netdev":
                return True
            if chain.get("type") == "nat" and chain.get("hook") in ("prerouting", "postrouting"):
                chains.add((chain["family"], chain["table"], chain["name"]))
        elif "rule" in item:
            rules.append(item["rule"])
    return any(
        (rule["family"], rule["table"], rule["chain"]) in chains and not _is_of_dns(rule)
        for rule in rules
    )


def _is_of_dns(rule: dict[str, Any]) -> bool:
    """Docker's own, for its name server at 127.0.0.11: such packets go nowhere."""
    return any(
        "match" in each
        and each["match"].get("op") == "=="
        and each["match"].get("left") == {"payload": {"protocol": "ip", "field": "daddr"}}
        and str(each["match"].get("right")).startswith("127.")
        for each in rule.get("expr", ())
        if isinstance(each, dict)
    )
