"""The protocol's rules for each request: a whole message and the connection's state in, an operation out.

``PeerError`` (without the request's name, the session adds it) for what the front-end must not send;
``Refuse`` for what it may send and cannot have. Nothing is changed here.

The order of messages is what peers really take, not what the text implies: only what could harm somebody is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from transports.vhost_user import messages, payloads
from transports.vhost_user.framing import Frame, why_unserved
from transports.vhost_user.operations import (
    Announce,
    Answer,
    DisableAllQueues,
    EnableQueue,
    GetStatus,
    IotlbInvalidate,
    IotlbUpdate,
    KickQueue,
    Operation,
    ReadConfig,
    Refuse,
    ResetDevice,
    SetBackendChannel,
    SetCall,
    SetErr,
    SetFeatures,
    SetKick,
    SetMemory,
    SetMtu,
    SetOwner,
    SetProtocolFeatures,
    SetStatus,
    StopDevice,
    StopQueue,
    WriteConfig,
)
from transports.vhost_user.state import ConnectionState
from transports.vhost_user.vrings import Vring
from virtio.errors import PeerError
from virtio.fd import OwnedFd
from virtio.waist import Permission

_U64_MAX: Final = 2**64 - 1
_INBAND: Final = 1 << messages.VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS
_BACKEND_REQ: Final = 1 << messages.VHOST_USER_PROTOCOL_F_BACKEND_REQ
_INBAND_NEEDS: Final = _BACKEND_REQ | 1 << messages.VHOST_USER_PROTOCOL_F_REPLY_ACK
_PROTOCOL_FEATURE_NAMES: Final = {bit: name for name, bit in messages.PROTOCOL_FEATURES.items()}


def plan(state: ConnectionState, frame: Frame) -> Operation:
    """What a whole message asks for, once its place in the conversation is right."""
    row = frame.message
    if row.number not in messages.MESSAGES:
        return Refuse(why_unserved(row))
    if row.feature is not None and not state.offered_protocol_features >> row.feature & 1:
        raise PeerError(f"belongs to {_PROTOCOL_FEATURE_NAMES[row.feature]}, which this device does not offer")
    try:
        return _PLANS[row.number](state, frame)
    except _NoSuchQueueError as error:
        return Refuse(str(error), missing_queue=error.index)


# --- negotiation ---


def _get_features(state: ConnectionState, frame: Frame) -> Operation:
    return Answer(state.offered_features)


def _set_features(state: ConnectionState, frame: Frame) -> Operation:
    # QEMU 7.2's vhost-user-input passes on what the guest accepted of QEMU's own offer, also what we never offer.
    bits = payloads.parse_u64(frame.payload) & ~messages.NEVER_OFFERED
    if extra := bits & ~state.offered_features:
        raise PeerError(f"feature bits {_bit_list(extra)} were not offered")
    # The same again changes nothing: QEMU repeats it for each queue pair of a network device.
    suspend = tuple(ring.index for ring in state.rings if ring.configured) if bits != state.features else ()
    return SetFeatures(bits, enable_all=not bits >> messages.VHOST_USER_F_PROTOCOL_FEATURES & 1, suspend=suspend)


def _get_protocol_features(state: ConnectionState, frame: Frame) -> Operation:
    return Answer(state.offered_protocol_features)


def _set_protocol_features(state: ConnectionState, frame: Frame) -> Operation:
    bits = payloads.parse_u64(frame.payload)
    if extra := bits & ~state.offered_protocol_features:
        raise PeerError(f"protocol feature bits {_bit_list(extra)} were not offered")
    if bits & _INBAND and bits & _INBAND_NEEDS != _INBAND_NEEDS:
        # "the back-end should close the connection" (VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS)
        raise PeerError(
            "VHOST_USER_PROTOCOL_F_INBAND_NOTIFICATIONS needs VHOST_USER_PROTOCOL_F_BACKEND_REQ and "
            "VHOST_USER_PROTOCOL_F_REPLY_ACK"
        )
    if not state.is_suspended and (bits ^ (state.protocol_features or 0)) & (_INBAND | _BACKEND_REQ):
        raise PeerError("how rings are kicked, and whether addresses are translated, cannot change while a ring runs")
    return SetProtocolFeatures(bits)


def _set_owner(state: ConnectionState, frame: Frame) -> Operation:
    return SetOwner()


def _reset_owner(state: ConnectionState, frame: Frame) -> Operation:
    return DisableAllQueues()


def _get_queue_num(state: ConnectionState, frame: Frame) -> Operation:
    return Answer(len(state.rings))


# --- memory ---


def _set_mem_table(state: ConnectionState, frame: Frame) -> Operation:
    return SetMemory(state.memory.with_all(payloads.parse_memory_table(frame.payload), frame.fds))


def _get_max_mem_slots(state: ConnectionState, frame: Frame) -> Operation:
    return Answer(messages.VHOST_USER_MAX_RAM_SLOTS)


def _add_mem_reg(state: ConnectionState, frame: Frame) -> Operation:
    description = payloads.parse_memory_region(frame.payload)
    if state.memory.has(description, frame.fds[0]):
        return Answer()
    regions = state.memory.with_added(description, frame.fds[0])
    if len(regions) > messages.VHOST_USER_MAX_RAM_SLOTS:
        return Refuse(f"all {messages.VHOST_USER_MAX_RAM_SLOTS} memory slots are taken")
    return SetMemory(regions)


def _rem_mem_reg(state: ConnectionState, frame: Frame) -> Operation:
    description = payloads.parse_memory_region(frame.payload)
    regions = state.memory.with_removed(description)
    if regions is None and state.repeats_memory:
        return Answer()
    if regions is None:
        return Refuse(f"there is no memory region of {description.size:#x} bytes at {description.gpa:#x}")
    return SetMemory(regions)


def _iotlb_msg(state: ConnectionState, frame: Frame) -> Operation:
    message = payloads.parse_iotlb(frame.payload)
    if not state.has_used_iotlb:
        raise PeerError(
            "VIRTIO_F_ACCESS_PLATFORM and VHOST_USER_PROTOCOL_F_BACKEND_REQ were not both negotiated: "
            "nothing is translated"
        )
    if not state.translates:
        # The late answer to a miss from before the device was stopped. Nobody would invalidate it any more.
        return Answer()
    if message.type == messages.VHOST_IOTLB_UPDATE:
        if message.perm > int(Permission.READ | Permission.WRITE):
            raise PeerError(f"unknown permissions {message.perm:#x}")
        if message.size == 0 or max(message.iova, message.uva) + message.size - 1 > _U64_MAX:
            raise PeerError(f"{message.size:#x} bytes at I/O address {message.iova:#x} are no range")
        if not state.memory.holds(message.uva, message.size):
            return Refuse(f"{message.size:#x} bytes at user address {message.uva:#x} lie outside the shared memory")
        return IotlbUpdate(message.iova, message.size, message.uva, message.perm)
    if message.type == messages.VHOST_IOTLB_INVALIDATE:
        # QEMU counts a size in 64 bits: an invalidation of the whole address space arrives as size 0.
        size = message.size or _U64_MAX - message.iova
        if message.iova + size - 1 > _U64_MAX:
            raise PeerError(f"{message.size:#x} bytes at I/O address {message.iova:#x} are no range")
        return IotlbInvalidate(message.iova, size)
    raise PeerError(f"IOTLB message type {message.type} is not for a front-end to send")


# --- rings ---


class _NoSuchQueueError(Exception):
    """One that a device of this protocol may have, and this device has not."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__(f"queue {index} does not exist; the device has {count}")
        self.index = index


