"""The code that `freeflow test` runs in containers, with Python's standard library alone.

It gets there as text: `boot.py` passes it to Python in a variable, so that the image needs none of
FreeFlow's files. Read `probe_server.py`.
"""
