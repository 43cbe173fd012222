"""`freeflow test`: proves that a Swarm's network works, by probes on its hosts.

Read `plan.py` (which checks there are), `placement.py` (what is made in the Swarm, and removed),
`gateway.py` (how this host speaks to probes), `coordinator.py` (the order), then the `checks_*.py`.
`probe/` is the code that runs in the containers.
"""
