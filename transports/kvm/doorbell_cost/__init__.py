"""The measurement behind ``hyperbell doorbells``: a VM whose guest only rings, and what each kind of doorbell costs it.

Not here: the report and its table (the daemon's), the guest's own code (``native/ring_guest.c``).
"""
