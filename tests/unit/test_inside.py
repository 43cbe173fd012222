"""Which rules of a container let it pass packets on."""

from __future__ import annotations

from typing import Any

import pytest

from driver.kernel.inside import rewrites


def chain(table: str, name: str, kind: str = "nat", hook: str = "", family: str = "ip") -> Any:
    made = {"family": family, "table": table, "name": name}
    return {"chain": made | ({"type": kind, "hook": hook} if hook else {})}


def rule(table: str, name: str, *expressions: Any, family: str = "ip") -> Any:
    return {"rule": {"family": family, "table": table, "chain": name, "expr": list(expressions)}}


def to(address: str) -> Any:
    left = {"payload": {"protocol": "ip", "field": "daddr"}}
    return {"match": {"op": "==", "left": left, "right": address}}


DOCKER = [
    chain("nat", "OUTPUT", hook="output"),
    chain("nat", "POSTROUTING", hook="postrouting"),
    chain("nat", "DOCKER_OUTPUT"),
    chain("nat", "DOCKER_POSTROUTING"),
    rule("nat", "OUTPUT", to("127.0.0.11"), {"jump": {"target": "DOCKER_OUTPUT"}}),
    rule("nat", "POSTROUTING", to("127.0.0.11"), {"jump": {"target": "DOCKER_POSTROUTING"}}),
    rule("nat", "DOCKER_OUTPUT", {"xt": None}),
    rule("nat", "DOCKER_POSTROUTING", {"xt": None}),
]
VIPS = [
    chain("freeflow", "out", hook="output"),
    chain("freeflow", "back", hook="postrouting"),
    rule("freeflow", "back", {"masquerade": None}),
]


def test_what_every_container_has_is_nothing() -> None:
    """Docker's rules for its name server and our own for VIPs rewrite nothing that comes from outside."""
    assert not rewrites([])
    assert not rewrites(DOCKER)
    assert not rewrites(VIPS)
    assert not rewrites([chain("nat", "PREROUTING", hook="prerouting")])


@pytest.mark.parametrize(
    "objects",
    [
        [
            chain("nat", "pre", hook="prerouting"),
            rule("nat", "pre", {"dnat": {"addr": "10.0.0.1"}}),
        ],
        [*DOCKER, rule("nat", "POSTROUTING", {"masquerade": None})],
        [
            chain("nat", "post", hook="postrouting", family="inet"),
            rule("nat", "post", to("10.0.0.0"), {"masquerade": None}, family="inet"),
        ],
        [chain("t", "in", "filter", "ingress", "netdev")],
    ],
    ids=["dnat", "masquerade", "inet", "netdev"],
)
def test_who_rewrites_passes_on(objects: list[Any]) -> None:
    """Rules at prerouting or postrouting rewrite what comes from outside, or its answers; a netdev chain may forward it."""
    assert rewrites(objects)
