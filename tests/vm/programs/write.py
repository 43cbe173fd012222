"""Runs in two guests: one writes into the other's memory by RDMA, and the other says what it got.

write.py DEVICE ADDRESS SIZE         waits for the writer, prints the SHA-256 of its memory
write.py DEVICE ADDRESS SIZE PEER    writes what it gets as input

ADDRESS is the guest's own, IPv4 or IPv6, and says which GID of the device to use. They tell each
other where over TCP, a line of JSON each.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
from ipaddress import IPv6Address, ip_address
from typing import Any

import pyverbs.enums as e
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

PORT = 18600
CHUNK = 1 << 16


def find_gid(context: Any, address: str) -> int:
    """The index of an address' GID; IPv4 addresses are mapped ones."""
    own = ip_address(address)
    wanted = own if own.version == 6 else IPv6Address(f"::ffff:{own}")
    count = context.query_port(1).gid_tbl_len
    return [IPv6Address(str(context.query_gid(1, i))) for i in range(count)].index(wanted)


def connected(qp: Any, gid_index: int, mine: dict[str, Any], stream: Any) -> dict[str, Any]:
    """Exchange and connect; what the other end said."""
    stream.write(json.dumps(mine).encode() + b"\n")
    stream.flush()
    theirs: dict[str, Any] = json.loads(stream.readline())
    attributes = QPAttr(port_num=1)
    attributes.path_mtu = e.IBV_MTU_4096
    attributes.dest_qp_num = theirs["qp"]
    attributes.max_dest_rd_atomic = attributes.max_rd_atomic = 1
    attributes.min_rnr_timer = 12
    attributes.timeout, attributes.retry_cnt, attributes.rnr_retry = 16, 7, 7
    route = GlobalRoute(dgid=GID(theirs["gid"]), sgid_index=gid_index)
    attributes.ah_attr = AHAttr(gr=route, is_global=1, port_num=1)
    qp.to_rts(attributes)
    return theirs


def main() -> None:
    device, address, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with Context(name=device) as context:
        gid_index = find_gid(context, address)
        domain, queue = PD(context), CQ(context, 64)
        flags = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE
        region = MR(domain, size, flags)
        capacity = QPCap(max_send_wr=32, max_recv_wr=1)
        first = QPAttr(port_num=1)
        first.qp_access_flags = flags
        made = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=queue, rcq=queue, cap=capacity)
        qp = QP(domain, made, first)
        mine = {
            "qp": qp.qp_num,
            "gid": str(context.query_gid(1, gid_index)),
            "key": region.rkey,
            "address": region.buf,
        }
        if len(sys.argv) == 4:
            with socket.create_server(
                ("", PORT), family=socket.AF_INET6, dualstack_ipv6=True
            ) as server:
                connection, _ = server.accept()
            with connection, connection.makefile("rwb") as stream:
                connected(qp, gid_index, mine, stream)
                stream.write(b"ready\n")
                stream.flush()
                assert stream.readline() == b"written\n"
            print(hashlib.sha256(region.read(size, 0)).hexdigest())
            return
        region.write(sys.stdin.buffer.read(), size)
        with (
            socket.create_connection((sys.argv[4], PORT)) as connection,
            connection.makefile("rwb") as stream,
        ):
            theirs = connected(qp, gid_index, mine, stream)
            assert stream.readline() == b"ready\n"
            for at in range(0, size, CHUNK):
                element = SGE(region.buf + at, min(CHUNK, size - at), region.lkey)
                request = SendWR(opcode=e.IBV_WR_RDMA_WRITE, num_sge=1, sg=[element])
                request.set_wr_rdma(theirs["key"], theirs["address"] + at)
                qp.post_send(request)
                done = 0
                while not done:
                    done, completions = queue.poll()
                if completions[0].status != e.IBV_WC_SUCCESS:
                    raise SystemExit(f"completion with status {completions[0].status}")
            stream.write(b"written\n")


if __name__ == "__main__":
    main()
