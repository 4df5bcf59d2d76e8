"""What Debian's archives provide, of this machine's suite or another: fetched and unpacked, never installed.

Not here: what is made of it for a guest (``boot``).
"""
