"""Several Docker hosts on one machine: a Swarm of real engines, each in namespaces of its own.

    with Bed("try", ["28.5", "20.10"]) as bed:
        bed.swarm()
        bed.install_plugin(Path("build/plugin"))
        bed.hosts[0].docker("network", "create", "-d", "freeflow:latest", "n")

`python -m testbed up|down|run` does it from a shell. Start with `bed.py`, then `host.py`.
"""

from testbed.bed import Bed
from testbed.host import Host
from testbed.process import BedInUseError, CommandError, wait_until

__all__ = ["Bed", "BedInUseError", "CommandError", "Host", "wait_until"]
