"""Files of overlayfs, the root of most containers: the file system can't say whether a read would
wait.
"""

from __future__ import annotations

import sys
from pathlib import Path

from testbed import wait_until
from testbed.namespace_bed import bed
from tests.dataplane.places import LIBRARY, counts_of

PROGRAM = Path(__file__).parent / "programs/files.py"
COUNT = 300
SIZE = 100 * 1024
MOUNT = (
    "set -e; mkdir -p $0; mount -t tmpfs tmpfs $0; cd $0; mkdir lower upper work merged; "
    "mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay merged; "
    f"head -c {SIZE} /dev/urandom >merged/file; "
    'exec "$@"'
)


def test_sendfile_keeps_its_memory(tmp_path: Path) -> None:
    """A file on overlayfs arrives whole over the ring, and sendfile() doesn't map new memory for
    each call.
    """
    program = [sys.executable, str(PROGRAM)]
    with bed("server", "client", library=LIBRARY) as made:
        server, client = made.containers["server"], made.containers["client"]
        where = [str(server.ipv4), "7301"]
        server.popen([*program, "server", *where, str(COUNT), str(SIZE)])
        listening = f"ss -Htln sport = :{where[1]}"
        wait_until("the server", lambda: server.run(["sh", "-c", listening]).stdout.strip())
        counters = {"FREEFLOW_STATS": str(tmp_path / "statistics")}
        mounted = tmp_path / "mounted"
        sending = [*program, "client", *where, str(mounted / "merged/file"), str(COUNT)]
        said = client.run(["sh", "-c", MOUNT, str(mounted), *sending], env=counters)
    assert counts_of(tmp_path / "statistics")["sent"] > COUNT // 2 * SIZE
    assert float(said.stdout) < 1
