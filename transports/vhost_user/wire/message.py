"""What a request looks like on the wire: one row for each, and how a request is named that has none.

A row says what is legal without any state: payload, descriptors, reply. What a request means is with its class
(``requests``).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from transports.vhost_user.wire.numbers import VHOST_USER_MAX_CONFIG_SIZE, VHOST_USER_MAX_FDS


class Payload(enum.Enum):
    """The shapes a payload can have; ``payloads`` parses each of them."""

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
    """The row of a request that this back-end does not serve: whatever it brings is skipped."""
    name = UNSUPPORTED.get(number, UNKNOWN_REQUEST)
    return Message(number, name, Payload.ANYTHING, fds=range(VHOST_USER_MAX_FDS + 1))
