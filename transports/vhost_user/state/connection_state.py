"""What one connection has agreed on. It changes when a request is done (``commit`` of the request's class)."""

from __future__ import annotations

from dataclasses import dataclass, field

from transports.vhost_user.state.memory_table import MemoryTable
from transports.vhost_user.state.vring import Vring
from transports.vhost_user.wire.numbers import VHOST_USER_F_PROTOCOL_FEATURES, VHOST_USER_PROTOCOL_F_BACKEND_REQ
from virtio.spec import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED
from virtio.waist import AddressSpace


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