def _ring(state: ConnectionState, index: int) -> Vring:
    if index > messages.VHOST_USER_VRING_IDX_MASK:
        raise PeerError(f"queue {index} does not exist; a device has {messages.VHOST_USER_VRING_IDX_MASK + 1} at most")
    if index >= len(state.rings):
        raise _NoSuchQueueError(index, len(state.rings))
    return state.rings[index]


def _set_vring_num(state: ConnectionState, frame: Frame) -> Operation:
    ring_state = payloads.parse_vring_state(frame.payload)
    ring = _ring(state, ring_state.index)
    return ring.plan_size(ring_state, size_max=state.queue_size_max)


def _set_vring_addr(state: ConnectionState, frame: Frame) -> Operation:
    addr = payloads.parse_vring_addr(frame.payload)
    return _ring(state, addr.index).plan_addresses(addr)


def _set_vring_base(state: ConnectionState, frame: Frame) -> Operation:
    ring_state = payloads.parse_vring_state(frame.payload)
    return _ring(state, ring_state.index).plan_base(ring_state, packed=state.is_packed)


def _get_vring_base(state: ConnectionState, frame: Frame) -> Operation:
    ring = _ring(state, payloads.parse_vring_state(frame.payload).index)
    is_last = state.running == (ring.index,)
    return StopQueue(
        ring.index,
        None if ring.configured else ring.current_base(packed=state.is_packed),
        started=ring.started,
        flush_iotlb=is_last and state.translates,
    )


