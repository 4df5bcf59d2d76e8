"""The block device: however many pieces of memory a request has, its answer is the same, cached or not."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import pytest
from kit.front_end.frontend import F_INDIRECT_DESC, NATIVE_SETTINGS, Plugged, Setting, every_reactor, plugged
from kit.guest.blk import S_OK, T_IN, T_OUT, Answer, BlkDriver, contents, every_kind, header, make_disk, pattern
from structlog.testing import capture_logs
from structlog.typing import EventDict

from virtio.devices.blk.device import Blk, BlkOptions
from virtio.fd import OwnedFd
from virtio.testing.driver import Element
from virtio.waist import MemoryRegion

SECTOR: Final = 512
MIB: Final = 1 << 20
PAGE: Final = 4096
MEMORY: Final = BlkOptions(backend="memory", size=MIB)


def forget_cache(path: Path) -> None:
    """The host's page cache holds nothing of the file; no effect on tmpfs, where there is nothing else."""
    if not path.exists():  # a disk in memory
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def read_both_ways(disk: BlkDriver, image: Path, pieces: list[int], data: bytes) -> None:
    """Read ``data`` into ``pieces`` from the storage, then from the page cache."""
    forget_cache(image)
    for _ in range(2):
        answer = await disk.raw([header(T_IN)], [*pieces, 1], indirect=True)
        assert answer == Answer(S_OK, data, len(data) + 1)


@every_reactor
@every_kind
@pytest.mark.parametrize("count", [127, 136, 137, 200, 1022])
async def test_a_request_of_many_pieces_is_answered_alike_cold_and_cached(
    setting: Setting, kind: str, count: int, image: Path
) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        data = pattern(count * SECTOR, count)
        pieces = [data[n : n + SECTOR] for n in range(0, len(data), SECTOR)]
        assert await disk.raw([header(T_OUT), *pieces], [1], indirect=True) == Answer(S_OK, b"", 1)
        await disk.flush()
        await read_both_ways(disk, image, [SECTOR] * count, data)


async def share_by_pages(p: Plugged) -> None:
    """Share the guest's memory with one region for each page."""
    m = p.guest.memory
    regions = [MemoryRegion(m.gpa + at, PAGE, m.uva + at, at, OwnedFd(os.dup(m.fd))) for at in range(0, m.size, PAGE)]
    await p.backend.set_memory(regions)


