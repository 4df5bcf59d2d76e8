"""One guest: what it is built of (kernel modules, programs, root, initramfs), QEMU or User-mode Linux, its console.

Not here: where kernels come from (``debian``), guests that run guests (``nested``).
"""
