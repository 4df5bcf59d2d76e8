"""Carrying out one valid request: from an operation of the session to verbs of the waist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

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
    SetMemory,
    SetMtu,
    SetOwner,
    SetProtocolFeatures,
    SetRingAddresses,
    SetRingBase,
    SetRingSize,
    SetStatus,
    StartQueue,
    StopDevice,
    StopQueue,
    WriteConfig,
)
from transports.vhost_user.state import Value
from virtio.errors import GuestError, HostError, PeerError
from virtio.fd import OwnedFd
from virtio.waist import MemoryRegion, QueueSetup

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

IOTLB_EVERYTHING: Final = 2**64 - 1  # bytes, from address 0: the most that a 64-bit size can say


async def perform(backend: BackendLike, request: Request, log: FilteringBoundLogger) -> Value:
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
        case SetFeatures(bits=bits, enable_all=enable_all):
            backend.set_driver_features(bits & ~(1 << VHOST_USER_F_PROTOCOL_FEATURES))
            if enable_all:
                await _enable_all(backend, True)
        case SetMemory(regions=regions):
            await backend.set_memory(regions)
        case StartQueue():
            return await _start_queue(backend, operation, log)
        case StopQueue(index=index, base=base, flush_iotlb=flush_iotlb):
            if base is None:
                base = await backend.stop_queue(index)
            if flush_iotlb:
                await backend.iotlb_invalidate(0, IOTLB_EVERYTHING)
            return base
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
        case ResetDevice(regions=regions):
            return await _reset_device(backend, regions)
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


async def _start_queue(backend: BackendLike, operation: StartQueue, log: FilteringBoundLogger) -> bool:
    """True if the queue runs now; a driver's mistake in the ring leaves it stopped and is no fault of the front-end."""
    kick_fd = operation.kick_fd
    try:
        if operation.setup is not None:
            await _configure_queue(backend, operation.index, operation.setup, kick_fd)
        await backend.set_kick(operation.index, kick_fd)
    except GuestError as error:
        log.warning("queue not started: the driver set it up wrongly", queue=operation.index, error=str(error))
        return False
    return True


async def _configure_queue(backend: BackendLike, index: int, setup: QueueSetup, kick_fd: OwnedFd | None) -> None:
    try:
        await backend.configure_queue(index, setup)
    except BaseException:
        if kick_fd is not None:
            kick_fd.close()  # it will not get as far as set_kick, which would own it
        raise


async def _enable_all(backend: BackendLike, on: bool) -> None:
    for index in range(backend.queue_count):
        await backend.enable_queue(index, on)


async def _reset_device(backend: BackendLike, regions: tuple[MemoryRegion, ...]) -> tuple[MemoryRegion, ...]:
    """Reset, then share the memory again through descriptors of its own: the old table's are closed with it."""
    kept = _duplicate(regions)
    try:
        await backend.reset()
    except BaseException:
        for region in kept:
            region.fd.close()
        raise
    if kept:
        await backend.set_memory(kept)
    return kept


def _duplicate(regions: tuple[MemoryRegion, ...]) -> tuple[MemoryRegion, ...]:
    kept: list[MemoryRegion] = []
    try:
        for old in regions:
            kept.append(MemoryRegion(old.gpa, old.size, old.uva, old.offset, old.fd.duplicate()))
    except HostError as error:
        for region in kept:
            region.fd.close()
        raise HostError(f"cannot keep the memory table over a reset: {error}", errno=error.errno) from error
    return tuple(kept)
