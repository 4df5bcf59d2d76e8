"""Stock QEMU's hypercall doorbell, both ends of one wire: the library in QEMU, and the daemon it reports to.

No transport of a device: QEMU's devices come by ``vhost_user``. ``messages`` is the wire, ``vms`` the state and the
rules (without I/O), ``descriptors`` looks at what came with a message, ``server`` is the socket, ``library`` the C.
"""
