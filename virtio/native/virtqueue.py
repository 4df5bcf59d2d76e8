"""A virtqueue of the data plane. Thin: the rings, the checks and the fds are handled in C.

Everything here must be called from the thread that drives the queue: the trio thread while the queue is stopped
or pumped; while a worker drives it only ``report`` and ``stats`` are free to call.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from virtio.dataplane import check, ffi, guest_error, lib
from virtio.errors import GuestError, HostError, PeerError
from virtio.fd import OwnedFd
from virtio.native.interrupt import InterruptStatus
from virtio.native.memory import Iotlb, MemoryTable
from virtio.native.stats import HISTOGRAM_BUCKETS, OPS_MAX, OpStats, QueueStats
from virtio.spec import CHAIN_LENGTH_MAX
from virtio.waist import Doorbell, IotlbMiss, Permission, QueueSetup

assert lib.DP_HISTOGRAM_BUCKETS == HISTOGRAM_BUCKETS
assert lib.DP_QUEUE_OPS == OPS_MAX


@dataclass(frozen=True, slots=True)
class Moved:
    """A split ring began at ``used``, its used index in memory, and not at ``base``, which it was given."""

    base: int
    used: int


@dataclass(frozen=True, slots=True)
class Report:
    """What happened on a queue since it was set up: it broke, it waits for the IOTLB, its call fd has nobody left."""

    error: GuestError | None
    miss: IotlbMiss | None
    miss_number: int
    """Tells one miss from the next, which may be of the same address; 0 without a miss."""
    call_error: int
    """Why the call fd was given up, an errno; 0 while it works, or where there was none."""
    moved: Moved | None


class Virtqueue:
    """One queue, split or packed. ``event_fd`` is written by C when there is something to ``report``."""

    def __init__(self, index: int, event_fd: int) -> None:
        pointer = lib.virtqueue_new(index, event_fd)
        if pointer == ffi.NULL:
            raise HostError("no memory for a virtqueue")
        self.index = index
        self.pointer: Any = ffi.gc(pointer, lib.virtqueue_free)

    def configure(
        self, setup: QueueSetup, features: int, table: MemoryTable, iotlb: Iotlb, *, in_order: bool = False
    ) -> None:
        """Set size, addresses, format and position. Forgets faults.

        ``in_order``: what the used index counts are the first requests, so it alone says where a split ring goes on.
        ``GuestError``: the driver's addresses are not aligned; ``PeerError``: an impossible size or base.
        """
        given = ffi.new("struct queue_setup *")
        given.desc, given.avail, given.used = setup.desc, setup.avail, setup.used
        given.size, given.base, given.space = setup.size, setup.base, int(setup.space)
        given.features = features
        given.in_order = in_order
        code = lib.virtqueue_configure(self.pointer, given, table.pointer, iotlb.pointer)
        if code == lib.DP_E_RING_ALIGN:
            raise GuestError(
                f"queue {self.index}: a ring address is not aligned (virtio 1.3, 2.7 and 2.8)", queue_index=self.index
            )
        if code in (lib.DP_E_RING_SIZE, lib.DP_E_BASE):
            what = f"size {setup.size}" if code == lib.DP_E_RING_SIZE else f"base {setup.base:#x}"
            raise PeerError(f"queue {self.index} cannot have {what} (virtio 1.3, 2.7 and 2.8)")
        check(code, f"setting up queue {self.index}")

    def forget(self) -> None:
        """Drop setup, memory and faults; fds stay."""
        lib.virtqueue_forget(self.pointer)

    def set_memory(self, table: MemoryTable) -> None:
        lib.virtqueue_set_memory(self.pointer, table.pointer)

    def set_memory_at_rest(self, table: MemoryTable) -> None:
        """The same while nobody drives the queue: the ring is looked for when it runs again, and cannot break now."""
        lib.virtqueue_set_memory_at_rest(self.pointer, table.pointer)

    def resume(self) -> None:
        """Look at the ring again after the IOTLB learned what was missing."""
        lib.virtqueue_resume(self.pointer)

    def _give(self, setter: Any, fd: OwnedFd | None, name: str) -> None:
        with fd or nullcontext():
            number = fd.fileno() if fd is not None else -1
            check(setter(self.pointer, number), f"{name} fd of queue {self.index}")
            if fd is not None:
                fd.detach()

    def check_kick(self, fd: OwnedFd | None) -> None:
        """``HostError``: not an eventfd."""
        if fd is not None:
            check(lib.eventfd_check(fd.fileno()), f"kick fd of queue {self.index}")

    def set_kick(self, fd: OwnedFd | None) -> None:
        """Takes the fd, also when it is refused (``HostError``: not an eventfd). Same for the next three."""
        self.set_doorbell(Doorbell.KICK, fd)

    def set_doorbell(self, kind: Doorbell, fd: OwnedFd | None) -> None:
        """The eventfd of one kind of doorbell; None takes it away."""
        self._give(lambda vq, number: lib.virtqueue_set_doorbell(vq, int(kind), number), fd, kind.label)

    def clear_doorbells(self) -> None:
        for kind in Doorbell:
            self.set_doorbell(kind, None)

    def set_call(self, fd: OwnedFd | None) -> None:
        """An eventfd, a pipe's write end, or a Unix socket, as for ``set_err``."""
        self._give(lib.virtqueue_set_call, fd, "call")

    def set_err(self, fd: OwnedFd | None) -> None:
        self._give(lib.virtqueue_set_err, fd, "err")

    def set_interrupt_status(self, status: InterruptStatus | None) -> None:
        """While stopped: the word to set before each interrupt."""
        lib.virtqueue_set_interrupt_status(self.pointer, status.pointer if status is not None else ffi.NULL)

    def doorbell_fd(self, kind: Doorbell) -> int:
        """The number of that doorbell's eventfd, or -1; owned by the queue."""
        fd: int = lib.virtqueue_doorbell_fd(self.pointer, int(kind))
        return fd

    @property
    def base(self) -> int:
        """Where the ring stands, in vhost-user's encoding; 0 before it was set up."""
        base: int = lib.virtqueue_base(self.pointer)
        return base

    def report(self) -> Report:
        """Any thread: the fault that broke the queue, the translation it waits for."""
        seen = ffi.new("struct queue_report *")
        lib.virtqueue_report(self.pointer, seen)
        error = miss = None
        if seen.fault:
            error = guest_error(self.index, seen.fault, seen.head, seen.address, seen.length)
        if seen.miss:
            miss = IotlbMiss(seen.miss_iova, Permission(seen.miss_perm))
        moved = Moved(seen.moved_base, seen.moved_used) if seen.moved else None
        return Report(error, miss, seen.miss, seen.call_error, moved)

    def break_queue(self, head: int, readable: int, writable: int) -> None:
        """Break the queue because a request lacks the parts its device needs."""
        lib.virtqueue_break(self.pointer, lib.VQ_FAULT_SHAPE, head, readable, writable)

    def device_failed(self) -> None:
        """Break the queue because its device raised."""
        lib.virtqueue_break(self.pointer, lib.VQ_FAULT_DEVICE, 0, 0, 0)

    # What the pump uses.

    def take_kicks(self) -> int:
        """Read the doorbells' eventfds without blocking; how often they were rung."""
        count: int = lib.virtqueue_take_kicks(self.pointer)
        return count

    def pop_many(
        self, room: Any, limit: int, request_max: int = CHAIN_LENGTH_MAX, *, as_they_come: bool = False
    ) -> int:
        """Fill ``room`` (a ``struct chain *[]``) with up to ``limit`` chains; how many, 0 also when broken.

        A chain of more than ``request_max`` bytes, readable or writable, breaks the queue. ``as_they_come``: chains are
        requests, so how long they waited is counted. (A buffer that waits for something to be put into it is none.)
        """
        count: int = lib.virtqueue_pop_many(self.pointer, room, limit, request_max, as_they_come)
        return max(count, 0)

    def push_many(self, pointers: Sequence[Any], written: Sequence[int]) -> None:
        """Return chains with the bytes written to each: one used index, at most one notification."""
        lib.virtqueue_push_many(self.pointer, list(pointers), list(written), len(pointers))

    def rewind(self, pointers: Sequence[Any]) -> None:
        """Un-pop the chains popped last (oldest first): the next pop finds them again."""
        lib.virtqueue_rewind(self.pointer, list(pointers), len(pointers))

    def arm(self) -> bool:
        """Ask for kicks; True when the ring was empty even after that, so that waiting is right."""
        return bool(lib.virtqueue_arm(self.pointer))

    @property
    def broken(self) -> bool:
        """No kick is of interest before the queue is set up again."""
        return bool(lib.virtqueue_broken(self.pointer))

    def disarm(self) -> None:
        lib.virtqueue_disarm(self.pointer)

    def stats(self, ops: Sequence[str], running: bool, now_ns: int) -> QueueStats:
        """Any thread: the counters as they are now. ``now_ns`` is CLOCK_MONOTONIC."""
        raw = lib.virtqueue_stats(self.pointer)
        oldest = raw.oldest_ns
        return QueueStats(
            queue=self.index,
            doorbells={kind.label: raw.kicks[kind] for kind in Doorbell},
            wakeups=raw.wakeups,
            empty_wakeups=raw.empty_wakeups,
            notifications_sent=raw.notifications_sent,
            notifications_suppressed=raw.notifications_suppressed,
            notifications_lost=raw.notifications_lost,
            inflight=raw.inflight,
            oldest_age_seconds=max(now_ns - oldest, 0) / 1e9 if oldest else 0.0,
            running=running,
            broken=self.report().error is not None,
            guest_duration_buckets=tuple(raw.guest_buckets),
            guest_duration_sum_seconds=raw.guest_sum_ns / 1e9,
            ops={
                name: OpStats(
                    requests=op.requests,
                    errors=op.errors,
                    bytes=op.bytes,
                    duration_buckets=tuple(op.buckets),
                    duration_sum_seconds=op.duration_sum_ns / 1e9,
                )
                for name, op in zip(ops, raw.ops, strict=False)
            },
        )
