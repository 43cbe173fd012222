"""Messages between routers are unpacked as they were packed, and everything else is invalid."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Final

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.errors import WrongMessage
from dataplane.router import peer_wire as pw
from dataplane.router.library_wire import Address

INSTANCE: Final = "0123456789abcdef" * 2
KEY: Final = "A" * 43 + "="
"""A public key of WireGuard."""
PROOF: Final = "A" * 127 + "/"
EXAMPLES: Final[list[pw.Message]] = [
    pw.PeerHello(
        instance=INSTANCE,
        node="8x2q",
        data_path="192.0.2.7",
        rdma=True,
        build="0.1.0+9f-a_b",
        relay=True,
        relay_ring=1 << 20,
        relay_encryption="messages",
        wireguard=(KEY, KEY[::-1][1:] + "="),
        wireguard_proofs=(PROOF, PROOF[::-1]),
        wireguard_slot=1,
        wireguard_port=4797,
    ),
    pw.Owns({"n1": ("10.0.4.1", "fd00::1"), "n2": ()}),
    pw.Offer(1 << 62, "n1", "10.0.4.1:80", "[fd00::2]:40000"),
    pw.VerbsOffer(8, "n1", "10.0.4.1", 4096, "fd00::2", 1 << 23, 2),
    pw.VerbsStep(
        number=7,
        asks=True,
        step=1,
        network="n1",
        gid="10.0.4.1",
        peer_gid="fd00::2",
        port=7471,
        retry=255,
        private=bytes(256),
    ),
    pw.VerbsAlive((1, 2), (3,), True),
    pw.VerbsDatagramAsk("n1", "10.0.4.1", 4096, "fd00::2", 8193),
    pw.VerbsDatagramNone("n1", "10.0.4.1", 4096, "fd00::2", 8193, 5),
    pw.VerbsGroupAsk("n1", "239.1.2.3", True),
    pw.VerbsGroupMembers("n1", "ff1e::1", (("10.0.4.1", 4096), ("fd00::2", 5)), (), True),
    pw.Leaves(1013, (1, 2)),
    pw.Waits(1012, (1, 2, 1 << 40)),
    pw.Withdraw(0),
    pw.Decline(7, 1004),
    pw.Placement(7, (1 << 32) - 1, bytes(range(128))),
    pw.PeerAccept(7, 3, b""),
    pw.Paired(3),
    pw.LinkOffer(1, b"gid", again=True, transport="relay"),
    pw.LinkAnswer(1, b"gid", bytes(32)),
    pw.LinkRefused(1, "no device", True),
    pw.PeerDrop(3, 15),
    pw.PeerFrame(1, bytes(pw.MAX_DATA)),
    pw.PeerPing(),
    pw.PeerPong(),
]


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def test_every_message_is_shown() -> None:
    """The examples cover all messages."""
    assert {type(example) for example in EXAMPLES} == set(pw.Message.__args__)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_there_and_back(message: pw.Message) -> None:
    """A message is unpacked as it was packed."""
    assert list(pw.Frames().feed(pw.pack(message))) == [message]


BYTES: Final[list[tuple[pw.Message, bytes]]] = [
    (
        pw.PeerHello(
            instance="0f" * 16,
            node="n1",
            data_path="192.0.2.1",
            rdma=True,
            ring=65536,
            build="b",
            relay=True,
            relay_ring=65536,
            relay_encryption="all",
            tunnel_offload=False,
            verbs=True,
            verbs_cm=True,
            verbs_groups=True,
            wireguard=(KEY,),
            wireguard_proofs=("A" * 128,),
            wireguard_slot=1,
            wireguard_port=4797,
        ),
        b"\xde\x00\x13\xa4type\xa5Hello\xa7version\x01\xa8instance\xd9 0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f"
        b"\xa4node\xa2n1\xa9data_path\xa9192.0.2.1\xa4rdma\xc3\xa4ring\xce\x00\x01\x00\x00"
        b"\xa5build\xa1b\xa5relay\xc3\xaarelay_ring\xce\x00\x01\x00\x00"
        b"\xb0relay_encryption\xa3all\xaetunnel_offload\xc2\xa5verbs\xc3"
        b"\xa8verbs_cm\xc3\xacverbs_groups\xc3"
        b"\xa9wireguard\x91\xd9,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
        b"\xb0wireguard_proofs\x91\xd9\x80" + b"A" * 128 + b""
        b"\xaewireguard_slot\x01\xaewireguard_port\xcd\x12\xbd",
    ),
    (
        pw.Owns({"net": ("10.0.1.2",)}),
        b"\x82\xa4type\xa4Owns\xa8networks\x81\xa3net\x91\xa810.0.1.2",
    ),
    (
        pw.Offer(7, "net", "10.0.1.2:80", "[fd00::2]:5"),
        b"\x85\xa4type\xa5Offer\xa5offer\x07\xa7network\xa3net"
        b"\xa5local\xab10.0.1.2:80\xa6remote\xab[fd00::2]:5",
    ),
    (
        pw.VerbsOffer(8, "net", "10.0.1.2", 4096, "fd00::2", 5, 2),
        b"\x88\xa4type\xaaVerbsOffer\xa5offer\x08\xa7network\xa3net\xa3gid\xa810.0.1.2"
        b"\xa3qpn\xcd\x10\x00\xa8peer_gid\xa7fd00::2\xa8peer_qpn\x05\xa7service\x02",
    ),
    (
        pw.VerbsStep(
            number=7,
            asks=True,
            step=1,
            network="net",
            gid="10.0.1.2",
            peer_gid="fd00::2",
            space=0x106,
            port=80,
            from_port=5,
            qpn=1,
            service=2,
            psn=3,
            qkey=4,
            reject=28,
            responder_resources=6,
            initiator_depth=7,
            flow_control=8,
            retry=9,
            rnr_retry=10,
            srq=11,
            private=b"xy",
        ),
        b"\xde\x00\x16\xa4type\xa9VerbsStep\xa6number\x07\xa4asks\xc3\xa4step\x01\xa7network\xa3net"
        b"\xa3gid\xa810.0.1.2\xa8peer_gid\xa7fd00::2\xa5space\xcd\x01\x06\xa4port\x50"
        b"\xa9from_port\x05\xa3qpn\x01\xa7service\x02\xa3psn\x03\xa4qkey\x04\xa6reject\x1c"
        b"\xb3responder_resources\x06\xafinitiator_depth\x07\xacflow_control\x08"
        b"\xa5retry\x09\xa9rnr_retry\x0a\xa3srq\x0b\xa7private\xc4\x02xy",
    ),
    (
        pw.VerbsAlive((1,), (), True),
        b"\x84\xa4type\xaaVerbsAlive\xa6asking\x91\x01\xa5asked\x90\xa4last\xc3",
    ),
    (
        pw.VerbsDatagramAsk("net", "10.0.1.2", 4096, "fd00::2", 5),
        b"\x86\xa4type\xb0VerbsDatagramAsk\xa7network\xa3net\xa3gid\xa810.0.1.2"
        b"\xa3qpn\xcd\x10\x00\xa8peer_gid\xa7fd00::2\xa8peer_qpn\x05",
    ),
    (
        pw.VerbsDatagramNone("net", "10.0.1.2", 4096, "fd00::2", 5, 4),
        b"\x87\xa4type\xb1VerbsDatagramNone\xa7network\xa3net\xa3gid\xa810.0.1.2"
        b"\xa3qpn\xcd\x10\x00\xa8peer_gid\xa7fd00::2\xa8peer_qpn\x05\xa6reason\x04",
    ),
    (
        pw.VerbsGroupAsk("net", "239.1.2.3", False),
        b"\x84\xa4type\xadVerbsGroupAsk\xa7network\xa3net\xa5group\xa9239.1.2.3\xa2on\xc2",
    ),
    (
        pw.VerbsGroupMembers("net", "ff1e::1", (("10.0.1.2", 4096),), (), True),
        b"\x86\xa4type\xb1VerbsGroupMembers\xa7network\xa3net\xa5group\xa7ff1e::1"
        b"\xa4here\x91\x92\xa810.0.1.2\xcd\x10\x00\xa4gone\x90\xa3all\xc3",
    ),
    (
        pw.Leaves(1013, (7,)),
        b"\x83\xa4type\xa6Leaves\xa6reason\xcd\x03\xf5\xabconnections\x91\x07",
    ),
    (
        pw.Waits(1012, (1, 300)),
        b"\x83\xa4type\xa5Waits\xa6reason\xcd\x03\xf4\xa6offers\x92\x01\xcd\x01\x2c",
    ),
    (pw.Withdraw(7), b"\x82\xa4type\xa8Withdraw\xa5offer\x07"),
    (pw.Decline(7, 4), b"\x83\xa4type\xa7Decline\xa5offer\x07\xa6reason\x04"),
    (
        pw.Placement(7, 3, b"\1\2"),
        b"\x84\xa4type\xa5Place\xa5offer\x07\xaaconnection\x03\xa5place\xc4\x02\x01\x02",
    ),
    (
        pw.PeerAccept(7, 3, b""),
        b"\x84\xa4type\xa6Accept\xa5offer\x07\xaaconnection\x03\xa5place\xc4\x00",
    ),
    (pw.Paired(3), b"\x82\xa4type\xa6Paired\xaaconnection\x03"),
    (
        pw.LinkOffer(1, b"a", again=True, transport="relay", attempt=5),
        b"\x86\xa4type\xa9LinkOffer\xa4link\x01\xa7address\xc4\x01a\xa5again\xc3"
        b"\xa9transport\xa5relay\xa7attempt\x05",
    ),
    (
        pw.LinkAnswer(1, b"a", b"t", 5),
        b"\x85\xa4type\xaaLinkAnswer\xa4link\x01\xa7address\xc4\x01a\xa6ticket\xc4\x01t"
        b"\xa7attempt\x05",
    ),
    (
        pw.LinkRefused(1, "no"),
        b"\x85\xa4type\xabLinkRefused\xa4link\x01\xa4text\xa2no\xa6worked\xc2\xa7attempt\x00",
    ),
    (pw.PeerDrop(3, 15), b"\x83\xa4type\xa4Drop\xaaconnection\x03\xa6reason\x0f"),
    (pw.PeerFrame(1, b"xy"), b"\x83\xa4type\xa5Frame\xa4link\x01\xa4data\xc4\x02xy"),
    (pw.PeerPing(), b"\x81\xa4type\xa4Ping"),
    (pw.PeerPong(), b"\x81\xa4type\xa4Pong"),
]
"""Messages, and their bytes. What the first version sent is in them, with the same names."""
FIRST: Final[list[tuple[pw.Message, bytes]]] = [
    (
        pw.PeerHello(
            instance="0f" * 16, node="n1", data_path="192.0.2.1", rdma=True, ring=65536, build="b"
        ),
        b"\x88\xa4type\xa5Hello\xa7version\x01\xa8instance\xd9 0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f"
        b"\xa4node\xa2n1\xa9data_path\xa9192.0.2.1\xa4rdma\xc3\xa4ring\xce\x00\x01\x00\x00"
        b"\xa5build\xa1b",
    ),
    (
        pw.LinkOffer(1, b"a", again=True),
        b"\x84\xa4type\xa9LinkOffer\xa4link\x01\xa7address\xc4\x01a\xa5again\xc3",
    ),
    (pw.LinkAnswer(1, b"a"), b"\x83\xa4type\xaaLinkAnswer\xa4link\x01\xa7address\xc4\x01a"),
]
"""Messages as the first version sent them, without the fields that have come since."""


def test_every_message_has_its_bytes() -> None:
    """The bytes of all messages are fixed."""
    assert {type(message) for message, _ in BYTES} == set(pw.Message.__args__)


@pytest.mark.parametrize(("message", "data"), BYTES, ids=lambda m: type(m).__name__)
def test_bytes(message: pw.Message, data: bytes) -> None:
    """A message has the bytes that routers of other versions send and expect."""
    assert pw.pack(message) == framed(data)
    assert list(pw.Frames().feed(framed(data))) == [message]


@pytest.mark.parametrize(("message", "data"), FIRST, ids=lambda m: type(m).__name__)
def test_first_version(message: pw.Message, data: bytes) -> None:
    """A message of the first version is understood: it has no RDMA and no TCP that it doesn't
    name.
    """
    assert list(pw.Frames().feed(framed(data))) == [message]


@given(st.lists(st.sampled_from(EXAMPLES), max_size=6), st.data())
def test_pieces(messages: list[pw.Message], data: st.DataObject) -> None:
    """However the stream is split, the same messages come out, in order."""
    stream = b"".join(map(pw.pack, messages))
    frames, found = pw.Frames(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += list(frames.feed(stream[:size]))
        stream = stream[size:]
    assert found == messages


@given(st.binary(max_size=200))
def test_garbage(data: bytes) -> None:
    """Random bytes are a message or WrongMessage, and cause no other error."""
    try:
        list(pw.Frames().feed(framed(data) if data else data))
    except WrongMessage:
        pass


@pytest.mark.parametrize("length", [0, pw.MAX_FRAME + 1, 1 << 31, (1 << 32) - 1])
def test_lengths(length: int) -> None:
    """Lengths of 0 and past the limit are invalid at once: no memory is filled while bytes are
    awaited.
    """
    with pytest.raises(WrongMessage, match="frame of"):
        list(pw.Frames().feed(length.to_bytes(4, "big")))


def test_longest_message() -> None:
    """A message that a peer wouldn't take is not sent."""
    many = tuple(f"fd00:aaaa:bbbb:cccc:dddd:eeee:ffff:{n:x}" for n in range(8000))
    with pytest.raises(WrongMessage, match="Owns of"):
        pw.pack(pw.Owns({"n1": many}))


