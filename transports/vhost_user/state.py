"""What one connection has agreed on, and how it changes when an operation is done."""

from __future__ import annotations

from dataclasses import dataclass, field

from transports.vhost_user.memory_slots import MemoryTable
from transports.vhost_user.messages import VHOST_USER_F_PROTOCOL_FEATURES, VHOST_USER_PROTOCOL_F_BACKEND_REQ
from transports.vhost_user.operations import (
    DisableAllQueues,
    EnableQueue,
    Operation,
    ResetDevice,
    SetCall,
    SetErr,
    SetFeatures,
    SetMemory,
    SetOwner,
    SetProtocolFeatures,
    SetRingAddresses,
    SetRingBase,
    SetRingSize,
    StartQueue,
    StopDevice,
    StopQueue,
)
from transports.vhost_user.vrings import Vring
from virtio.spec import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED
from virtio.waist import AddressSpace, MemoryRegion

Value = bool | int | bytes | tuple[MemoryRegion, ...] | dict[int, int]
"""What an operation can be done with."""


@dataclass(slots=True)
class ConnectionState:
    """Negotiated features, memory table and rings.

    ``offered_features`` includes VHOST_USER_F_PROTOCOL_FEATURES; ``features`` and
    ``protocol_features`` are None until they were set; ``queue_size_max`` counts entries;
    ``has_used_iotlb``: addresses were translated at some time on this connection. ``repeats_memory``:
    the front-end may add and remove each memory region once for every pair of queues, as QEMU before 8.0 does with a
    network interface; only the first time counts.
    """

    offered_features: int
    offered_protocol_features: int
    queue_size_max: int
    rings: list[Vring]
    repeats_memory: bool = False
    features: int | None = None
    protocol_features: int | None = None
    has_owner: bool = False
    has_used_iotlb: bool = False
    memory: MemoryTable = field(default_factory=MemoryTable)

    def has_feature(self, bit: int) -> bool:
        return bool((self.features or 0) >> bit & 1)

    def has_protocol_feature(self, bit: int) -> bool:
        return bool((self.protocol_features or 0) >> bit & 1)

    @property
    def uses_protocol_features(self) -> bool:
        """VHOST_USER_F_PROTOCOL_FEATURES counts as negotiated by either message: the text says that it
        "does not need to be acknowledged by VHOST_USER_SET_FEATURES"."""
        return self.has_feature(VHOST_USER_F_PROTOCOL_FEATURES) or self.protocol_features is not None

    @property
    def is_packed(self) -> bool:
        return self.has_feature(VIRTIO_F_RING_PACKED)

    @property
    def translates(self) -> bool:
        """Whether addresses are I/O virtual: the driver leaves them to the platform, and the front-end takes questions.

        A front-end that accepts VIRTIO_F_ACCESS_PLATFORM without VHOST_USER_PROTOCOL_F_BACKEND_REQ could never answer
        a miss: it passes its driver's features on and has no IOMMU, so the platform's translation is the identity.
        """
        return self.has_feature(VIRTIO_F_ACCESS_PLATFORM) and self.has_protocol_feature(
            VHOST_USER_PROTOCOL_F_BACKEND_REQ
        )

    @property
    def ring_space(self) -> AddressSpace:
        """ "A ring address is an IOVA if VIRTIO_F_IOMMU_PLATFORM has been negotiated" (now ACCESS_PLATFORM).

        Asked when a ring starts: by then both kinds of features are known, in whichever order they came.
        """
        return AddressSpace.IOVA if self.translates else AddressSpace.UVA

    @property
    def running(self) -> tuple[int, ...]:
        """The indices of the started rings."""
        return tuple(ring.index for ring in self.rings if ring.started)

    @property
    def is_suspended(self) -> bool:
        """All rings stopped: nothing may be sent to the front-end of our own accord ("Suspended device state")."""
        return not self.running

    def commit(self, operation: Operation, value: Value) -> None:
        """The operation is done with ``value``; operations without a trace in the state change nothing."""
        match operation:
            case SetOwner():
                self.has_owner = True
            case SetProtocolFeatures(bits=bits):
                self.protocol_features = bits
                self.has_used_iotlb |= self.translates
            case SetFeatures(bits=bits, enable_all=enable_all):
                self.features = bits
                self.has_used_iotlb |= self.translates
                if enable_all:
                    for ring in self.rings:
                        ring.enabled = True
            case SetMemory(regions=regions):
                self.memory.regions = regions
            case SetRingSize(index=index, size=size):
                self.rings[index].size = size
            case SetRingAddresses(index=index, desc=desc, avail=avail, used=used):
                self.rings[index].addresses = (desc, avail, used)
            case SetRingBase(index=index, base=base):
                self.rings[index].base = base
            case StartQueue(index=index):
                self.rings[index].started = bool(value)
            case StopQueue(index=index):
                assert isinstance(value, int)
                self.rings[index].stop(value)
            case StopDevice(running=running):
                assert isinstance(value, dict)
                self.features = None
                for index in running:
                    self.rings[index].stop(value[index])
            case SetCall(index=index, call_fd=fd):
                self.rings[index].has_call = fd is not None
            case SetErr(index=index, err_fd=fd):
                self.rings[index].has_err = fd is not None
            case EnableQueue(index=index, on=on):
                self.rings[index].enabled = on
            case DisableAllQueues():
                for ring in self.rings:
                    ring.enabled = False
            case ResetDevice():
                assert isinstance(value, tuple)
                self.features = None
                self.memory.regions = value
                for ring in self.rings:
                    ring.reset()
            case _:
                pass
