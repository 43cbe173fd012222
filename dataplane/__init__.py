"""How bytes move between containers of one host: the library in the containers, the rings, the
router.

Knows nothing of Docker or HTTP. The driver speaks to the router through
`dataplane/router_client.py` alone.
"""
