"""A network in user space (libslirp), in a process of its own for each device.

libslirp reads what a guest sends, opens files for it and is not ours: so it sees no other guest's memory, its files are
limited, and when it ends, only that guest's connections do. ``python -m virtio.usernet`` is that process;
``virtio.devices.net.user`` starts it.
"""
