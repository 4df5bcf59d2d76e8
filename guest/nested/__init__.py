"""Guests in guests: an emulated host whose mainline KVM runs machines that run machines.

Not here: a single guest on this machine (``boot``).
"""
