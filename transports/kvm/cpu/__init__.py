"""Processors: what a guest's CPUID says, and what the processor under this process is.

Not here: what /dev/kvm can do (``host``).
"""
