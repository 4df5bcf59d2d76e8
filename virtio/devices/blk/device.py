"""The block device (section 5.2): a raw image, a block device, memory, or nothing at all. Served by native workers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import structlog
import trio
from pydantic import BeforeValidator, Field, model_validator

from virtio import spec
from virtio.capabilities import DiskStorage
from virtio.claims import Claims
from virtio.config_space import VIRTIO_BLK_CONFIG, VIRTIO_BLK_CONFIG_WRITEBACK
from virtio.device import Device, DeviceOptions
from virtio.devices.blk.image import Image, open_again, open_image
from virtio.devices.blk.image_reopen import Reopening
from virtio.devices.blk.image_size import extend_image, usable_size
from virtio.devices.blk.storage_watch import StorageWatch
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.native.disk import DISCARD_SEGMENTS, OPS, SECTOR_SIZE, SEG_MAX, DiskBackend, DiskSetup, NativeDisk
from virtio.native.stats import Storage, StorageErrors

VIRTIO_BLK_F_SEG_MAX: Final = 2
VIRTIO_BLK_F_RO: Final = 5
VIRTIO_BLK_F_BLK_SIZE: Final = 6
VIRTIO_BLK_F_FLUSH: Final = 9
VIRTIO_BLK_F_TOPOLOGY: Final = 10
VIRTIO_BLK_F_CONFIG_WCE: Final = 11
VIRTIO_BLK_F_MQ: Final = 12
VIRTIO_BLK_F_DISCARD: Final = 13
VIRTIO_BLK_F_WRITE_ZEROES: Final = 14

MAX_ZEROED_SECTORS: Final = 1 << 21
"""Most sectors of one discard or write-zeroes segment: 1 GiB, so that none holds up a queue's drain for long."""

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(value: object) -> object:
    """``"64M"``, ``"1.5GiB"`` or a number of bytes to an int; anything else is left for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    text = value.strip().upper().removesuffix("B").removesuffix("I")
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS and text[-1:] else (text, "")
    try:
        size = float(number) * _UNITS[unit]
    except ValueError:
        raise ValueError(f'{value!r} is not a size; say a number of bytes, or "64M", "10G", "1.5GiB"') from None
    if size != int(size):
        raise ValueError(f"{value!r} is not a whole number of bytes")
    return int(size)


Size = Annotated[int, BeforeValidator(parse_size)]


class BlkOptions(DeviceOptions):
    """Options of ``type = "blk"``."""

    path: Path | None = Field(None, description="The raw image or block device. Its format is never guessed.")
    backend: Literal["file", "memory", "null"] = Field(
        "file", description='"file": the image at path; "memory": forgotten at the end; "null": answers without I/O'
    )
    size: Size | None = Field(
        None, description='Size of a "memory" or "null" disk, for instance "1GiB".', ge=512, le=1 << 62
    )
    read_only: bool = Field(False, description="Refuse every write, whatever the guest asks for.")
    serial: str = Field("", max_length=20, pattern=r"^[\x20-\x7e]*$", description="Serial number, up to 20 characters.")
    direct: bool = Field(False, description="O_DIRECT: past the host's page cache.")
    block_size: Literal[512, 4096] = Field(
        512,
        description="Logical block size: the unit in which the guest reads, writes and counts, partition tables too. "
        "It is never taken from the host: what direct I/O cannot take there goes through a buffer.",
    )
    physical_block_size: Literal[512, 1024, 2048, 4096, 8192, 16384, 32768, 65536] = Field(
        4096,
        description="The block that the guest should align its writes to; a hint, of at least block_size.",
    )
    tail: Literal["refuse", "extend", "cut"] = Field(
        "refuse",
        description="An image whose size is no multiple of block_size. refuse: the device fails and says so; extend: "
        "the file is made longer, by zeroes, to the next multiple; cut: the guest never sees the last piece.",
    )
    write_cache: Literal["writeback", "writethrough"] = Field(
        "writeback", description="writeback: durable after a flush; writethrough: every write is durable when answered."
    )

    on_error: Literal["report", "stop"] = Field(
        "report",
        description="What follows when the storage fails a request. report: the guest gets an I/O error; stop: the "
        "request is kept, the disk's requests wait, and it is tried again, by itself and at hyperbell retry.",
    )

    def claims(self, name: str) -> Claims:
        return Claims(read_only=self.read_only)

    @model_validator(mode="after")
    def _what_goes_together(self) -> BlkOptions:
        if self.backend == "file" and self.path is None:
            raise ValueError('path is missing: name the image, or set backend = "memory" or "null"')
        if self.backend == "file" and self.size is not None:
            raise ValueError("size is the image's own; leave it out (truncate -s changes the image)")
        if self.backend != "file" and self.size is None:
            raise ValueError(f'size is missing: a "{self.backend}" disk has none of its own, say size = "1GiB"')
        if self.backend != "file" and self.path is not None:
            raise ValueError(f'path and backend = "{self.backend}" exclude each other')
        if self.backend != "file" and self.direct:
            raise ValueError(f'direct has no meaning with backend = "{self.backend}"')
        if self.backend != "file" and self.on_error != "report":
            raise ValueError(f'on_error has no meaning with backend = "{self.backend}": nothing of it can fail')
        if self.size is not None and self.size % self.block_size:
            raise ValueError(f"size is not a multiple of {self.block_size} (block_size)")
        if self.physical_block_size < self.block_size:
            raise ValueError(f"physical_block_size = {self.physical_block_size} is less than block_size")
        if self.tail == "extend" and self.read_only:
            raise ValueError('tail = "extend" writes to the image, and read_only forbids it; set tail = "cut"')
        return self


class Blk(Device, DiskStorage):
    """One disk."""

    virtio_id: ClassVar[int] = spec.VIRTIO_ID_BLOCK
    type_name = "blk"
    native = True
    files_may_hang = True
    queue_counts = (1, 256)
    ops = OPS
    Options = BlkOptions
    feature_bits = {
        "VIRTIO_BLK_F_SEG_MAX": VIRTIO_BLK_F_SEG_MAX,
        "VIRTIO_BLK_F_RO": VIRTIO_BLK_F_RO,
        "VIRTIO_BLK_F_BLK_SIZE": VIRTIO_BLK_F_BLK_SIZE,
        "VIRTIO_BLK_F_FLUSH": VIRTIO_BLK_F_FLUSH,
        "VIRTIO_BLK_F_TOPOLOGY": VIRTIO_BLK_F_TOPOLOGY,
        "VIRTIO_BLK_F_CONFIG_WCE": VIRTIO_BLK_F_CONFIG_WCE,
        "VIRTIO_BLK_F_MQ": VIRTIO_BLK_F_MQ,
        "VIRTIO_BLK_F_DISCARD": VIRTIO_BLK_F_DISCARD,
        "VIRTIO_BLK_F_WRITE_ZEROES": VIRTIO_BLK_F_WRITE_ZEROES,
    }

    def __init__(self, name: str, options: BlkOptions, queues: int, queue_size: int) -> None:
        super().__init__(name, options, queues, queue_size)
        self._options = options
        self._image: Image | None = None
        if options.path is not None:
            self._image = open_image(
                options.path, read_only=options.read_only, direct=options.direct, block_size=options.block_size
            )
        self._examined: int | None = None
        self._sync_fds = 0
        self._storage_before = Storage((), None)
        self._news = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        try:
            self._capacity = self._measure()
            self._disk = self._make_disk()
        except BaseException:
            self._close_files()
            raise
        self._promised_chain = 0
        self._writeback = options.write_cache == "writeback"
        self._disk.set_writeback(self._writeback)

    def _make_disk(self) -> NativeDisk:
        try:
            return NativeDisk(self._setup())
        except HostError as error:
            if self._options.backend != "memory":
                raise
            what = f"size: a disk in memory of {self._capacity * SECTOR_SIZE} bytes cannot be had here"
            raise HostError(f"{what} ({error}); lower size", errno=error.errno) from error

    def _measure(self) -> int:
        """Capacity in sectors."""
        image, options = self._image, self._options
        if image is None:
            return (options.size or 0) // SECTOR_SIZE
        there = image.size()
        size = usable_size(options, there, image.is_block_device)
        if size > there:
            extend_image(image, options, size)
        return size // SECTOR_SIZE

    def _setup(self) -> DiskSetup:
        backend = {"memory": DiskBackend.MEMORY, "null": DiskBackend.NULL}.get(self._options.backend, DiskBackend.FILE)
        if self._image is not None and self._image.is_block_device:
            backend = DiskBackend.BLOCK_DEVICE
        writable = not self._options.read_only
        return DiskSetup(
            backend=backend,
            capacity=self._capacity,
            fd=self._image.fd if self._image is not None else None,
            block_size=self._options.block_size,
            direct=self._image.direct if self._image is not None else None,
            erase_align=self._image.erase_align if self._image is not None else 1,
            read_only=self._options.read_only,
            discard=writable,
            write_zeroes=writable,
            max_discard_sectors=MAX_ZEROED_SECTORS,
            max_write_zeroes_sectors=MAX_ZEROED_SECTORS,
            serial=self._options.serial.encode("ascii"),
            stop_on_error=self._options.on_error == "stop",
            news_fd=self._news,
            queues=self.queue_count,
        )

    @property
    def promised_chain(self) -> int:
        return self._promised_chain

    @property
    def native_device(self) -> NativeDisk:
        return self._disk

    def features(self) -> int:
        bits = super().features()
        if self._options.read_only:
            bits &= ~(1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES)
        else:
            bits &= ~(1 << VIRTIO_BLK_F_RO)
        if self.queue_count == 1:
            bits &= ~(1 << VIRTIO_BLK_F_MQ)
        return bits

    def set_driver_features(self, bits: int) -> None:
        super().set_driver_features(bits)
        self._disk.accept(
            discards=bool(bits >> VIRTIO_BLK_F_DISCARD & 1),
            zeroes=bool(bits >> VIRTIO_BLK_F_WRITE_ZEROES & 1),
            legacy=not bits >> spec.VIRTIO_F_VERSION_1 & 1,
        )
        # 5.2.5.2: with CONFIG_WCE the driver chooses and starts from our default; without it a driver that can
        # flush gets the configured mode, and one that cannot must find every write durable.
        flushes = bits >> VIRTIO_BLK_F_FLUSH & 1 or bits >> VIRTIO_BLK_F_CONFIG_WCE & 1
        self._set_writeback(bool(flushes) and self._options.write_cache == "writeback")

    def _set_writeback(self, on: bool) -> None:
        self._writeback = on
        self._disk.set_writeback(on)

    def config_space(self) -> bytes:
        # All that a guest builds on is configured: it finds the same disk on every host. The hints are the host's.
        image, block, physical = self._image, self._options.block_size, self._options.physical_block_size
        alignment = max(physical // SECTOR_SIZE, 1)
        # A request has a header and a status beside its data. Once rings are set up, the smallest of them is known.
        segments = max(min(SEG_MAX, min((self.queue_size, *self.ring_sizes.values())) - 2), 1)
        self._promised_chain = segments + 2
        writable = not self._options.read_only
        fields: dict[str, Any] = {
            "capacity": self._capacity,
            "size_max": 0,
            "seg_max": segments,
            "cylinders": 0,
            "heads": 0,
            "sectors": 0,
            "blk_size": block,
            "physical_block_exp": max((physical // block).bit_length() - 1, 0),
            "alignment_offset": 0,
            "min_io_size": min(max(image.minimum_io if image is not None else 0, physical) // block, 0xFFFF),
            "opt_io_size": (image.optimal_io if image is not None else 0) // block,
            "writeback": int(self._writeback),
            "num_queues": self.queue_count,
            "max_discard_sectors": MAX_ZEROED_SECTORS if writable else 0,
            "max_discard_seg": DISCARD_SEGMENTS if writable else 0,
            "discard_sector_alignment": alignment if writable else 0,
            "max_write_zeroes_sectors": MAX_ZEROED_SECTORS if writable else 0,
            "max_write_zeroes_seg": DISCARD_SEGMENTS if writable else 0,
            "write_zeroes_may_unmap": int(writable),
        }
        return bytes(VIRTIO_BLK_CONFIG.build(fields))

    def write_config(self, offset: int, data: bytes) -> None:
        """Only ``writeback`` may be written, and only with CONFIG_WCE; the rest is read-only and stays (5.2.4)."""
        at = VIRTIO_BLK_CONFIG_WRITEBACK - offset
        if 0 <= at < len(data) and self.driver_features >> VIRTIO_BLK_F_CONFIG_WCE & 1:
            self._set_writeback(bool(data[at] & 1))

    def examine(self) -> None:
        self._examined = self._measure()

    def refresh(self) -> bool:
        """The image may have been resized: the guest is told its new capacity."""
        capacity = self._measure() if self._examined is None else self._examined
        self._examined = None
        if capacity == self._capacity:
            return False
        if capacity < self._capacity:
            structlog.get_logger().warning(
                "the image is smaller than before: what was behind its new end is lost to the guest",
                device=self.name,
                bytes_before=self._capacity * SECTOR_SIZE,
                bytes_now=capacity * SECTOR_SIZE,
            )
        self._capacity = capacity
        self._disk.set_capacity(capacity)
        self.config_changed()
        return True

    def reset(self) -> None:
        # 5.2.5.2: what the next driver reads before it negotiates is our default. QEMU reads it as it connects, and
        # shows the driver what it read then; without this, every guest but the first would write through.
        self._set_writeback(self._options.write_cache == "writeback")

    # ---- its storage ----

    def use_workers(self, count: int) -> None:
        """Each of them flushes by an open file description of its own: virtio/dataplane/blk/flush.c says why."""
        if self._image is not None and not self._options.read_only and count - 1 != self._sync_fds:
            self._sync_fds = count - 1
            self._disk.use_sync_fds([open_again(self._image, self._options.path) for _ in range(self._sync_fds)])

    @property
    def disk(self) -> DiskStorage:
        return self

    def storage(self) -> Storage | None:
        if self._image is None:
            return None
        errors, before = self._disk.errors(), self._storage_before
        counts = Counter(errors.counts)
        counts.update({(each.op, each.errno): each.count for each in before.errors})
        reopened = errors.reopened + before.reopened + (before.flush_failed is not None)
        return Storage(
            tuple(StorageErrors(*kind, count) for kind, count in counts.items()),
            errors.flush_failed,
            reopened,
            " ".join(errors.stopped) if errors.stopped is not None else None,
            errors.kept,
            errors.retries + before.retries,
        )

    def retry_storage(self) -> bool:
        stopped = self._disk.errors().stopped is not None
        self._disk.retry()
        return stopped

    def inherit_storage(self, before: Storage) -> None:
        self._storage_before = before

    def reopening(self) -> Callable[[], None]:
        if self._image is None or self._options.path is None:
            raise HostError(f'a disk with backend = "{self._options.backend}" has no image to open again')
        return Reopening(self._image, self._options.path, self._sync_fds, self._disk.installer())

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Report what the storage answers with errors, and what follows for the guest."""
        watch = StorageWatch(self.name, self._disk, self._news, self._look, self._storage_before.flush_failed)
        task_status.started()
        await watch.run()

    def _look(self) -> tuple[int, int]:
        """In a thread: the size of the disk and of its image in bytes."""
        if self._image is None:
            raise HostError("there is no image")
        return self._capacity * SECTOR_SIZE, self._image.size()

    def close(self) -> None:
        self._disk.close()
        self._close_files()

    def _close_files(self) -> None:
        self._news.close()
        if self._image is not None:
            self._image.close()