def _set_vring_enable(state: ConnectionState, frame: Frame) -> Operation:
    ring_state = payloads.parse_vring_state(frame.payload)
    return EnableQueue(_ring(state, ring_state.index).index, bool(ring_state.num))


def _ring_and_fd(state: ConnectionState, frame: Frame) -> tuple[Vring, OwnedFd | None]:
    vring_fd = payloads.parse_vring_fd(frame.payload)
    if vring_fd.reserved:
        raise PeerError(f"reserved bits {vring_fd.reserved:#x} are set")
    ring = _ring(state, vring_fd.index)
    if vring_fd.has_fd and not frame.fds:
        raise PeerError("announces a file descriptor and brings none")
    return ring, frame.fds[0] if vring_fd.has_fd else None


def _set_vring_kick(state: ConnectionState, frame: Frame) -> Operation:
    ring, kick_fd = _ring_and_fd(state, frame)
    return SetKick(ring.index, kick_fd, enable=state.starts_enabled and not ring.enabled)


def _vring_kick(state: ConnectionState, frame: Frame) -> Operation:
    """The first one starts the ring, as a kick by a descriptor does ("Ring states")."""
    ring = _ring(state, payloads.parse_vring_state(frame.payload).index)
    if ring.started:
        return KickQueue(ring.index)
    return SetKick(ring.index, None, enable=state.starts_enabled and not ring.enabled)


def _set_vring_call(state: ConnectionState, frame: Frame) -> Operation:
    ring, call_fd = _ring_and_fd(state, frame)
    return SetCall(ring.index, call_fd)


def _set_vring_err(state: ConnectionState, frame: Frame) -> Operation:
    ring, err_fd = _ring_and_fd(state, frame)
    return SetErr(ring.index, err_fd)


# --- the device ---


def _get_config(state: ConnectionState, frame: Frame) -> Operation:
    access = payloads.parse_config(frame.payload, to_read=True)
    if reason := _config_fault(access):
        return Refuse(reason)
    return ReadConfig(access.offset, len(access.data), access.flags)


def _set_config(state: ConnectionState, frame: Frame) -> Operation:
    access = payloads.parse_config(frame.payload, to_read=False)
    if access.flags not in (messages.VHOST_SET_CONFIG_TYPE_FRONTEND, messages.VHOST_SET_CONFIG_TYPE_MIGRATION):
        raise PeerError(f"unknown flags {access.flags:#x}")
    if reason := _config_fault(access):
        return Refuse(reason)
    return WriteConfig(access.offset, access.data)


