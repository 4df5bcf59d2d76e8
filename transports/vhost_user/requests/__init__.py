"""The requests of a front-end: one small frozen class for each, beside its relatives, and ``table`` with all of them.

A class says what its message looks like (``message``), what it asks for in a connection's state (``plan``), how that is
done (``perform``, with nothing but the waist), what is different afterwards (``commit``) and what is said (``answer``).
Not here: bytes (``wire``), I/O, the order of requests (``session``), and descriptors that no request keeps.
"""
