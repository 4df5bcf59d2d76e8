"""A bare virtual machine: memory, vCPUs, doorbells, and how it ended. It knows no device.

Not here: what its registers mean (``machine``), the C that runs vCPUs (``native``).
"""
