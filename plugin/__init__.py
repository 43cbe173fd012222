"""How Docker reaches us: the libnetwork HTTP API, settings, start-up, metrics and the `freeflow` command.

Knows nothing of how a network is made. Read on in `app.py`.
"""