def _config_fault(access: payloads.ConfigAccess) -> str | None:
    if not access.data:
        return "an access to the config space of 0 bytes"
    if access.offset + len(access.data) > messages.VHOST_USER_MAX_CONFIG_SIZE:
        return f"{len(access.data)} bytes at offset {access.offset} lie beyond the config space"
    return None


def _reset_device(state: ConnectionState, frame: Frame) -> Operation:
    return ResetDevice()


def _set_status(state: ConnectionState, frame: Frame) -> Operation:
    status = payloads.parse_u64(frame.payload)
    if status > 0xFF:
        raise PeerError(f"{status:#x} is no device status (virtio 1.3, section 2.1)")
    if status:
        return SetStatus(status)
    return StopDevice(state.running, flush_iotlb=state.translates)


def _get_status(state: ConnectionState, frame: Frame) -> Operation:
    return GetStatus()


def _send_rarp(state: ConnectionState, frame: Frame) -> Operation:
    return Announce(frame.payload[:6])  # of the u64 its first 6 bytes in memory are the address


def _net_set_mtu(state: ConnectionState, frame: Frame) -> Operation:
    return SetMtu(payloads.parse_u64(frame.payload))


def _set_backend_req_fd(state: ConnectionState, frame: Frame) -> Operation:
    return SetBackendChannel(frame.fds[0])


def _bit_list(bits: int) -> str:
    return ", ".join(str(bit) for bit in range(64) if bits >> bit & 1)


_PLANS: Final[Mapping[int, Callable[[ConnectionState, Frame], Operation]]] = MappingProxyType(
    {
        messages.VHOST_USER_GET_FEATURES: _get_features,
        messages.VHOST_USER_SET_FEATURES: _set_features,
        messages.VHOST_USER_SET_OWNER: _set_owner,
        messages.VHOST_USER_RESET_OWNER: _reset_owner,
        messages.VHOST_USER_SET_MEM_TABLE: _set_mem_table,
        messages.VHOST_USER_SET_VRING_NUM: _set_vring_num,
        messages.VHOST_USER_SET_VRING_ADDR: _set_vring_addr,
        messages.VHOST_USER_SET_VRING_BASE: _set_vring_base,
        messages.VHOST_USER_GET_VRING_BASE: _get_vring_base,
        messages.VHOST_USER_SET_VRING_KICK: _set_vring_kick,
        messages.VHOST_USER_SET_VRING_CALL: _set_vring_call,
        messages.VHOST_USER_VRING_KICK: _vring_kick,
        messages.VHOST_USER_SET_VRING_ERR: _set_vring_err,
        messages.VHOST_USER_GET_PROTOCOL_FEATURES: _get_protocol_features,
        messages.VHOST_USER_SET_PROTOCOL_FEATURES: _set_protocol_features,
        messages.VHOST_USER_GET_QUEUE_NUM: _get_queue_num,
        messages.VHOST_USER_SET_VRING_ENABLE: _set_vring_enable,
        messages.VHOST_USER_SEND_RARP: _send_rarp,
        messages.VHOST_USER_NET_SET_MTU: _net_set_mtu,
        messages.VHOST_USER_SET_BACKEND_REQ_FD: _set_backend_req_fd,
        messages.VHOST_USER_IOTLB_MSG: _iotlb_msg,
        messages.VHOST_USER_GET_CONFIG: _get_config,
        messages.VHOST_USER_SET_CONFIG: _set_config,
        messages.VHOST_USER_RESET_DEVICE: _reset_device,
        messages.VHOST_USER_GET_MAX_MEM_SLOTS: _get_max_mem_slots,
        messages.VHOST_USER_ADD_MEM_REG: _add_mem_reg,
        messages.VHOST_USER_REM_MEM_REG: _rem_mem_reg,
        messages.VHOST_USER_SET_STATUS: _set_status,
        messages.VHOST_USER_GET_STATUS: _get_status,
    }
)
