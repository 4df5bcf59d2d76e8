"""The vhost-user transport, back-end side.

``wire`` makes messages of bytes, ``state`` is what a connection has agreed on, ``requests`` has a class for each
request, ``session`` is the protocol of one connection, without I/O, and ``serving`` the part with sockets. Each knows
only those before it.
"""
