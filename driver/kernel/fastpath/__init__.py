"""The eBPF fast path of the overlay's packets, beside bridge and VXLAN device."""

from driver.kernel.fastpath.fastpath import FastPath, Stage

__all__ = ["FastPath", "Stage"]
