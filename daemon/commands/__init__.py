"""The commands of ``hyperbell``: a file for each, with its options, its help and what it does; ``table`` lists them.

Not here: what the commands stand on (``running``, ``microvm``, ``attach``, ``checks``, ``doorbells``).
"""
