"""The transport for virtual machines of our own: virtio-mmio devices in a guest that this process runs with KVM."""
