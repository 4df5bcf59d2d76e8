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
    SetKick,
    SetMemory,
    SetOwner,
    SetProtocolFeatures,
    SetRingAddresses,
    SetRingBase,
    SetRingSize,
    StopDevice,
    StopQueue,
)
from transports.vhost_user.vrings import Parameter, Vring
from virtio.spec import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED
from virtio.waist import AddressSpace

Value = int | bytes | dict[int, int]
"""What an operation can be done with."""


@dataclass(slots=True)
class ConnectionState:
    """Negotiated features, memory table and rings.

    ``offered_features`` includes VHOST_USER_F_PROTOCOL_FEATURES; ``features`` and
    ``protocol_features`` are None until they were set; ``queue_size_max`` counts entries;
    ``offered_to_owner``: protocol features for a front-end that becomes owner before it negotiates any. QEMU negotiates
    first, and warns of a network interface with CONFIG, for it shows its guest a config space of its own. User-mode
    Linux, cloud-hypervisor, crosvm and DPDK become owner first; the first two need it.
    ``has_used_iotlb``: addresses were translated at some time on this connection. ``repeats_memory``:
    the front-end may add and remove each memory region once for every pair of queues, as QEMU before 8.0 does with a
    network interface; only the first time counts.
    """

    offered_features: int
    offered_protocol_features: int
    queue_size_max: int
    rings: list[Vring]
    repeats_memory: bool = False
    offered_to_owner: int = 0
    features: int | None = None
    protocol_features: int | None = None
    has_used_iotlb: bool = False
    memory: MemoryTable = field(default_factory=MemoryTable)

    def has_feature(self, bit: int) -> bool:
        return bool((self.features or 0) >> bit & 1)

    def has_protocol_feature(self, bit: int) -> bool:
        return bool((self.protocol_features or 0) >> bit & 1)

    @property
    def starts_enabled(self) -> bool:
        """Without VHOST_USER_F_PROTOCOL_FEATURES "the ring starts directly in the enabled state" ("Ring states")."""
        return self.features is not None and not self.has_feature(VHOST_USER_F_PROTOCOL_FEATURES)

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

    def waits_for(self, ring: Vring) -> str | None:
        """What a ring that was kicked still needs before the back-end can have it; None: nothing."""
        if ring.size is None:
            return "its size"
        if ring.addresses is None:
            return "its addresses"
        if ring.held:
            return "its base, or to be enabled"
        if self.features is None:
            return "the features"
        if not self.memory.regions:
            return "memory"
        return None

    def commit(self, operation: Operation, value: Value) -> None:
        """The operation is done with ``value``; operations without a trace in the state change nothing."""
        match operation:
            case SetOwner():
                if self.protocol_features is None:
                    self.offered_protocol_features |= self.offered_to_owner
            case SetProtocolFeatures(bits=bits):
                self.protocol_features = bits
                self.has_used_iotlb |= self.translates
            case SetFeatures():
                self._commit_features(operation, value)
            case SetMemory(regions=regions):
                self.memory.regions = regions
            case SetRingSize(index=index, size=size, suspend=suspend):
                self._note_base(index, value, suspend)
                self.rings[index].size = size
                self.rings[index].say(Parameter.SIZE, suspended=suspend)
            case SetRingAddresses(index=index, desc=desc, avail=avail, used=used, suspend=suspend):
                self._note_base(index, value, suspend)
                self.rings[index].addresses = (desc, avail, used)
                self.rings[index].say(Parameter.ADDRESSES, suspended=suspend)
            case SetRingBase(index=index, base=base, suspend=suspend):
                self.rings[index].base = base
                self.rings[index].say(Parameter.BASE, suspended=suspend)
            case SetKick(index=index, enable=enable):
                self.rings[index].enabled |= enable
                self.rings[index].kick()
            case StopQueue(index=index):
                assert isinstance(value, int)
                self.rings[index].stop(value)
            case StopDevice(running=running):
                assert isinstance(value, dict)
                self.features = None
                for index in running:
                    ring = self.rings[index]
                    ring.stop(value[index] if ring.configured else None)
            case SetCall(index=index, call_fd=fd):
                self.rings[index].has_call = fd is not None
            case SetErr(index=index, err_fd=fd):
                self.rings[index].has_err = fd is not None
            case EnableQueue(index=index, on=on):
                self.rings[index].enable(on)
            case DisableAllQueues():
                for ring in self.rings:
                    ring.enable(False)
            case ResetDevice():
                self.features = None
                for ring in self.rings:
                    ring.reset()
            case _:
                pass

    def _note_base(self, index: int, value: Value, suspended: bool) -> None:
        """Where a ring stood that was suspended, unless its new base has come before the rest of the change."""
        if suspended and Parameter.BASE not in self.rings[index].said:
            assert isinstance(value, int)
            self.rings[index].base = value

    def _commit_features(self, operation: SetFeatures, value: Value) -> None:
        before = self.is_packed, self.ring_space
        self.features = operation.bits
        self.has_used_iotlb |= self.translates
        # A ring of another format or in another space is another ring: it waits for the front-end's word.
        is_other = before != (self.is_packed, self.ring_space)
        for index in operation.suspend:
            assert isinstance(value, dict)
            ring = self.rings[index]
            ring.base = None if is_other else value[index]
            ring.suspend(held=is_other or not ring.enabled)
        if operation.enable_all:
            for ring in self.rings:
                ring.start_enabled()
