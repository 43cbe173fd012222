"""Docker hosts on one machine: a Swarm of real engines, each in its own namespaces.

    with Bed("try", ["28.5", "20.10"]) as bed:
        bed.swarm()
        bed.install_plugin(Path("build/plugin"))
        bed.hosts[0].docker("network", "create", "-d", "freeflow:latest", "n")

`python -m testbed up` and `down` do it from a shell. Read `bed.py` first, then `host.py`.
"""

from testbed.bed import Bed
from testbed.host import Host
from testbed.process import BedInUseError, CommandError, promised, wait_until

__all__ = ["Bed", "BedInUseError", "CommandError", "Host", "promised", "wait_until"]