BAD: Final[list[dict[str, object]]] = [
    {"type": "Unknown"},
    {"type": "Offer", "offer": -1, "network": "n", "local": "a", "remote": "b"},
    {"type": "Offer", "offer": 1 << 63, "network": "n", "local": "a", "remote": "b"},
    {"type": "Offer", "offer": 1, "network": "../n", "local": "a", "remote": "b"},
    {"type": "Offer", "offer": 1, "network": "n\n", "local": "a", "remote": "b"},
    {"type": "Offer", "offer": 1, "network": "n", "local": "a" * 54, "remote": "b"},
    {"type": "Place", "offer": 1, "connection": 1 << 32, "place": b""},
    {"type": "Place", "offer": 1, "connection": 1, "place": bytes(129)},
    {"type": "Place", "offer": 1, "connection": True, "place": b""},
    {"type": "Frame", "link": 1, "data": bytes(pw.MAX_DATA + 1)},
    {"type": "LinkRefused", "link": 1, "text": "a\nb"},
    {"type": "LinkRefused", "link": 1, "text": "\x1b[2J"},
    {"type": "Owns", "networks": {"N": ["10.0.0.1"]}},
    {"type": "Owns", "networks": {"n": "10.0.0.1"}},
    {"type": "Owns", "networks": {"n": ["1"] * 8193}},
    {"type": "Owns", "networks": {f"n{n}": [] for n in range(1025)}},
]


