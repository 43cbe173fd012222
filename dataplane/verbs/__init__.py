"""The libibverbs that containers preload; `symbols.py` makes what the linker needs of it."""
