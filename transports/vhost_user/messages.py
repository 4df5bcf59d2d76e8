"""The vhost-user message table: what the code, its tests and the documentation know about each request.

Numbers, sizes and rules follow the vhost-user protocol text ("Front-end message types", "Back-end
message types", "Protocol features"). A request that is not in ``MESSAGES`` is refused.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from virtio.spec import VIRTIO_F_RING_RESET

# Header flags ("Header").
VHOST_USER_VERSION: Final = 0x1
VHOST_USER_VERSION_MASK: Final = 0x3
VHOST_USER_REPLY_MASK: Final = 1 << 2
VHOST_USER_NEED_REPLY_MASK: Final = 1 << 3

# The virtio feature bit that announces protocol features; no driver ever sees it.
VHOST_USER_F_PROTOCOL_FEATURES: Final = 30

NEVER_OFFERED: Final = 1 << VIRTIO_F_RING_RESET
"""Virtio features that this transport cannot carry. No message tells a back-end that the driver reset one ring (seen:
QEMU 7.2 to 11.1 let the driver do it, and send nothing): the device would write into memory that is a ring no more."""

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

PROTOCOL_FEATURES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "VHOST_USER_PROTOCOL_F_MQ": VHOST_USER_PROTOCOL_F_MQ,
        "VHOST_USER_PROTOCOL_F_RARP": VHOST_USER_PROTOCOL_F_RARP,
        "VHOST_USER_PROTOCOL_F_REPLY_ACK": VHOST_USER_PROTOCOL_F_REPLY_ACK,
        "VHOST_USER_PROTOCOL_F_NET_MTU": VHOST_USER_PROTOCOL_F_NET_MTU,
        "VHOST_USER_PROTOCOL_F_BACKEND_REQ": VHOST_USER_PROTOCOL_F_BACKEND_REQ,
        "VHOST_USER_PROTOCOL_F_CONFIG": VHOST_USER_PROTOCOL_F_CONFIG,
        "VHOST_USER_PROTOCOL_F_RESET_DEVICE": VHOST_USER_PROTOCOL_F_RESET_DEVICE,
        "VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS": VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
        "VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS": VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
        "VHOST_USER_PROTOCOL_F_STATUS": VHOST_USER_PROTOCOL_F_STATUS,
    }
)
"""What this back-end offers, by name. A bit is here only when everything it promises is implemented:
QEMU acknowledges any bit it has a number for, also bits it does not honour afterwards."""

OFFERED_PROTOCOL_FEATURES: Final = sum(1 << bit for bit in PROTOCOL_FEATURES.values())


_OF_NETWORK_INTERFACES: Final = 1 << VHOST_USER_PROTOCOL_F_RARP | 1 << VHOST_USER_PROTOCOL_F_NET_MTU


def offered_protocol_features(
    *, has_config_space: bool, is_network_interface: bool, inband_notifications: bool = False
) -> int:
    """The protocol features of a device; QEMU warns of CONFIG where it expects no config space (rng).

    In-band notifications only where they are asked for: QEMU acknowledges the bit and knows none of the messages.
    """
    withheld = 0 if has_config_space else 1 << VHOST_USER_PROTOCOL_F_CONFIG
    if not is_network_interface:
        withheld |= _OF_NETWORK_INTERFACES
    if not inband_notifications:
        withheld |= 1 << VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS
    return OFFERED_PROTOCOL_FEATURES & ~withheld


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

# Front-end message types.
VHOST_USER_GET_FEATURES: Final = 1
VHOST_USER_SET_FEATURES: Final = 2
VHOST_USER_SET_OWNER: Final = 3
VHOST_USER_RESET_OWNER: Final = 4
VHOST_USER_SET_MEM_TABLE: Final = 5
VHOST_USER_SET_VRING_NUM: Final = 8
VHOST_USER_SET_VRING_ADDR: Final = 9
VHOST_USER_SET_VRING_BASE: Final = 10
VHOST_USER_GET_VRING_BASE: Final = 11
VHOST_USER_SET_VRING_KICK: Final = 12
VHOST_USER_SET_VRING_CALL: Final = 13
VHOST_USER_SET_VRING_ERR: Final = 14
VHOST_USER_GET_PROTOCOL_FEATURES: Final = 15
VHOST_USER_SET_PROTOCOL_FEATURES: Final = 16
VHOST_USER_GET_QUEUE_NUM: Final = 17
VHOST_USER_SET_VRING_ENABLE: Final = 18
VHOST_USER_SEND_RARP: Final = 19
VHOST_USER_NET_SET_MTU: Final = 20
VHOST_USER_SET_BACKEND_REQ_FD: Final = 21
VHOST_USER_IOTLB_MSG: Final = 22
VHOST_USER_GET_CONFIG: Final = 24
VHOST_USER_SET_CONFIG: Final = 25
VHOST_USER_RESET_DEVICE: Final = 34
VHOST_USER_VRING_KICK: Final = 35
VHOST_USER_GET_MAX_MEM_SLOTS: Final = 36
VHOST_USER_ADD_MEM_REG: Final = 37
VHOST_USER_REM_MEM_REG: Final = 38
VHOST_USER_SET_STATUS: Final = 39
VHOST_USER_GET_STATUS: Final = 40

# Back-end message types.
VHOST_USER_BACKEND_IOTLB_MSG: Final = 1
VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: Final = 2
VHOST_USER_BACKEND_VRING_CALL: Final = 4
VHOST_USER_BACKEND_VRING_ERR: Final = 5


class Payload(enum.Enum):
    """The shapes a payload can have; ``payloads.parse_payload`` knows each of them."""

    NOTHING = enum.auto()
    U64 = enum.auto()
    VRING_STATE = enum.auto()
    VRING_ADDR = enum.auto()
    VRING_FD = enum.auto()
    MEMORY_TABLE = enum.auto()
    MEMORY_REGION = enum.auto()
    IOTLB = enum.auto()
    CONFIG = enum.auto()
    ANYTHING = enum.auto()  # of a request that is refused whatever it says


SIZES: Final[Mapping[Payload, int]] = MappingProxyType(
    {
        Payload.NOTHING: 0,
        Payload.U64: 8,
        Payload.VRING_STATE: 8,
        Payload.VRING_ADDR: 40,
        Payload.VRING_FD: 8,
        Payload.MEMORY_TABLE: 8,  # and 32 for each region that it announces
        Payload.MEMORY_REGION: 40,
        Payload.IOTLB: 32,  # struct vhost_iotlb_msg with its tail padding, as every peer sends it
        Payload.CONFIG: 12,  # and the bytes of the config space
        Payload.ANYTHING: 0,
    }
)
"""The bytes that a payload of each shape has at least. Some front-ends send more, as User-mode Linux does with room for
regions that it does not announce: the excess has no meaning."""

VHOST_USER_MAX_PAYLOAD: Final = 12 + VHOST_USER_MAX_CONFIG_SIZE  # a config access; a table of 8 regions is shorter
VHOST_USER_MAX_UNKNOWN_PAYLOAD: Final = 4096  # of a request that is refused, so that its payload is skipped

NO_FD: Final = range(1)
ONE_FD: Final = range(1, 2)
NO_OR_ONE_FD: Final = range(2)


class Reply(enum.Enum):
    """When a request is answered ("Communication" and "VHOST_USER_PROTOCOL_F_REPLY_ACK")."""

    ALWAYS = enum.auto()  # it solicits a reply of its own; NEED_REPLY changes nothing
    ALWAYS_STATUS = enum.auto()  # likewise, and the reply is a u64, zero for success
    ON_REQUEST = enum.auto()  # with the NEED_REPLY flag only: u64, zero for success


@dataclass(frozen=True, slots=True)
class Message:
    """One row of the table.

    ``fds`` are the numbers of descriptors that may come with the request, ``answer`` is the shape of
    a reply, ``feature`` the protocol feature that the request belongs to: it must have been offered. Whether the
    front-end has accepted it is not asked, nor whether SET_OWNER or SET_FEATURES came before: peers ask neither, and
    DPDK's server mode sends SET_STATUS to a back-end that came back before it negotiates, and SET_OWNER never again.
    """

    number: int
    name: str
    payload: Payload
    fds: range = NO_FD
    reply: Reply = Reply.ON_REQUEST
    answer: Payload = Payload.U64
    feature: int | None = None

    @property
    def sizes(self) -> range:
        """Legal payload sizes in bytes."""
        unknown = self.payload is Payload.ANYTHING
        return range(SIZES[self.payload], (VHOST_USER_MAX_UNKNOWN_PAYLOAD if unknown else VHOST_USER_MAX_PAYLOAD) + 1)


_ROWS: Final = (
    Message(
        VHOST_USER_GET_FEATURES,
        "VHOST_USER_GET_FEATURES",
        Payload.NOTHING,
        reply=Reply.ALWAYS,
    ),
    Message(VHOST_USER_SET_FEATURES, "VHOST_USER_SET_FEATURES", Payload.U64),
    Message(VHOST_USER_SET_OWNER, "VHOST_USER_SET_OWNER", Payload.NOTHING),
    Message(VHOST_USER_RESET_OWNER, "VHOST_USER_RESET_OWNER", Payload.NOTHING),
    Message(
        VHOST_USER_SET_MEM_TABLE,
        "VHOST_USER_SET_MEM_TABLE",
        Payload.MEMORY_TABLE,
        fds=range(VHOST_MEMORY_MAX_NREGIONS + 1),
    ),
    Message(VHOST_USER_SET_VRING_NUM, "VHOST_USER_SET_VRING_NUM", Payload.VRING_STATE),
    Message(VHOST_USER_SET_VRING_ADDR, "VHOST_USER_SET_VRING_ADDR", Payload.VRING_ADDR),
    Message(VHOST_USER_SET_VRING_BASE, "VHOST_USER_SET_VRING_BASE", Payload.VRING_STATE),
    Message(
        VHOST_USER_GET_VRING_BASE,
        "VHOST_USER_GET_VRING_BASE",
        Payload.VRING_STATE,
        reply=Reply.ALWAYS,
        answer=Payload.VRING_STATE,
    ),
    Message(
        VHOST_USER_SET_VRING_KICK,
        "VHOST_USER_SET_VRING_KICK",
        Payload.VRING_FD,
        fds=NO_OR_ONE_FD,
    ),
    Message(VHOST_USER_SET_VRING_CALL, "VHOST_USER_SET_VRING_CALL", Payload.VRING_FD, fds=NO_OR_ONE_FD),
    Message(VHOST_USER_SET_VRING_ERR, "VHOST_USER_SET_VRING_ERR", Payload.VRING_FD, fds=NO_OR_ONE_FD),
    Message(
        VHOST_USER_GET_PROTOCOL_FEATURES,
        "VHOST_USER_GET_PROTOCOL_FEATURES",
        Payload.NOTHING,
        reply=Reply.ALWAYS,
    ),
    Message(
        VHOST_USER_SET_PROTOCOL_FEATURES,
        "VHOST_USER_SET_PROTOCOL_FEATURES",
        Payload.U64,
    ),
    Message(
        VHOST_USER_GET_QUEUE_NUM,
        "VHOST_USER_GET_QUEUE_NUM",
        Payload.NOTHING,
        reply=Reply.ALWAYS,
        feature=VHOST_USER_PROTOCOL_F_MQ,
    ),
    Message(VHOST_USER_SET_VRING_ENABLE, "VHOST_USER_SET_VRING_ENABLE", Payload.VRING_STATE),
    Message(
        VHOST_USER_SEND_RARP,
        "VHOST_USER_SEND_RARP",
        Payload.U64,
        feature=VHOST_USER_PROTOCOL_F_RARP,
    ),
    Message(
        VHOST_USER_NET_SET_MTU,
        "VHOST_USER_NET_SET_MTU",
        Payload.U64,
        feature=VHOST_USER_PROTOCOL_F_NET_MTU,
    ),
    Message(
        VHOST_USER_SET_BACKEND_REQ_FD,
        "VHOST_USER_SET_BACKEND_REQ_FD",
        Payload.NOTHING,
        fds=ONE_FD,
        feature=VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    ),
    # Acknowledged always, whether or not REPLY_ACK was negotiated ("VHOST_USER_IOTLB_MSG").
    Message(
        VHOST_USER_IOTLB_MSG,
        "VHOST_USER_IOTLB_MSG",
        Payload.IOTLB,
        reply=Reply.ALWAYS_STATUS,
    ),
    Message(
        VHOST_USER_GET_CONFIG,
        "VHOST_USER_GET_CONFIG",
        Payload.CONFIG,
        reply=Reply.ALWAYS,
        answer=Payload.CONFIG,
        feature=VHOST_USER_PROTOCOL_F_CONFIG,
    ),
    Message(
        VHOST_USER_SET_CONFIG,
        "VHOST_USER_SET_CONFIG",
        Payload.CONFIG,
        feature=VHOST_USER_PROTOCOL_F_CONFIG,
    ),
    Message(
        VHOST_USER_RESET_DEVICE,
        "VHOST_USER_RESET_DEVICE",
        Payload.NOTHING,
        feature=VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    ),
    Message(
        VHOST_USER_VRING_KICK,
        "VHOST_USER_VRING_KICK",
        Payload.VRING_STATE,
        feature=VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS,
    ),
    Message(
        VHOST_USER_GET_MAX_MEM_SLOTS,
        "VHOST_USER_GET_MAX_MEM_SLOTS",
        Payload.NOTHING,
        reply=Reply.ALWAYS,
        feature=VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    ),
    Message(
        VHOST_USER_ADD_MEM_REG,
        "VHOST_USER_ADD_MEM_REG",
        Payload.MEMORY_REGION,
        fds=ONE_FD,
        feature=VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    ),
    # A descriptor is not needed here; one is tolerated and closed unused ("VHOST_USER_REM_MEM_REG").
    Message(
        VHOST_USER_REM_MEM_REG,
        "VHOST_USER_REM_MEM_REG",
        Payload.MEMORY_REGION,
        fds=NO_OR_ONE_FD,
        feature=VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    ),
    Message(
        VHOST_USER_SET_STATUS,
        "VHOST_USER_SET_STATUS",
        Payload.U64,
        feature=VHOST_USER_PROTOCOL_F_STATUS,
    ),
    Message(
        VHOST_USER_GET_STATUS,
        "VHOST_USER_GET_STATUS",
        Payload.NOTHING,
        reply=Reply.ALWAYS,
        feature=VHOST_USER_PROTOCOL_F_STATUS,
    ),
)

MESSAGES: Final[Mapping[int, Message]] = MappingProxyType({row.number: row for row in _ROWS})
"""Every request this back-end answers, by number."""

UNSUPPORTED: Final[Mapping[int, str]] = MappingProxyType(
    {
        6: "VHOST_USER_SET_LOG_BASE",
        7: "VHOST_USER_SET_LOG_FD",
        23: "VHOST_USER_SET_VRING_ENDIAN",
        26: "VHOST_USER_CREATE_CRYPTO_SESSION",
        27: "VHOST_USER_CLOSE_CRYPTO_SESSION",
        28: "VHOST_USER_POSTCOPY_ADVISE",
        29: "VHOST_USER_POSTCOPY_LISTEN",
        30: "VHOST_USER_POSTCOPY_END",
        31: "VHOST_USER_GET_INFLIGHT_FD",
        32: "VHOST_USER_SET_INFLIGHT_FD",
        33: "VHOST_USER_GPU_SET_SOCKET",
        41: "VHOST_USER_GET_SHARED_OBJECT",
        42: "VHOST_USER_SET_DEVICE_STATE_FD",
        43: "VHOST_USER_CHECK_DEVICE_STATE",
    }
)
"""Requests the text knows and this back-end never offers; kept for their names in error messages."""

UNKNOWN_REQUEST: Final = "unknown"


def unserved(number: int) -> Message:
    """The row of a request that is not in ``MESSAGES``: whatever it brings is skipped."""
    name = UNSUPPORTED.get(number, UNKNOWN_REQUEST)
    return Message(number, name, Payload.ANYTHING, fds=range(VHOST_USER_MAX_FDS + 1))
