"""Constants of the virtio specification (1.3), spelled as there."""

from __future__ import annotations

from typing import Final

# Device types, section 5.
VIRTIO_ID_NET: Final = 1
VIRTIO_ID_BLOCK: Final = 2
VIRTIO_ID_CONSOLE: Final = 3
VIRTIO_ID_RNG: Final = 4
VIRTIO_ID_INPUT: Final = 18
VIRTIO_ID_I2C_ADAPTER: Final = 34
VIRTIO_ID_GPIO: Final = 41
VIRTIO_ID_VSOCK: Final = 19

# Device status field, section 2.1.
VIRTIO_CONFIG_S_ACKNOWLEDGE: Final = 1
VIRTIO_CONFIG_S_DRIVER: Final = 2
VIRTIO_CONFIG_S_DRIVER_OK: Final = 4
VIRTIO_CONFIG_S_FEATURES_OK: Final = 8
VIRTIO_CONFIG_S_NEEDS_RESET: Final = 64
VIRTIO_CONFIG_S_FAILED: Final = 128

# Reserved feature bits, section 6 (bit numbers).
VIRTIO_F_NOTIFY_ON_EMPTY: Final = 24
VIRTIO_F_ANY_LAYOUT: Final = 27
VIRTIO_F_INDIRECT_DESC: Final = 28
VIRTIO_F_EVENT_IDX: Final = 29
VIRTIO_F_VERSION_1: Final = 32
VIRTIO_F_ACCESS_PLATFORM: Final = 33
VIRTIO_F_RING_PACKED: Final = 34
VIRTIO_F_IN_ORDER: Final = 35
VIRTIO_F_ORDER_PLATFORM: Final = 36
VIRTIO_F_NOTIFICATION_DATA: Final = 38
VIRTIO_F_RING_RESET: Final = 40

RING_FEATURES: Final[dict[str, int]] = {
    "VIRTIO_F_INDIRECT_DESC": VIRTIO_F_INDIRECT_DESC,
    "VIRTIO_F_EVENT_IDX": VIRTIO_F_EVENT_IDX,
    "VIRTIO_F_VERSION_1": VIRTIO_F_VERSION_1,
    "VIRTIO_F_ACCESS_PLATFORM": VIRTIO_F_ACCESS_PLATFORM,
    "VIRTIO_F_RING_PACKED": VIRTIO_F_RING_PACKED,
    "VIRTIO_F_RING_RESET": VIRTIO_F_RING_RESET,
}

# Virtqueue sizes, sections 2.7 and 2.8.
VIRTQUEUE_SIZE_MAX: Final = 32768
CHAIN_LENGTH_MAX: Final = 0xFFFF_FFFF
"""Bytes of one chain: what the data plane takes; 2.7.4.2 has a limit of 2^32."""
CONFIG_SPACE_MAX: Final = 256
