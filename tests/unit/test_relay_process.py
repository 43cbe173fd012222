"""The relay's process: what the router does if it can't be started."""

from __future__ import annotations

import errno
import os
import select
from pathlib import Path
from typing import Any

import pytest

from dataplane.router import relay_wire as wire
from dataplane.router.loop import EpollLoop
from dataplane.router.relay_process import LEAST_PAUSE, RelayProcess

OPEN = wire.RelayOpen("", 0, 0, wire.TCP, 0)


def descriptors() -> set[str]:
    return {each.name for each in Path("/proc/self/fd").iterdir() if each.exists()}


class RelayCounts:
    """A `RelayOwner` that counts."""

    def __init__(self) -> None:
        self.started = self.died = 0

    def relay_message(self, message: wire.Message) -> None:
        raise AssertionError(message)

    def relay_opened(self, transport: int, message: wire.RelayOpened) -> None:
        raise AssertionError(message)

    def relay_started(self) -> None:
        self.started += 1

    def relay_died(self) -> None:
        self.died += 1


@pytest.mark.parametrize("call", ["pidfd_open", "posix_spawn"])
def test_no_descriptor_for_a_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A relay that can't be started for want of descriptors leaves neither a process nor
    descriptors behind, and is started again.
    """
    program = tmp_path / "relay"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    now = 100.0
    with select.epoll() as epoll:
        loop, owner = EpollLoop(epoll, lambda: now), RelayCounts()
        relay = RelayProcess(loop, program, owner)
        before = descriptors()
        spawned: list[int] = []
        spawn = os.posix_spawn
        with monkeypatch.context() as patch:

            def noted(*given: Any, **more: Any) -> int:
                spawned.append(spawn(*given, **more))
                return spawned[-1]

            def refuse(*_: object, **__: object) -> int:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

            patch.setattr(os, "posix_spawn", noted)
            patch.setattr(os, call, refuse)
            relay.want(OPEN)
        assert relay.pid is None
        assert "Too many open files" in relay.why
        assert descriptors() == before
        assert len(spawned) == (call == "pidfd_open")
        assert not any(Path(f"/proc/{pid}").exists() for pid in spawned)
        assert owner.started == 0
        now += LEAST_PAUSE
        loop.fire()
        assert owner.started == 1
        pid = relay.pid
        assert pid is not None
        os.kill(pid, 9)
        for descriptor, events in epoll.poll(10):
            loop.serve(descriptor, events)
        while owner.died == 0:
            for descriptor, events in epoll.poll(10):
                loop.serve(descriptor, events)
        relay.close()
