"""The BPF programs: the running kernel accepts them, and Python and C agree on their maps."""

from __future__ import annotations

import json
import subprocess
import sys
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from dataplane.ebpf import map_layout
from dataplane.ebpf.libbpf import Object
from dataplane.ebpf.probe import PROGRAMS, STAGES, KernelSupport, probe_kernel
from dataplane.errors import KernelRefused
from testbed.ebpf_object import SOURCES, built
from testbed.patience import patience

FOUR, SIX = IPv4Address("10.9.0.2"), IPv6Address("fd42:7::2")
MAC = "02:42:0a:09:00:02"

_PROGRAM = r"""
#include <stdio.h>
#include <string.h>
#include <arpa/inet.h>
#include "overlay.h"
#define SHOW(what)                                                                                 \
        do {                                                                                       \
                for (unsigned long i = 0; i < sizeof(what); i++)                                   \
                        printf("%02x", ((unsigned char *)&what)[i]);                               \
                printf("\n");                                                                      \
        } while (0)

int main(void)
{
        struct ff_settings settings = {.lease = 1, .idle = 2, .inside = 3, .outside = 4,
                                       .flags = FF_ENCAP4 | FF_DECAP6, .port_low = 5, .port_high = 6, .ttl = 7};
        struct ff_port port = {.net = 1, .vni = htonl(77 << 8), .ip4 = inet_addr("10.9.0.2"),
                               .udp_port = htons(4799), .flags = FF_IP4 | FF_IP6, .slot = 9};
        struct ff_port vxlan = {.net = 1, .flags = FF_VXLAN};
        struct ff_fdb_key fdb_key = {.net = 1};
        struct ff_fdb_entry entry = {.seen = 1, .ifindex = 2, .peer = inet_addr("10.1.0.2"),
                                 .ip4 = inet_addr("10.9.0.2"), .flags = FF_IP4 | FF_IP6 | FF_FINAL, .slot = 9};
        struct ff_network_key network = {.vni = htonl(77 << 8), .udp_port = htons(4799)};
        struct ff_peer_key peer_key = {.net = 1, .address = inet_addr("10.1.0.2")};
        struct ff_peer peer = {.ifindex = 1, .source = inet_addr("10.1.0.1"), .mtu = 1500, .next = inet_addr("10.1.0.9")};
        struct ff_count count = {1, 2, 3, 4, 5, 6, 7, 8};
        unsigned char mac[] = {0x02, 0x42, 0x0a, 0x09, 0x00, 0x02};

        memcpy(port.mac, mac, 6);
        memcpy(fdb_key.mac, mac, 6);
        inet_pton(AF_INET6, "fd42:7::2", port.ip6);
        inet_pton(AF_INET6, "fd42:7::2", entry.ip6);
        SHOW(settings);
        SHOW(port);
        SHOW(vxlan);
        SHOW(fdb_key);
        SHOW(entry);
        SHOW(network);
        SHOW(peer_key);
        SHOW(peer);
        SHOW(count);
        printf("%02x\n", FF_LAYOUT);
        printf("%04x\n", FF_SLOTS);
        return 0;
}
"""


def test_python_and_c_mean_the_same(tmp_path: Path) -> None:
    """Every key and value that Python packs has the bytes that C has in memory, and unpacks to the
    same.
    """
    source, program = tmp_path / "show.c", tmp_path / "show"
    source.write_text(_PROGRAM)
    subprocess.run(["gcc", "-Wall", "-Werror", f"-I{SOURCES}", source, "-o", program], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    in_c = [bytes.fromhex(line) for line in output.split()]
    settings = map_layout.FastPathSettings(
        1, 2, 3, 4, map_layout.ENCAP4 | map_layout.DECAP6, (5, 6), 7
    )
    entry = map_layout.FdbEntry(2, IPv4Address("10.1.0.2"), 1, FOUR, SIX, 9, True)
    route = map_layout.PeerRoute(1, IPv4Address("10.1.0.1"), 1500, IPv4Address("10.1.0.9"))
    in_python = [
        settings.pack(),
        map_layout.Port(1, 77, 4799, MAC, FOUR, SIX, 9).pack(),
        map_layout.pack_vxlan(1),
        map_layout.pack_fdb_key(1, MAC),
        entry.pack(),
        map_layout.pack_network_key(77, 4799),
        map_layout.pack_peer_key(1, IPv4Address("10.1.0.2")),
        route.pack(),
        map_layout.COUNT.pack(*range(1, 9)),
        bytes([map_layout.LAYOUT]),
        map_layout.SLOTS.to_bytes(2, "big"),
    ]
    assert in_python == in_c
    assert map_layout.FastPathSettings.unpack(in_c[0]) == settings
    assert map_layout.unpack_fdb_key(in_c[3]) == (1, MAC)
    assert map_layout.FdbEntry.unpack(in_c[4]) == entry
    assert map_layout.unpack_peer_key(in_c[6]) == (1, IPv4Address("10.1.0.2"))
    assert map_layout.PeerRoute.unpack(in_c[7]) == route
    assert map_layout.Count.unpack(in_c[8] * 3) == map_layout.Count(3, 6, 9, 12, 15, 18, 21, 24)


def test_the_kernel_takes_every_program() -> None:
    """The verifier of the running kernel accepts each program, and the trials say what it can
    do.
    """
    found = probe_kernel(built())
    assert found.refused == {}
    assert found.stages[:2] == ("same-host", "receive")


def test_the_command_says_what_the_kernel_takes() -> None:
    """`python -m dataplane.ebpf OBJECT` prints what the kernel accepts as JSON and exits with 0."""
    done = subprocess.run(
        [sys.executable, "-m", "dataplane.ebpf", built()],
        capture_output=True,
        text=True,
        check=True,
        timeout=patience(60),
    )
    answer = json.loads(done.stdout)
    names = [name for group in PROGRAMS.values() for name in group]
    assert answer["programs"] == dict.fromkeys(names, "accepted")
    assert answer["stages"] == list(probe_kernel(built()).stages)


def test_a_file_that_is_no_object_is_refused(tmp_path: Path) -> None:
    """A file that is not a BPF object is refused by name, and the command exits with 2."""
    wrong = tmp_path / "wrong.o"
    wrong.write_bytes(b"nothing of the kind")
    with pytest.raises(KernelRefused, match=r"wrong\.o"):
        Object(wrong)
    done = subprocess.run(
        [sys.executable, "-m", "dataplane.ebpf", wrong],
        capture_output=True,
        check=False,
        timeout=patience(60),
    )
    assert done.returncode == 2


def test_a_stage_needs_the_one_before() -> None:
    """A refused program disables its stage and all later ones; a failed trial disables only the
    tunnel.
    """
    assert KernelSupport().stages == STAGES
    assert KernelSupport(refused={"ff_port": "no"}).why_not == dict.fromkeys(STAGES, "no")
    assert KernelSupport(refused={"ff_vxlan": "no"}).stages == ("same-host",)
    assert KernelSupport(lacking={"encap4": "old"}).why_not == {"tunnel": "old"}
    assert KernelSupport(lacking={"encap6": "old"}).stages == STAGES
