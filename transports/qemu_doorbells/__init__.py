"""The daemon's side of the preload library: which doorbells of stock QEMU's VMs get a connection id.

``messages`` is the wire, ``vms`` the state and the rules (both without I/O), ``descriptors`` looks at what came with
a message, ``server`` is the socket. What the library does is told in ``transports/preload/preload.h``.
"""
