"""Whether netfilter sees the packets that a bridge forwards: br_netfilter's settings.

https://docs.kernel.org/networking/ip-sysctl.html, bridge-nf-call-iptables; a bridge's own are
nf_call_iptables and nf_call_ip6tables in its directory of sysfs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_ALL: Final = {4: "bridge-nf-call-iptables", 6: "bridge-nf-call-ip6tables"}
_OWN: Final = {4: "nf_call_iptables", 6: "nf_call_ip6tables"}


def is_filtered(bridge: str, version: int, root: Path = Path("/")) -> bool:
    """Whether packets of this IP version pass the hooks of this process's network namespace.

    A setting that can't be read counts as on.
    """
    settings = root / "proc/sys/net/bridge"
    if not settings.exists():
        # br_netfilter isn't loaded.
        return False
    own = root / "sys/class/net" / bridge / "bridge" / _OWN[version]
    return _is_on(settings / _ALL[version]) or _is_on(own)


def _is_on(path: Path) -> bool:
    try:
        return path.read_text().strip() != "0"
    except OSError:
        return True
