"""Fixtures of the device tests."""

from blk_driver import disk_folder, image

__all__ = ["disk_folder", "image"]
