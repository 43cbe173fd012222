"""`freeflow ping`'s echoes in real namespaces."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest

from driver.errors import KernelError
from driver.vip import NftBalancer
from plugin.echo import probe
from testbed.patience import patience, within
from tests.kernel.vip_hosts import VIP, World, world

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")


@pytest.fixture
def three() -> Iterator[World]:
    with world(3) as made:
        yield made


def test_echoes_to_a_container(three: World) -> None:
    """Each echo to a container is answered, in less than a second, and its MAC address is known
    then."""
    task = three.tasks[1]
    found = probe(three.client.path, task.address, 3, False)
    assert len(found.times) == 3
    assert all(0 < milliseconds < within(1000) for milliseconds in found.times)
    assert str(task.address) in found.neighbours
    assert task.pings_answered() == 3
    assert found.task is None


def test_echoes_to_a_vip_name_the_task(three: World) -> None:
    """For a VIP the output names the task that replied: the one whose namespace counted the
    echoes."""
    assert NftBalancer().apply(three.client.path, {VIP: three.addresses})
    for _ in range(3):
        before = {task.address: task.pings_answered() for task in three.tasks}
        found = probe(three.client.path, VIP, 2, True)
        assert len(found.times) == 2
        after = {task.address: task.pings_answered() for task in three.tasks}
        assert [each for each in after if after[each] > before[each]] == [found.task]


def test_nobody_answers(three: World) -> None:
    """For an unknown or unreachable address there are no round trips."""
    assert probe(three.client.path, IPv4Address("10.77.0.99"), 1, False).times == []
    unreachable = probe(three.client.path, IPv6Address("2001:db8::1"), 2, False)
    assert (unreachable.times, unreachable.task) == ([], None)


def test_namespace_that_is_gone() -> None:
    """A container that has ended is named as such."""
    with pytest.raises(KernelError, match="check that its container runs"):
        probe(Path("/run/netns/ffnone"), IPv4Address("10.77.0.20"), 1, False)


def test_an_answer_that_is_read_late(three: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer counts if it came in time and only this process was not running."""
    monkeypatch.setattr("plugin.echo.WAIT", 0.0)

    class Slow(socket.socket):
        def sendto(self, *arguments: Any) -> int:
            sent = super().sendto(*arguments)
            select.select([self], [], [], patience(10))
            return sent

    monkeypatch.setattr("plugin.echo.socket.socket", Slow)
    assert len(probe(three.client.path, three.tasks[0].address, 2, False).times) == 2
