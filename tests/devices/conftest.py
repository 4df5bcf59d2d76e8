"""Fixtures of the device tests."""

from blk_driver import image

__all__ = ["image"]
