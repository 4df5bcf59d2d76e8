"""What one connection knows of each ring: its parameters and its two independent states.

"Ring states": a ring is stopped or started, and disabled or enabled. A stopped ring is not
processed at all, whether enabled or not; its enabled state is tracked all the same.
Checks of what lies in guest memory are the back-end's; here are the front-end's own mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass

from transports.vhost_user.operations import SetRingAddresses, SetRingBase, SetRingSize
from transports.vhost_user.payloads import VringAddr, VringState
from virtio.errors import PeerError
from virtio.spec import VIRTQUEUE_SIZE_MAX
from virtio.waist import AddressSpace, QueueSetup

# Both wrap counters start at 1, both indices at 0 (virtio 1.3, section 2.8.1).
PACKED_BASE_INITIAL = 0x8000_8000


@dataclass(slots=True)
class Vring:
    """One ring as the front-end set it up. ``addresses`` is (desc, avail, used)."""

    index: int
    size: int | None = None
    addresses: tuple[int, int, int] | None = None
    base: int | None = None
    started: bool = False
    enabled: bool = False
    has_call: bool = False
    has_err: bool = False

    def plan_size(self, state: VringState, *, size_max: int, packed: bool) -> SetRingSize:
        """SET_VRING_NUM."""
        size = state.num
        if self.started and size != self.size:
            raise PeerError(f"queue {self.index} runs; its size cannot change from {self.size} to {size}")
        if size == 0:
            raise PeerError(f"queue {self.index} cannot have the size 0")
        limit = min(size_max, VIRTQUEUE_SIZE_MAX)
        if size > limit:
            raise PeerError(
                f"queue {self.index}: size {size} is above this device's limit of {limit}; "
                f"lower the queue size in the virtual machine or raise the device's queue_size"
            )
        if not packed and size & (size - 1):
            raise PeerError(f"queue {self.index}: size {size} is not a power of two (virtio 1.3, section 2.7)")
        return SetRingSize(self.index, size)

    def plan_addresses(self, addr: VringAddr) -> SetRingAddresses:
        """SET_VRING_ADDR; the same addresses again are no change, also while the ring runs."""
        if addr.flags:  # VHOST_VRING_F_LOG is for VHOST_F_LOG_ALL, which is not offered
            raise PeerError(f"queue {self.index}: ring flags {addr.flags:#x} were not negotiated")
        addresses = (addr.desc, addr.avail, addr.used)
        if self.started and addresses != self.addresses:
            raise PeerError(f"queue {self.index} runs; its addresses cannot change")
        return SetRingAddresses(self.index, *addresses)

    def plan_base(self, state: VringState, *, packed: bool) -> SetRingBase:
        """SET_VRING_BASE ("Vring descriptor indices for packed virtqueues")."""
        if self.started:
            raise PeerError(f"queue {self.index} runs; its base cannot change")
        if not packed and state.num > 0xFFFF:
            raise PeerError(f"queue {self.index}: base {state.num:#x} has reserved bits set")
        return SetRingBase(self.index, state.num)

    def setup(self, *, packed: bool, space: AddressSpace) -> QueueSetup:
        """Everything the ring needs to start; ``PeerError`` if something was not said yet."""
        if self.size is None:
            raise PeerError(f"queue {self.index} has no size; VHOST_USER_SET_VRING_NUM comes first")
        if self.addresses is None:
            raise PeerError(f"queue {self.index} has no addresses; VHOST_USER_SET_VRING_ADDR comes first")
        base = self.current_base(packed=packed)
        if packed and max(base & 0x7FFF, base >> 16 & 0x7FFF) >= self.size:
            raise PeerError(f"queue {self.index}: base {base:#x} points outside a ring of {self.size} entries")
        if not packed and base > 0xFFFF:
            raise PeerError(f"queue {self.index}: base {base:#x} is no split ring's base")
        desc, avail, used = self.addresses
        return QueueSetup(self.size, desc, avail, used, base, space)

    def current_base(self, *, packed: bool) -> int:
        if self.base is None:
            return PACKED_BASE_INITIAL if packed else 0
        return self.base

    def stop(self, base: int) -> None:
        self.started = False
        self.base = base

    def reset(self) -> None:
        """Stopped, disabled, without parameters. Call and err fds are the front-end's and stay."""
        self.size = None
        self.addresses = None
        self.base = None
        self.started = False
        self.enabled = False
