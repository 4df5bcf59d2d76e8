"""The network device: its configuration and its back ends' host side. Frames are the data plane's (``dataplane/net``).

Not here: the process that runs libslirp (``virtio.usernet``), which must not load any device.
"""
