"""The block device: its configuration, its image, what its storage says. Its I/O is the data plane's, in blk/."""
