"""Bytes and descriptors to values and back: numbers, payloads, whole messages.

Not here: what a request means, or whether it may come now (``requests``).
"""
