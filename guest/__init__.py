"""The real-guest side: what runs inside guests, and what builds and boots them. Nothing here is installed.

``debian`` fetches, ``boot`` builds and boots, ``nested`` boots guests in guests; ``programs``, ``toy`` and ``linux``
run inside of guests, and ``demo`` (``python -m guest.demo``) puts them together.
"""
