"""Carrying out one valid request: from an operation of the session to verbs of the waist."""

from __future__ import annotations

from typing import Final

from transports.base import BackendLike
from transports.vhost_user.messages import VHOST_USER_F_PROTOCOL_FEATURES
from transports.vhost_user.operations import (
    Announce,
    Answer,
    DisableAllQueues,
    EnableQueue,
    GetStatus,
    IotlbInvalidate,
    IotlbUpdate,
    KickQueue,
    ReadConfig,
    Refuse,
    Request,
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
    SetRingAddresses,
    SetRingBase,
    SetRingSize,
    SetStatus,
    StopDevice,
    StopQueue,
    WriteConfig,
)
from transports.vhost_user.state import Value
from virtio.errors import PeerError

IOTLB_EVERYTHING: Final = 2**64 - 1  # bytes, from address 0: the most that a 64-bit size can say


async def perform(backend: BackendLike, request: Request) -> Value:
    """Do what ``request`` asks; the value it is done with (see ``operations``).

    ``PeerError`` and ``HostError`` mean that it was not done. Every descriptor of the request has
    gone to the back-end or is closed when this returns or raises. SetBackendChannel and KickQueue are not
    for the device: the connection carries them out.
    """
    operation = request.operation
    match operation:
        case Answer(value=value):
            return value
        case Refuse(reason=reason):
            raise PeerError(reason, request=request.name)
        case SetFeatures(bits=bits, enable_all=enable_all, suspend=suspend):
            bases = {index: await backend.suspend_queue(index) for index in suspend}
            backend.set_driver_features(bits & ~(1 << VHOST_USER_F_PROTOCOL_FEATURES))
            if enable_all:
                await _enable_all(backend, True)
            return bases
        case SetMemory(regions=regions):
            await backend.set_memory(regions)
        case (
            SetRingSize(index=index, suspend=True)
            | SetRingAddresses(index=index, suspend=True)
            | SetRingBase(index=index, suspend=True)
        ):
            return await backend.suspend_queue(index)
        case SetKick(index=index, kick_fd=fd, enable=enable):
            if enable:
                await backend.enable_queue(index, True)
            await backend.set_kick(index, fd)
        case StopQueue(index=index, base=base, started=started, flush_iotlb=flush_iotlb):
            stood_at = await backend.stop_queue(index) if started else 0
            if flush_iotlb:
                await backend.iotlb_invalidate(0, IOTLB_EVERYTHING)
            return stood_at if base is None else base
        case SetCall(index=index, call_fd=fd):
            await backend.set_call(index, fd)
        case SetErr(index=index, err_fd=fd):
            await backend.set_err(index, fd)
        case EnableQueue(index=index, on=on):
            await backend.enable_queue(index, on)
        case DisableAllQueues():
            await _enable_all(backend, False)
        case ReadConfig(offset=offset, size=size):
            return backend.read_config(offset, size)
        case WriteConfig(offset=offset, data=data):
            backend.write_config(offset, data)
        case SetStatus(status=status):
            backend.set_status(status)
        case GetStatus():
            return backend.status
        case StopDevice(running=running, flush_iotlb=flush_iotlb):
            bases = {index: await backend.stop_queue(index) for index in running}
            if flush_iotlb:
                await backend.iotlb_invalidate(0, IOTLB_EVERYTHING)
            backend.set_status(0)
            return bases
        case ResetDevice():
            await backend.reset(keep_memory=True)
        case IotlbUpdate(iova=iova, size=size, uva=uva, perm=perm):
            await backend.iotlb_update(iova, size, uva, perm)
        case IotlbInvalidate(iova=iova, size=size):
            await backend.iotlb_invalidate(iova, size)
        case SetMtu(mtu=mtu):
            backend.set_mtu(mtu)
        case Announce(address=address):
            await backend.announce(address)
        case SetOwner() | SetProtocolFeatures() | SetRingSize() | SetRingAddresses() | SetRingBase():
            pass  # the session keeps these to itself until a queue starts
        case SetBackendChannel() | KickQueue():
            raise TypeError(f"{request.name} is the connection's")
    return 0


async def _enable_all(backend: BackendLike, on: bool) -> None:
    for index in range(backend.queue_count):
        await backend.enable_queue(index, on)
