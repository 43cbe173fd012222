"""The real router against processes that send anything: it survives, keeps nothing, and serves
others.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataplane.control import Limits, RouterSettings
from dataplane.router import layout
from dataplane.router import library_wire as wire
from testbed.namespace_bed import NamespaceBed, bed
from testbed.patience import patience
from tests.dataplane.library import Library, dial, listen
from tests.unit.test_router_wire import EXAMPLES

KINDS = st.sampled_from(["eventfd", "file", "socket", "directory"])


@pytest.fixture(scope="module", params=[True, False], ids=["guarded", "unguarded"])
def hostile(request: pytest.FixtureRequest) -> Iterator[NamespaceBed]:
    limits = RouterSettings(limits=Limits(asks=1 << 19, messages=1 << 20))
    with bed("a", "b", settings=limits, guard=request.param) as made:
        yield made


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A message with some bytes changed, cut off or added."""
    message, _ = draw(st.sampled_from(EXAMPLES))
    data = bytearray(wire.pack(message))
    for place, value in draw(
        st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), max_size=5)
    ):
        data[place % len(data)] = value
    cut = draw(st.integers(0, 3))
    return bytes(data[: len(data) - cut] if cut < 3 else data + b"?")


@st.composite
def plausible(draw: st.DrawFn) -> bytes:
    """A message whose fields have nearly valid values."""
    small, token = st.integers(0, 3), st.integers(0, (1 << 64) - 1)
    ip = st.sampled_from(["10.78.0.2", "10.78.0.3", "10.78.0.9", "127.0.0.1", "fd78::2", "::"])
    address = st.builds(
        lambda host, port: wire.Address(ip_address(host), port), ip, st.sampled_from([0, 7700])
    )
    message = draw(
        st.one_of(
            st.builds(wire.Request, small, small, address, address),
            st.builds(wire.Release, small, small, small, token),
            st.builds(wire.Bell, small, small, token, small),
            st.builds(wire.Fetch, small, small, token, small),
            st.builds(wire.Note, small, small),
        )
    )
    return wire.pack(message)


PACKETS = st.lists(
    st.tuples(
        st.one_of(st.binary(max_size=80), damaged(), plausible()),
        st.lists(KINDS, max_size=5),
    ),
    min_size=1,
    max_size=8,
)


def descriptor(kind: str) -> int:
    match kind:
        case "eventfd":
            return os.eventfd(0)
        case "file":
            return os.memfd_create("x")
        case "socket":
            return socket.socket(socket.AF_UNIX).detach()
        case _:
            return os.open("/", os.O_RDONLY)


def descriptors_of(made: NamespaceBed) -> int:
    assert made.process is not None
    return len(list(Path(f"/proc/{made.process.pid}/fd").iterdir()))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(packets=PACKETS, hello=st.booleans())
def test_anything(
    hostile: NamespaceBed, packets: list[tuple[bytes, list[str]]], hello: bool
) -> None:
    """Whatever a process sends, with whatever descriptors, the router continues and keeps none of
    them.
    """
    path, namespace = hostile.shared / "router.sock", hostile.containers["a"].namespace
    before = descriptors_of(hostile)
    library = Library.connect(path, namespace, hello=hello)
    for data, kinds in packets:
        sent = [descriptor(kind) for kind in kinds]
        # PermissionError: the kernel has refused the descriptors.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, PermissionError):
            library.raw(data, *sent)
        for each in sent:
            os.close(each)
    library.close()
    assert hostile.router.statistics().learned
    deadline = time.monotonic() + patience(3)
    # The namespace's own descriptors: held for a while after the last process.
    while descriptors_of(hostile) > before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert "a bug in the router" not in hostile.log()


def test_others_are_served(hostile: NamespaceBed) -> None:
    """After all that, two processes are paired as usual."""
    a, b = hostile.containers.values()
    path = hostile.shared / "router.sock"
    one, other = Library.connect(path, a.namespace), Library.connect(path, b.namespace)
    for library in (one, other):
        library.hear(wire.Welcome)
    listener = listen(b.namespace, "0.0.0.0")
    client = dial(a.namespace, str(b.ipv4))
    server, _ = listener.accept()
    one.ask(client)
    other.ask(server)
    assert one.hear(wire.Grant)[0].incarnation == other.hear(wire.Grant)[0].incarnation


def test_an_owner_that_lies_about_its_slots(hostile: NamespaceBed) -> None:
    """A process that releases the slots it uses again and again frees no slot of its peer, and no
    slot twice.
    """
    a, b = hostile.containers.values()
    path = hostile.shared / "router.sock"
    one, other = Library.connect(path, a.namespace), Library.connect(path, b.namespace)
    for library in (one, other):
        library.hear(wire.Welcome)
    listener = listen(b.namespace, "0.0.0.0", 7701)
    kept = []
    seen = set()
    for _ in range(layout.SLOTS + 3):
        client = dial(a.namespace, str(b.ipv4), 7701)
        server, _ = listener.accept()
        kept += [client, server]
        one.ask(client)
        other.ask(server)
        grant, _ = one.hear(wire.Grant)
        answer, _ = other.hear(wire.Grant)
        assert (answer.arena, answer.slot) not in seen
        seen.add((answer.arena, answer.slot))
        for _ in range(3):
            one.say(wire.Release(grant.slot, grant.arena, grant.incarnation, grant.token))
    for library in (one, other):
        library.discard()
