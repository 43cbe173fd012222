"""Three hosts over real verbs, each with a link to each other one: the traffic and the failures of
one pair do not affect the third host.

The order matters, because the last test switches a guest off.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.process import wait_until
from testbed.vm import guests
from tests.vm.cluster import BUILT_LIBRARY, BUILT_RELAY, Host, cluster
from tests.vm.streams import SETTINGS, Streams, linked, rdma

pytestmark = [
    pytest.mark.skipif(
        not BUILT_LIBRARY.exists() or not BUILT_RELAY.exists(), reason="missing: make library relay"
    ),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with guests(3) as made:
        for guest in made:
            guest.rxe_up()
        with cluster(made, settings=SETTINGS) as three:
            linked(three)
            yield three


@pytest.mark.long
def test_a_ring_of_three(hosts: list[Host]) -> None:
    """Each host has connections to both others at once, over two links, and every byte arrives once
    and in order.
    """
    one, two, three = hosts
    assert [len(rdma(host).hosts) for host in hosts] == [2, 2, 2]
    streams = [Streams(pair, 20) for pair in ([one, two], [two, three], [three, one])]
    for stream in streams:
        assert stream.ends() == ["whole"] * 4
    for host in hosts:
        wait_until(f"{host.guest.name}: no memory", lambda host=host: not rdma(host).memory, 60)  # type: ignore[misc]
        assert rdma(host).broken == 0


def test_a_third_host_goes(hosts: list[Host]) -> None:
    """A host that is switched off ends its own connections, and the others free their memory; those
    between the two others are not affected.
    """
    one, two, three = hosts
    kept = Streams([one, two], 50)
    lost = Streams([two, three], 300)
    three.guest.power_off()
    assert set(Streams.words(lost.client, 120)) == {"reset"}
    assert kept.ends() == ["whole"] * 4
    assert rdma(one).broken == 0
    wait_until("no memory", lambda: not rdma(two).memory, 60)
    assert rdma(two).broken >= 2
