"""Payloads of vhost-user messages: bytes to frozen dataclasses and back, in one place.

All numbers travel in the machine's byte order ("Message Specification"). Sizes were checked against
``message.SIZES`` before anything is parsed here; what is checked here is a payload's agreement with
itself (``PeerError`` when it contradicts itself).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from construct import Int8un, Int32un, Int64un, Padding, Struct

from transports.vhost_user.wire.numbers import (
    VHOST_USER_MAX_CONFIG_SIZE,
    VHOST_USER_REPLY_MASK,
    VHOST_USER_VERSION,
    VHOST_USER_VRING_IDX_MASK,
    VHOST_USER_VRING_NOFD_MASK,
)
from virtio.errors import PeerError

HEADER_SIZE: Final = 12
REGION_SIZE: Final = 32
CONFIG_HEADER_SIZE: Final = 12

_HEADER: Final = Struct("request" / Int32un, "flags" / Int32un, "size" / Int32un).compile()
_U64: Final = Struct("value" / Int64un).compile()
_VRING_STATE: Final = Struct("index" / Int32un, "num" / Int32un).compile()
_VRING_ADDR: Final = Struct(
    "index" / Int32un,
    "flags" / Int32un,
    "descriptor" / Int64un,
    "used" / Int64un,
    "available" / Int64un,
    "log" / Int64un,
).compile()
_REGION: Final = Struct("gpa" / Int64un, "size" / Int64un, "uva" / Int64un, "offset" / Int64un).compile()
_TABLE_HEADER: Final = Struct("count" / Int32un, Padding(4)).compile()
_IOTLB: Final = Struct(
    "iova" / Int64un,
    "size" / Int64un,
    "uva" / Int64un,
    "perm" / Int8un,
    "type" / Int8un,
    Padding(6),
).compile()
_CONFIG: Final = Struct("offset" / Int32un, "size" / Int32un, "flags" / Int32un).compile()


@dataclass(frozen=True, slots=True)
class Header:
    """The 12 bytes before every payload; ``size`` counts the payload's bytes."""

    request: int
    flags: int
    size: int


@dataclass(frozen=True, slots=True)
class VringState:
    """A vring state description; ``num`` is a size, a base or a truth value, as the request says."""

    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddr:
    """A vring address description; addresses are user addresses, or IOVAs with VIRTIO_F_ACCESS_PLATFORM."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log_gpa: int


@dataclass(frozen=True, slots=True)
class VringFd:
    """The u64 of SET_VRING_KICK, _CALL and _ERR; ``reserved`` are the bits without a meaning."""

    index: int
    has_fd: bool
    reserved: int


@dataclass(frozen=True, slots=True)
class RegionDescription:
    """A memory region as the front-end describes it, all in bytes; ``offset`` lies in the fd's file."""

    gpa: int
    size: int
    uva: int
    offset: int


@dataclass(frozen=True, slots=True)
class IotlbMessage:
    """``struct vhost_iotlb_msg``."""

    iova: int
    size: int
    uva: int
    perm: int
    type: int


@dataclass(frozen=True, slots=True)
class ConfigAccess:
    """An access of ``len(data)`` bytes at ``offset`` of the config space."""

    offset: int
    flags: int
    data: bytes


def parse_header(data: bytes) -> Header:
    """The header in the first ``HEADER_SIZE`` bytes; nothing in it is checked yet."""
    raw = _HEADER.parse(data[:HEADER_SIZE])
    return Header(raw.request, raw.flags, raw.size)


def parse_u64(data: bytes) -> int:
    value: int = _U64.parse(data).value
    return value


def parse_vring_state(data: bytes) -> VringState:
    raw = _VRING_STATE.parse(data)
    return VringState(raw.index, raw.num)


def parse_vring_addr(data: bytes) -> VringAddr:
    raw = _VRING_ADDR.parse(data)
    return VringAddr(raw.index, raw.flags, raw.descriptor, raw.used, raw.available, raw.log)


def parse_vring_fd(data: bytes) -> VringFd:
    value = parse_u64(data)
    return VringFd(
        index=value & VHOST_USER_VRING_IDX_MASK,
        has_fd=not value & VHOST_USER_VRING_NOFD_MASK,
        reserved=value & ~(VHOST_USER_VRING_IDX_MASK | VHOST_USER_VRING_NOFD_MASK),
    )


def _parse_region(data: bytes) -> RegionDescription:
    raw = _REGION.parse(data)
    return RegionDescription(raw.gpa, raw.size, raw.uva, raw.offset)


def parse_memory_region(data: bytes) -> RegionDescription:
    return _parse_region(data[8:])  # after 8 bytes of padding


def parse_memory_table(data: bytes) -> tuple[RegionDescription, ...]:
    count: int = _TABLE_HEADER.parse(data[:8]).count
    room = (len(data) - 8) // REGION_SIZE
    if count > room:
        raise PeerError(f"announces {count} regions in a payload that holds {room}")
    starts = range(8, 8 + count * REGION_SIZE, REGION_SIZE)
    return tuple(_parse_region(data[at : at + REGION_SIZE]) for at in starts)


def parse_iotlb(data: bytes) -> IotlbMessage:
    raw = _IOTLB.parse(data)
    return IotlbMessage(raw.iova, raw.size, raw.uva, raw.perm, raw.type)


def parse_config(data: bytes, *, to_read: bool) -> ConfigAccess:
    """``to_read``: the bytes themselves have no meaning, so they need not be there."""
    raw = _CONFIG.parse(data)
    content = data[CONFIG_HEADER_SIZE:]
    if raw.size > len(content):
        if not to_read or raw.size > VHOST_USER_MAX_CONFIG_SIZE:
            raise PeerError(f"announces {raw.size} bytes of config space in a payload that holds {len(content)}")
        content = bytes(raw.size)
    return ConfigAccess(raw.offset, raw.flags, content[: raw.size])


def build_message(request: int, flags: int, payload: bytes = b"") -> bytes:
    """Header and payload of a message of ours; the version is added to ``flags``."""
    return _build(_HEADER, request=request, flags=VHOST_USER_VERSION | flags, size=len(payload)) + payload


def build_reply(request: int, payload: bytes) -> bytes:
    """The reply to ``request``; it carries the request's own number."""
    return build_message(request, VHOST_USER_REPLY_MASK, payload)


def build_u64(value: int) -> bytes:
    return _build(_U64, value=value)


def build_vring_state(index: int, num: int) -> bytes:
    return _build(_VRING_STATE, index=index, num=num)


def build_config(access: ConfigAccess) -> bytes:
    return _build(_CONFIG, offset=access.offset, size=len(access.data), flags=access.flags) + access.data


def build_iotlb(message: IotlbMessage) -> bytes:
    return _build(_IOTLB, iova=message.iova, size=message.size, uva=message.uva, perm=message.perm, type=message.type)


def _build(shape: Any, **fields: int) -> bytes:
    built: bytes = shape.build(fields)
    return built
