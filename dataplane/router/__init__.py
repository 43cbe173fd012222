"""The router of a host: it pairs the two ends of connections and hands out shared memory.

It trusts no container: the kernel says which container a process is in and which sockets exist,
every field of a message is checked, and nothing that a client does makes the loop wait.
Connections in shared memory don't need the router: it may end and start again at any time.

Start with `router_server.py`, `clients.py` and `pairing.py`; docs/files.md lists all files.
"""
