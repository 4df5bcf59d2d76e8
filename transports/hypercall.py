"""The hypercall doorbell, what of it every transport shares: numbers, keys, the platform leaf, and who may have it.

A guest rings by a hypercall that carries a *connection id*; the kernel signals the eventfd registered for that id.
It is an optimization and never the only way: a driver rings so only if the device offers it *and* the hypervisor
directly beneath says so in CPUID, and any answer but 0 sends it to the plain doorbell. This is ABI version 1, for
64-bit x86 guests; ARCHITECTURE.md tells the whole of it.
"""

from __future__ import annotations

import hashlib
import hmac
import uuid as uuids
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from virtio.fd import OwnedFd

Policy = Literal["offer", "withhold", "auto"]

ABI_VERSION: Final = 1
NUMBER_BITS: Final = 24
NUMBER_MAX: Final = (1 << NUMBER_BITS) - 1
RESERVED_BELL: Final = NUMBER_MAX
"""Never registered: a driver that wants to see a status other than 0 rings this one."""

RESERVED_ID: Final = NUMBER_MAX
"""Never registered either, for a driver may ring that number without knowing a key: a queue whose bell and key make it
has no bell."""

FIRST_PORT: Final = 0x100
"""Numbers below ``FIRST_PORT << 8`` are free for devices without a port: below 0x100 no virtio device has one."""

VIRTIO_F_HYPERCALL_NOTIFY: Final = 44
"""Our feature bit, on our own transport only: it lies in a range that the specification (1.3, section 6) reserves."""

SIGNAL_EVENT: Final = 0x1005D
"""Hyper-V's HvCallSignalEvent (0x5d) as a fast call (bit 16): what the driver has in RCX."""

PLATFORM_SIGNATURE: Final = b"HyperBellVMM"
LEAF_FIRST: Final = 0x4000_0000
LEAF_STEP: Final = 0x100
LEAF_FLAG_OFFERED: Final = 1

HIDDEN_PV_BITS: Final = (7, 11, 13, 16)
"""Bits of KVM's CPUID feature leaf (EAX) that a guest with the platform key must not see: PV unhalt, PV IPI, PV
sched-yield and MAP_GPA_RANGE work by hypercalls of KVM's own, which go astray once the guest speaks Hyper-V."""


def bell_number(port: int, queue_index: int) -> int:
    """The bell of a queue behind a notify port: 24 bits, ``port << 8 | queue_index``.

    ``ValueError``: no virtio device can have that port, or version 1 has no bell for the queue.
    """
    if not FIRST_PORT <= port <= 0xFFFF:
        raise ValueError(f"port {port:#x} is not the notify port of a virtio device")
    if not 0 <= queue_index <= 0xFF:
        raise ValueError(f"queue {queue_index} has no bell: the number has 8 bits for it")
    bell = port << 8 | queue_index
    if bell == RESERVED_BELL:
        raise ValueError("bell 0xffffff is reserved")
    return bell


def connection_id(bell: int, key: int) -> int:
    """What the driver has in RDX: the bell number hidden by the VM's key, so that a stray call hits nothing."""
    if not 0 <= bell < RESERVED_BELL:
        raise ValueError(f"{bell:#x} is not a bell number")
    return bell ^ check_key(key)


def check_key(key: int) -> int:
    """``key`` if it can be a VM's: 24 bits and not 0, which on a device means "withheld". ``ValueError`` otherwise."""
    if not 0 < key <= NUMBER_MAX:
        raise ValueError(f"the key {key:#x} is not between 0x1 and {NUMBER_MAX:#x}")
    return key


def derive_key(secret: bytes, uuid: uuids.UUID) -> int:
    """The key of the VM ``uuid``, the same on every host that has the operator's ``secret``; never 0."""
    digest = hmac.digest(secret, b"hyperbell key " + uuid.bytes, hashlib.sha256)
    parts = (int.from_bytes(digest[at : at + 3], "little") for at in range(0, len(digest) - 2, 3))
    return next(filter(None, parts), 1)


def offers(policy: Policy, *, guest_may_nest: bool) -> bool:
    """Whether a device with ``policy`` offers the hypercall to a guest that is shown VMX or SVM or is not."""
    return policy == "offer" or (policy == "auto" and not guest_may_nest)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One CPUID leaf."""

    function: int
    eax: int
    ebx: int
    ecx: int
    edx: int


def platform_leaves(base: int, key: int, *, offered: bool) -> tuple[Leaf, Leaf]:
    """The platform key: two leaves from ``base``, the first free multiple of ``LEAF_STEP`` from ``LEAF_FIRST`` up."""
    words = (int.from_bytes(PLATFORM_SIGNATURE[at : at + 4], "little") for at in (0, 4, 8))
    flags = LEAF_FLAG_OFFERED if offered else 0
    return Leaf(base, base + 1, *words), Leaf(base + 1, ABI_VERSION, check_key(key), flags, 0)


class HypercallKind(Protocol):
    """How hypercalls come to eventfds on some kind of host.

    KVM_HYPERV_EVENTFD is the one there is code for. s390's diagnose 0x500, Xen's event channels (KVM_XEN) and arm64's
    SMCCC calls would each be another class of this shape.
    """

    @property
    def why_not(self) -> str | None:
        """Why this host cannot do it; ``None`` when it can."""

    def register(self, connection: int, fd: OwnedFd) -> None:
        """Let calls with that connection id signal ``fd``, which stays the caller's. ``HostError``: it was refused."""

    def withdraw(self, connection: int) -> None:
        """No call with that id signals anything when this returns."""
