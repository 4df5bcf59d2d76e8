"""Fixtures of the unit tests."""

from ring_device import rings

__all__ = ["rings"]
