"""A virtio-blk driver over vhost-user, for the benchmark and for tests that need load or checked data.

    with BlkFrontend(socket_path, queues=2, packed=True) as frontend:
        frontend.fill(blocks=1024)                                      # writes the pattern and remembers it
        result = frontend.run(Job(requests=20_000, depth=32, blocks=1024, write_percent=30, verify=True))
        bases = frontend.stop()

The data path is C (``frontend.c``) and runs without the GIL; a run never hangs: when nothing comes back for
``Job.stall_seconds`` it ends with ``DeviceFaultError``, which names the queue and its indices.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, Self

from tests.bench import connection as vu
from tests.bench.build import load_frontend
from tests.bench.connection import Connection, ConnectionFailedError
from tests.bench.results import RunResult, merge_results

VIRTIO_BLK_F_MQ: Final = 12
VIRTIO_F_INDIRECT_DESC: Final = 28
VIRTIO_F_EVENT_IDX: Final = 29
VIRTIO_F_VERSION_1: Final = 32
VIRTIO_F_RING_PACKED: Final = 34

SECTOR_SIZE: Final = 512
CONFIG_SIZE: Final = 36  # struct virtio_blk_config up to num_queues (virtio 1.3, 5.2.4)
CAPACITY: Final = struct.Struct("<Q")
GPA_BASE: Final = 1 << 32  # not 0 and not the offset in the file: mistaking one for another shows
PAGE: Final = 4096


def pattern_bytes(offset: int, length: int, seed: int = 1, generation: int = 0) -> bytes:
    """The pattern that belongs at byte ``offset`` of a disk; both in bytes, multiples of 512.

    Generation 0 is what ``Job.verify`` expects of a block that this front-end did not write.
    """
    ffi, lib = load_frontend()
    buffer = ffi.new("uint8_t[]", length)
    lib.fe_fill(buffer, offset, length, seed, generation)
    return bytes(ffi.buffer(buffer))


class DeviceFaultError(Exception):
    """The device broke a promise of the ring or returned wrong data. ``code`` is one of the C side's FE_E_*."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one run does.

    It submits for ``seconds``, or until every queue has done ``requests``; one of the two must be given. Each queue
    keeps ``depth`` requests of ``request_bytes`` in flight on its own share of the blocks ``first_block`` to
    ``first_block + blocks`` (counted in ``request_bytes``; default: the whole disk), in ``order``.

    ``sleep``: the driver sleeps on its call fds, as a guest does that waits for interrupts; otherwise it polls the
    used rings and asks for no interrupts. ``verify``: compare what is read with what ``fill`` or a writing run with
    ``request_bytes`` of the same size left there. ``write_percent``: share of writes.
    """

    seconds: float = 0.0
    requests: int = 0
    depth: int = 1
    request_bytes: int = 4096
    order: Literal["random", "sequential"] = "random"
    sleep: bool = False
    write_percent: int = 0
    verify: bool = False
    first_block: int = 0
    blocks: int = 0
    choice_seed: int = 1
    stall_seconds: float = 5.0
    allow_errors: bool = False


@dataclass(slots=True)
class _Queue:
    kick_fd: int
    call_fd: int
    handle: Any
    layout: Any
    offset: int


@dataclass(slots=True)
class BlkFrontend:
    """One connection with ``queues`` request queues; ``with`` connects and negotiates, and closes at the end.

    ``request_max`` bounds ``Job.request_bytes``; data goes out in descriptors of ``segment`` bytes (0: one).
    ``event_idx``, ``indirect`` and ``packed`` are negotiated as asked; a back-end that does not offer a feature
    asked for is a ``ConnectionFailedError``. One thread at a time may use an object.
    """

    socket_path: Path
    queues: int = 1
    queue_size: int = 256
    request_max: int = 4096
    segment: int = 0
    packed: bool = False
    event_idx: bool = True
    indirect: bool = True
    pattern_seed: int = 1
    capacity: int = field(default=0, init=False)
    """Of the disk, in bytes; known after ``connect``."""
    queues_offered: int = field(default=1, init=False)
    features: int = field(default=0, init=False)
    _connection: Connection | None = field(default=None, init=False)
    _memory: mmap.mmap | None = field(default=None, init=False)
    _pointer: Any = field(default=None, init=False)
    _queues: list[_Queue] = field(default_factory=list, init=False)
    _generations: dict[int, Any] = field(default_factory=dict, init=False)

    def __enter__(self) -> Self:
        try:
            self.connect()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def connect(self) -> None:
        """Connect and negotiate the features; afterwards ``capacity`` and ``queues_offered`` are known."""
        self._connection = connection = Connection(self.socket_path)
        offered = connection.get_u64(vu.VHOST_USER_GET_FEATURES)
        wanted = 1 << VIRTIO_F_VERSION_1 | 1 << vu.VHOST_USER_F_PROTOCOL_FEATURES
        wanted |= self.event_idx << VIRTIO_F_EVENT_IDX | self.indirect << VIRTIO_F_INDIRECT_DESC
        wanted |= self.packed << VIRTIO_F_RING_PACKED | (self.queues > 1) << VIRTIO_BLK_F_MQ
        if missing := [bit for bit in range(64) if wanted & ~offered & 1 << bit]:
            raise ConnectionFailedError(f"{self.socket_path}: the back-end does not offer the feature bits {missing}")
        protocol = connection.get_u64(vu.VHOST_USER_GET_PROTOCOL_FEATURES)
        if not protocol & 1 << vu.VHOST_USER_PROTOCOL_F_CONFIG:
            raise ConnectionFailedError(f"{self.socket_path}: the back-end does not offer its configuration space")
        known = (vu.VHOST_USER_PROTOCOL_F_MQ, vu.VHOST_USER_PROTOCOL_F_REPLY_ACK, vu.VHOST_USER_PROTOCOL_F_CONFIG)
        protocol &= sum(1 << bit for bit in known)
        connection.set(vu.VHOST_USER_SET_PROTOCOL_FEATURES, vu.U64.pack(protocol))
        connection.acknowledged = bool(protocol & 1 << vu.VHOST_USER_PROTOCOL_F_REPLY_ACK)
        if protocol & 1 << vu.VHOST_USER_PROTOCOL_F_MQ:
            self.queues_offered = connection.get_u64(vu.VHOST_USER_GET_QUEUE_NUM)
        if self.queues > self.queues_offered:
            raise ConnectionFailedError(
                f"{self.socket_path}: the back-end has {self.queues_offered} queues, not {self.queues}"
            )
        connection.set(vu.VHOST_USER_SET_OWNER)
        request = vu.CONFIG_HEADER.pack(0, CONFIG_SIZE, 0) + bytes(CONFIG_SIZE)
        reply = connection.get(vu.VHOST_USER_GET_CONFIG, request)
        if len(reply) != len(request):
            raise ConnectionFailedError(f"{self.socket_path}: the back-end did not give its configuration space")
        self.capacity = CAPACITY.unpack_from(reply, vu.CONFIG_HEADER.size)[0] * SECTOR_SIZE
        self.features = wanted
        connection.set(vu.VHOST_USER_SET_FEATURES, vu.U64.pack(wanted))

    def start(self) -> None:
        """Make the guest memory and the queues, and hand them to the back-end."""
        ffi, lib = load_frontend()
        setup = ffi.new("struct fe_setup *")
        setup.queue_size, setup.request_max = self.queue_size, self.request_max
        setup.segment = self.segment or self.request_max
        setup.packed, setup.event_idx, setup.indirect = self.packed, self.event_idx, self.indirect
        if not 0 < self.request_max // setup.segment <= lib.FE_SEGMENTS_MAX:
            raise ValueError(f"a request takes 1 to {lib.FE_SEGMENTS_MAX} segments")
        if lib.fe_queue_depth(setup) < 1:
            raise ValueError("the queue is too small for one chain")
        size = lib.fe_queue_bytes(setup)
        self._map(self.queues * size)
        for index in range(self.queues):
            kick_fd, call_fd = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
            queue = _Queue(kick_fd, call_fd, ffi.NULL, ffi.new("struct fe_layout *"), index * size)
            self._queues.append(queue)
            setup.memory, setup.gpa = self._pointer + queue.offset, GPA_BASE + queue.offset
            setup.queue_index, setup.kick_fd, setup.call_fd = index, kick_fd, call_fd
            queue.handle = lib.fe_queue_new(setup, queue.layout)
            if queue.handle == ffi.NULL:
                raise MemoryError
        for index in range(self.queues):
            self._start_queue(index)

    def _map(self, size: int) -> None:
        fd = os.memfd_create("bench-guest", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            self._memory = mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            ffi, _ = load_frontend()
            self._pointer = ffi.cast("uint8_t *", ffi.from_buffer(self._memory, require_writable=True))
            payload = vu.MEMORY_HEADER.pack(1, 0) + vu.MEMORY_REGION.pack(GPA_BASE, size, self._uva(0), 0)
            self._require().set(vu.VHOST_USER_SET_MEM_TABLE, payload, [fd])
        finally:
            os.close(fd)

    def _start_queue(self, index: int) -> None:
        connection, queue = self._require(), self._queues[index]
        base = load_frontend()[1].fe_queue_base(queue.handle)
        desc, used, avail = (
            self._uva(queue.offset + getattr(queue.layout, part)) for part in ("desc", "used", "avail")
        )
        connection.set(vu.VHOST_USER_SET_VRING_NUM, vu.VRING_STATE.pack(index, self.queue_size))
        connection.set(vu.VHOST_USER_SET_VRING_BASE, vu.VRING_STATE.pack(index, base))
        connection.set(vu.VHOST_USER_SET_VRING_ADDR, vu.VRING_ADDR.pack(index, 0, desc, used, avail, 0))
        connection.set(vu.VHOST_USER_SET_VRING_CALL, vu.U64.pack(index), [queue.call_fd])
        connection.set(vu.VHOST_USER_SET_VRING_KICK, vu.U64.pack(index), [queue.kick_fd])
        connection.set(vu.VHOST_USER_SET_VRING_ENABLE, vu.VRING_STATE.pack(index, 1))

    def _uva(self, offset: int) -> int:
        return int(load_frontend()[0].cast("uintptr_t", self._pointer)) + offset

    def _require(self) -> Connection:
        if self._connection is None:
            raise ConnectionFailedError(f"{self.socket_path}: not connected")
        return self._connection

    def run(self, job: Job) -> RunResult:
        """Do ``job`` on all queues, in the calling thread and without the GIL.

        Raises ``DeviceFaultError`` when the device breaks a promise, stalls, or (unless ``allow_errors``) fails a
        request; ``ValueError`` for a job that cannot be.
        """
        ffi, lib = load_frontend()
        blocks = job.blocks or self.capacity // job.request_bytes - job.first_block
        self._check(job, blocks)
        c_job = ffi.new("struct fe_job *")
        c_job.duration_ns, c_job.requests = int(job.seconds * 1e9), job.requests
        c_job.first_block, c_job.blocks = job.first_block, blocks
        c_job.choice_seed, c_job.stall_ns = job.choice_seed, int(job.stall_seconds * 1e9)
        c_job.request_bytes, c_job.depth = job.request_bytes, job.depth
        c_job.order = lib.FE_SEQUENTIAL if job.order == "sequential" else lib.FE_RANDOM
        c_job.write_percent, c_job.sleep, c_job.verify = job.write_percent, job.sleep, job.verify
        c_job.pattern_seed = self.pattern_seed
        c_job.generations = self._known_generations(job) if job.verify or job.write_percent else ffi.NULL
        handles = ffi.new("struct fe_queue *[]", [queue.handle for queue in self._queues])
        results = ffi.new("struct fe_result[]", len(self._queues))
        fault = ffi.new("struct fe_fault *")
        code = lib.fe_run(handles, len(self._queues), c_job, results, fault)
        if code:
            raise DeviceFaultError(self._explain(code, fault, job), code)
        result = merge_results([results[index] for index in range(len(self._queues))])
        if result.errors and not job.allow_errors:
            raise DeviceFaultError(f"{self.socket_path}: {result.errors} of {result.requests} requests failed", 0)
        return result

    def _check(self, job: Job, blocks: int) -> None:
        depth_max = load_frontend()[1].fe_queue_depth(self._setup_of_depth())
        share = blocks // self.queues
        if not self._queues:
            raise ValueError("the front-end is not started")
        if not (job.seconds > 0 or job.requests > 0):
            raise ValueError("a job needs seconds or requests")
        if job.request_bytes > self.request_max or job.request_bytes % SECTOR_SIZE or job.request_bytes <= 0:
            raise ValueError(f"request_bytes is {job.request_bytes}: a multiple of 512 up to {self.request_max}")
        if not 1 <= job.depth <= depth_max:
            raise ValueError(f"depth is {job.depth}: these queues carry 1 to {depth_max} requests")
        if share < job.depth or (job.first_block + blocks) * job.request_bytes > self.capacity:
            raise ValueError(f"{blocks} blocks do not fit the disk, or give each queue fewer than depth")

    def _setup_of_depth(self) -> Any:
        setup = load_frontend()[0].new("struct fe_setup *")
        setup.queue_size, setup.indirect = self.queue_size, self.indirect
        setup.request_max, setup.segment = self.request_max, self.segment or self.request_max
        return setup

    def _known_generations(self, job: Job) -> Any:
        """The generations of all blocks of this size: what ``fill`` or earlier runs wrote, 0 at first."""
        if job.request_bytes not in self._generations:
            count = self.capacity // job.request_bytes
            self._generations[job.request_bytes] = load_frontend()[0].new("uint32_t[]", count)
        return self._generations[job.request_bytes]

    def _explain(self, code: int, fault: Any, job: Job) -> str:
        _, lib = load_frontend()
        texts = {
            lib.FE_E_STALLED: f"nothing came back for {job.stall_seconds:g} s",
            lib.FE_E_LOST_CALL: f"requests came back, but no call in {job.stall_seconds:g} s",
            lib.FE_E_BAD_ID: f"the used element's id {fault.detail} is no request in flight",
            lib.FE_E_BAD_INDEX: "the used index ran ahead of the available one",
            lib.FE_E_BAD_DATA: f"the data read at byte {fault.detail} is not what was written",
        }
        text = texts.get(code, os.strerror(-code) if -4096 < code < 0 else str(code))
        return (
            f"{self.socket_path}: queue {fault.queue_index}: {text} (in flight {fault.in_flight}, avail index "
            f"{fault.avail_idx:#x}, last used {fault.last_used:#x}; the device published {fault.used_idx:#x} and wants "
            f"its next kick at {fault.kick_wish:#x})"
        )

    def fill(self, blocks: int = 0, request_bytes: int = 4096) -> RunResult:
        """Write the pattern to the first ``blocks`` blocks (default: the whole disk), each exactly once.

        ``blocks`` must be a multiple of the number of queues, or its rest stays as it is.
        """
        share = (blocks or self.capacity // request_bytes) // self.queues
        job = Job(requests=share, blocks=share * self.queues, depth=min(8, share), request_bytes=request_bytes)
        return self.run(replace(job, order="sequential", write_percent=100))

    def stop(self) -> list[int]:
        """GET_VRING_BASE of every queue; raises ``DeviceFaultError`` if one is not where the driver stands."""
        _, lib = load_frontend()
        bases = []
        for index, queue in enumerate(self._queues):
            reply = self._require().get(vu.VHOST_USER_GET_VRING_BASE, vu.VRING_STATE.pack(index, 0))
            _, base = vu.VRING_STATE.unpack(reply)
            expected = lib.fe_queue_base(queue.handle)
            if base != expected:
                raise DeviceFaultError(
                    f"{self.socket_path}: queue {index} stopped at {base:#x}, not at {expected:#x}", 0
                )
            bases.append(base)
        return bases

    def close(self) -> None:
        """End the connection and free everything; may be called again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        _, lib = load_frontend()
        for queue in self._queues:
            lib.fe_queue_free(queue.handle)
            os.close(queue.kick_fd)
            os.close(queue.call_fd)
        self._queues.clear()
        self._generations.clear()
        self._pointer = None
        self._memory = None  # unmapped with its last reference
