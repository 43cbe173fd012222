"""The router pairs the two ends of a connection, checks both with the kernel, and hands out shared memory.

    server.py      sockets in and out, one thread          listing.py   which path each connection takes
    pairing.py     who is paired with whom; no I/O         sockets.py   what the kernel knows of a socket
    knowledge.py   endpoints and VIPs, from the driver     memory.py    arenas as sealed memfds
    wire.py        the messages of library/protocol.h      control.py   the messages of the driver
    loop.py        descriptors and times of the parts      peers.py     sessions with other hosts' routers
    identity.py    this host's certificate                 session.py   one TLS connection
    shared_key.py  certificates out of a secret            peer_wire.py the messages of a session

It trusts no container: who speaks is the kernel's word, every field is checked, and nothing that a client does makes
the loop wait. Connections that run over shared memory don't need it: it may die and start again at any time.
"""
