"""The vhost-user transport, back-end side.

``session`` is the protocol without I/O: ``framing`` makes messages of bytes, ``messages`` is the table of
them, ``payloads`` their contents, ``rules`` what each may ask for in which ``state``, ``operations`` what it
then asks for. ``perform`` turns operations into verbs of the waist. ``connection``, ``backend_channel``, ``inband``
(kicks and calls by messages), ``endpoint`` and ``server`` are the thin trio part.
"""
