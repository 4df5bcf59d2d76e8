"""Fixtures of the device tests."""

from kit.guest.blk import disk_folder, image

__all__ = ["disk_folder", "image"]
