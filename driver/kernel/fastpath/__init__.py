"""The eBPF fast path: forwards the overlay's packets past bridge, VXLAN device and netfilter.

`fastpath.py` opens it and holds the locks, `endpoints.py` writes the map entries of this host's
containers, `attachments.py` attaches their programs, `neighbours.py` keeps peers and learned
addresses, `tunnel.py` turns encapsulation on and off, `reader.py` reads all of them for status,
ping and metrics. The programs and the maps themselves are in `dataplane/ebpf`.
"""

from driver.kernel.fastpath.fastpath import FastPath
from driver.kernel.fastpath.reader import Stage

__all__ = ["FastPath", "Stage"]