@every_reactor
@every_kind
async def test_buffers_that_cross_memory_regions_are_read_and_written_whole(
    setting: Setting, kind: str, image: Path
) -> None:
    async with plugged(make_disk(kind, image, size=4 * MIB), setting, start=False) as p:
        # One buffer of 1 MiB crosses 256 regions; a list of 30 buffers names the same pages again and again.
        disk = await start_with(p, share_by_pages)
        at = p.guest.memory.allocate(MIB, PAGE)
        data = pattern(MIB, 5)
        p.guest.memory.write(at, data)
        whole = [Element(at, MIB, False)]
        assert await transfer(disk, T_OUT, whole) == S_OK
        again = [Element(at + n * 64 * 1024, 64 * 1024, False) for n in range(16)] * 3
        assert await transfer(disk, T_OUT, again, MIB // SECTOR) == S_OK
        forget_cache(image)
        for _ in range(2):
            for sector in range(0, 4 * MIB // SECTOR, MIB // SECTOR):
                p.guest.memory.write(at, bytes(MIB))
                assert await transfer(disk, T_IN, [Element(at, MIB, True)], sector) == S_OK
                assert p.guest.memory.read(at, MIB) == data


@every_reactor
async def test_a_request_of_more_pieces_than_one_system_call_takes_is_served(
    setting: Setting, image_file: Path
) -> None:
    async with plugged(make_disk("file", image_file, size=32 * MIB), setting, start=False) as p:
        disk = await start_with(p, share_by_pages)
        at = p.guest.memory.allocate(MIB, PAGE)
        data = pattern(MIB, 6)
        p.guest.memory.write(at, data)
        # 30 times 256 pages, each of which is a piece: the kernel takes 1024 in one call.
        assert await transfer(disk, T_OUT, [Element(at, MIB, False)] * 30) == S_OK
        forget_cache(image_file)
        for _ in range(2):
            p.guest.memory.write(at, bytes(MIB))
            assert await transfer(disk, T_IN, [Element(at, MIB, True)] * 30) == S_OK
            assert p.guest.memory.read(at, MIB) == data
        assert contents(image_file) == data * 30 + bytes(2 * MIB)


# --- what the config space promises ---

SEG_MAX_AT: Final = 12


async def seg_max_of(p: Plugged) -> int:
    return int.from_bytes(await p.guest.link.read_config(SEG_MAX_AT, 4), "little")


def small_rings(logs: list[EventDict]) -> list[tuple[object, object]]:
    return [(line["size"], line["descriptors"]) for line in logs if "too small for the requests" in line["event"]]


@pytest.mark.parametrize("setting", NATIVE_SETTINGS[:1], ids=str)
@pytest.mark.parametrize("size", [4, 16, 64, 128, 256])
async def test_seg_max_fits_into_the_ring_that_the_front_end_chose(setting: Setting, size: int) -> None:
    async with plugged(Blk("disk", MEMORY, 2, 32768), setting, start=False) as p:
        assert await seg_max_of(p) == 126  # nothing is known of the rings yet
        with capture_logs() as logs:
            await p.guest.start(queue_size=size)
        assert small_rings(logs) == []  # with indirect descriptors a chain may be longer than its ring
        assert await seg_max_of(p) == min(126, size - 2)
        await p.guest.link.reset()
        assert await seg_max_of(p) == 126


@every_reactor
async def test_a_ring_without_room_for_what_was_promised_is_one_warning_that_names_the_key(setting: Setting) -> None:
    disk = Blk("disk", MEMORY, 1, 32768)
    async with plugged(disk, setting, start=False) as p:
        assert await seg_max_of(p) == 126
        with capture_logs() as logs:
            await p.guest.start(queue_size=64, without=F_INDIRECT_DESC)
        assert small_rings(logs) == [(64, 128)]
        assert "queue_size = 64" in next(line["hint"] for line in logs if "hint" in line)


@every_reactor
async def test_a_configured_queue_size_keeps_the_promise_for_every_driver(setting: Setting) -> None:
    async with plugged(Blk("disk", MEMORY, 1, 64), setting, start=False) as p:
        assert await seg_max_of(p) == 62
        with capture_logs() as logs:
            await p.guest.start(queue_size=64, without=F_INDIRECT_DESC)
        assert small_rings(logs) == []
        disk = BlkDriver(p.guest.queues[0])
        data = pattern(62 * SECTOR, 1)
        pieces = [data[n : n + SECTOR] for n in range(0, len(data), SECTOR)]
        assert await disk.raw([header(T_OUT), *pieces], [1]) == Answer(S_OK, b"", 1)


def test_a_disk_that_is_only_read_promises_no_discards(tmp_path: Path) -> None:
    disk = make_disk("file", tmp_path / "image", read_only=True)
    assert disk.config_space()[36:57] == bytes(21)  # from max_discard_sectors to write_zeroes_may_unmap
    disk.close()


# --- helpers ---


async def start_with(p: Plugged, share: Callable[[Plugged], Awaitable[None]]) -> BlkDriver:
    await p.guest.negotiate()
    await share(p)
    p.guest.add_queue(64)
    await p.guest.start_queue(0)
    return BlkDriver(p.guest.queues[0])


async def transfer(disk: BlkDriver, kind: int, data: list[Element], sector: int = 0) -> int:
    """The status of a request with these data buffers."""
    memory = disk.queue.driver.memory
    gpa = memory.allocate(32)
    memory.write(gpa, header(kind, sector))
    elements = [Element(gpa, 16, False), *data, Element(gpa + 16, 1, True)]
    token = disk.queue.driver.add_elements(elements, owned=[(gpa, 32)])
    return (await disk.statuses(token))[0]


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"
