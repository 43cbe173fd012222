"""The libibverbs that containers preload: its symbols, its records, and programs that use it."""
