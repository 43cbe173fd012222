"""The shorter way of the overlay's packets through the kernel: programs, maps, and what the running kernel takes of it.

`overlay.bpf.c` is what runs per packet, `overlay.h` and `layout.py` what it shares with us. `probe.py` finds out what the
kernel can do. What attaches the programs to devices is the driver's: `driver/kernel/shortcut.py`.
"""
