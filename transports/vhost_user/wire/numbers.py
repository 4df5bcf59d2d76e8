"""The vhost-user protocol's numbers: header flags, protocol features, limits, and the parts of payloads.

They follow the protocol text ("Header", "Protocol features"). A request's own number is in its row (``requests``).
"""

from __future__ import annotations

from typing import Final

# Header flags ("Header").
VHOST_USER_VERSION: Final = 0x1
VHOST_USER_VERSION_MASK: Final = 0x3
VHOST_USER_REPLY_MASK: Final = 1 << 2
VHOST_USER_NEED_REPLY_MASK: Final = 1 << 3

# The virtio feature bit that announces protocol features; no driver ever sees it.
VHOST_USER_F_PROTOCOL_FEATURES: Final = 30

# Protocol features (bit numbers).
VHOST_USER_PROTOCOL_F_MQ: Final = 0
VHOST_USER_PROTOCOL_F_RARP: Final = 2
VHOST_USER_PROTOCOL_F_REPLY_ACK: Final = 3
VHOST_USER_PROTOCOL_F_NET_MTU: Final = 4
VHOST_USER_PROTOCOL_F_BACKEND_REQ: Final = 5
VHOST_USER_PROTOCOL_F_CONFIG: Final = 9
VHOST_USER_PROTOCOL_F_RESET_DEVICE: Final = 13
VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS: Final = 14
VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS: Final = 15
VHOST_USER_PROTOCOL_F_STATUS: Final = 16

# Limits.
VHOST_USER_MAX_FDS: Final = 8  # in one message: one for each region of SET_MEM_TABLE
VHOST_MEMORY_MAX_NREGIONS: Final = 8  # in one SET_MEM_TABLE ("Multiple Memory regions description")
VHOST_USER_MAX_RAM_SLOTS: Final = 509  # with CONFIGURE_MEM_SLOTS; must never shrink across a reconnect
VHOST_USER_MAX_CONFIG_SIZE: Final = 256

# SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR: the u64 of the payload.
VHOST_USER_VRING_IDX_MASK: Final = 0xFF
VHOST_USER_VRING_NOFD_MASK: Final = 1 << 8

# Flags of SET_CONFIG.
VHOST_SET_CONFIG_TYPE_FRONTEND: Final = 0
VHOST_SET_CONFIG_TYPE_MIGRATION: Final = 1

# Types of an IOTLB message ("An IOTLB message").
VHOST_IOTLB_MISS: Final = 1
VHOST_IOTLB_UPDATE: Final = 2
VHOST_IOTLB_INVALIDATE: Final = 3

# Back-end message types.
VHOST_USER_BACKEND_IOTLB_MSG: Final = 1
VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: Final = 2
VHOST_USER_BACKEND_VRING_CALL: Final = 4
VHOST_USER_BACKEND_VRING_ERR: Final = 5
