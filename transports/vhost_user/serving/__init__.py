"""The thin trio part: sockets, the loop around a session, in-band notifications, the requests of our own.

Not here: the protocol (``session`` and below).
"""
