"""The plugin process: libnetwork's HTTP API, settings, start-up, metrics, the `freeflow` command.

Knows nothing of how a network is made. Read on in `app.py`.
"""
