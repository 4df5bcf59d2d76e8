"""The waist's other side: one device as one driver sees it. Queues start, stop, break and are reset here.

Not here: rings and threads (``native``), what a request means (``devices``), any wire (``transports``).
"""
