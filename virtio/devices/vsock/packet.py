"""The packets of the socket device (section 5.10.6): a header of 44 bytes, and data behind it."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

VIRTIO_VSOCK_OP_REQUEST: Final = 1
VIRTIO_VSOCK_OP_RESPONSE: Final = 2
VIRTIO_VSOCK_OP_RST: Final = 3
VIRTIO_VSOCK_OP_SHUTDOWN: Final = 4
VIRTIO_VSOCK_OP_RW: Final = 5
VIRTIO_VSOCK_OP_CREDIT_UPDATE: Final = 6
VIRTIO_VSOCK_OP_CREDIT_REQUEST: Final = 7

VIRTIO_VSOCK_TYPE_STREAM: Final = 1
VIRTIO_VSOCK_TYPE_SEQPACKET: Final = 2

VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: Final = 1
VIRTIO_VSOCK_SHUTDOWN_F_SEND: Final = 2
SHUTDOWN_BOTH: Final = VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE | VIRTIO_VSOCK_SHUTDOWN_F_SEND

VIRTIO_VSOCK_SEQ_EOM: Final = 1
VIRTIO_VSOCK_SEQ_EOR: Final = 2

CID_HOST: Final = 2
CID_FIRST_GUEST: Final = 3
CID_LAST_GUEST: Final = 0xFFFF_FFFE

# struct virtio_vsock_hdr, all little-endian.
_HEADER: Final = struct.Struct("<QQIIIHHIII")
HEADER_SIZE: Final = _HEADER.size


class Key(NamedTuple):
    """What tells the connections of one guest apart (5.10.6)."""

    guest_port: int
    peer_cid: int
    peer_port: int
    type: int


class Packet(NamedTuple):
    """The header of a packet; the fields are named as in the specification, in its order."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    @classmethod
    def parse(cls, raw: bytes) -> Packet | None:
        """The header that ``raw`` begins with; ``None`` if it is too short for one."""
        return cls._make(_HEADER.unpack_from(raw)) if len(raw) >= HEADER_SIZE else None

    def pack(self) -> bytes:
        return _HEADER.pack(*self)
