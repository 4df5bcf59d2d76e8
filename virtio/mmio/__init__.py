"""virtio-mmio's registers (virtio 1.3, 4.2.2), without any I/O. The transport carries out the rest."""