@pytest.mark.parametrize("content", BAD, ids=lambda c: f"{c['type']}")
def test_limits(content: dict[str, object]) -> None:
    """A field past its limit makes the message invalid."""
    with pytest.raises(WrongMessage):
        list(pw.Frames().feed(framed(msgspec.msgpack.encode(content))))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("instance", "x" * 32),
        ("instance", INSTANCE + "\n"),
        ("node", ""),
        ("build", "a b"),
        ("wireguard", [KEY, KEY, KEY]),
        ("wireguard", ["A" * 44]),
        ("wireguard", [KEY + "\n"]),
        ("wireguard", ["A" * 42 + "B="]),
        ("wireguard_proofs", [PROOF, PROOF, PROOF]),
        ("wireguard_proofs", ["A" * 127]),
        ("wireguard_proofs", ["A" * 127 + "="]),
        ("wireguard_slot", 2),
        ("wireguard_slot", -1),
        ("wireguard_port", 65535),
    ],
)
def test_limits_of_hello(field: str, value: object) -> None:
    """The same holds for the first message."""
    content = msgspec.to_builtins(EXAMPLES[0]) | {field: value}
    with pytest.raises(WrongMessage):
        list(pw.Frames().feed(framed(msgspec.msgpack.encode(content))))


def test_depth() -> None:
    """Deeply nested lists are invalid, and don't exhaust the stack."""
    with pytest.raises(WrongMessage):
        list(pw.Frames().feed(framed(b"\x91" * 100_000)))


def test_later_versions() -> None:
    """Fields that a later version adds are ignored; its version can always be read."""
    content = msgspec.to_builtins(EXAMPLES[0]) | {"version": 2, "more": [1, 2]}
    (hello,) = pw.Frames().feed(framed(msgspec.msgpack.encode(content)))
    assert isinstance(hello, pw.PeerHello)
    assert hello.version == 2


@given(st.ip_addresses(), st.integers(1, 65535))
def test_ends(ip: IPv4Address | IPv6Address, port: int) -> None:
    """An address and port come back from their text; IPv4-mapped addresses as IPv4."""
    if isinstance(ip, IPv6Address):
        ip = ip.ipv4_mapped or ip
    assert pw.end_of(str(Address(ip, port))) == Address(ip, port)


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:+80"),
        *("10.0.0.1:٣", "[10.0.0.1]:80", "fd00::1:80", "[fe80::1%eth0]:80", "host:80", "[]:80"),
    ],
)
def test_no_ends(text: str) -> None:
    """Any other text is invalid."""
    with pytest.raises(WrongMessage):
        pw.end_of(text)
