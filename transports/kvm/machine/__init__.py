"""A virtual machine with our devices: the registers that its guest touches, the eventfds between them and the waist.

Not here: running vCPUs (``vm``), loading a kernel (``boot``).
"""
