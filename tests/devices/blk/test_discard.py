"""The block device: discard and write zeroes do what they say, to the sectors named and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.front_end.frontend import Setting, every_native_setting, every_reactor, plugged
from kit.guest.blk import (
    S_OK,
    T_DISCARD,
    T_WRITE_ZEROES,
    UNMAP,
    Answer,
    BlkDriver,
    blocks_of,
    every_file,
    every_kind,
    header,
    make_disk,
    pattern,
    segment,
)

SECTOR = 512
SIZE = 1 << 20
CONTENT = pattern(SIZE, 11)


@every_native_setting
@every_file
@pytest.mark.parametrize("how", ["discard", "write_zeroes_with_unmap"])
async def test_blocks_are_given_back_to_the_file_system(setting: Setting, kind: str, how: str, image: Path) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        await disk.write(0, CONTENT)
        await disk.flush()
        before = blocks_of(image)
        assert before >= SIZE // SECTOR
        if how == "discard":
            await disk.discard(512, 1024)
        else:
            await disk.write_zeroes(512, 1024, unmap=True)
        assert before - blocks_of(image) >= 1000
        assert await disk.read(512, 1024 * SECTOR) == bytes(1024 * SECTOR)
        assert await disk.read(0, 512 * SECTOR) == CONTENT[: 512 * SECTOR]
        assert await disk.read(1536, 512 * SECTOR) == CONTENT[1536 * SECTOR :]
        assert image.stat().st_size == SIZE  # noqa: ASYNC240


@every_native_setting
@every_file
async def test_write_zeroes_without_unmap_keep_the_space(setting: Setting, kind: str, image: Path) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        await disk.write(0, CONTENT)
        await disk.flush()
        before = blocks_of(image)
        await disk.write_zeroes(512, 1024)
        await disk.flush()
        assert blocks_of(image) >= before
        assert await disk.read(512, 1024 * SECTOR) == bytes(1024 * SECTOR)


@every_native_setting
@every_kind
@pytest.mark.parametrize("unmap", [False, True], ids=["keep", "unmap"])
async def test_zeroes_begin_and_end_at_the_very_sector(setting: Setting, kind: str, unmap: bool, image: Path) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        step = int.from_bytes(await p.guest.link.read_config(20, 4), "little") // SECTOR
        expected = bytearray(CONTENT)
        await disk.write(0, CONTENT)
        for first, count in ((3, 1), (5, 2), (7, 13), (30, 40), (100, 8), (200, 300), (2047, 1)):
            at, sectors = first * step, count * step
            if (at + sectors) * SECTOR > SIZE:
                continue
            await disk.write_zeroes(at, sectors, unmap=unmap)
            expected[at * SECTOR : (at + sectors) * SECTOR] = bytes(sectors * SECTOR)
        assert await disk.read(0, SIZE) == bytes(expected)


@every_native_setting
@every_kind
@pytest.mark.parametrize("flags", [0, UNMAP], ids=["keep", "unmap"])
async def test_sixteen_segments_in_one_request_are_all_zeroed(
    setting: Setting, kind: str, flags: int, image: Path
) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        expected = bytearray(CONTENT)
        await disk.write(0, CONTENT)
        data = b"".join(segment(64 * n, 8 * (n % 3), flags) for n in range(16))  # some of them empty
        for n in range(16):
            expected[64 * n * SECTOR : (64 * n + 8 * (n % 3)) * SECTOR] = bytes(8 * (n % 3) * SECTOR)
        # In pieces of a byte, as a driver may.
        pieces = [data[:1], data[1:17], data[17:100], data[100:]]
        assert await disk.raw([header(T_WRITE_ZEROES), *pieces], [1]) == Answer(S_OK, b"", 1)
        assert await disk.read(0, SIZE) == bytes(expected)
        stats = p.backend.stats().queues[0].ops["write_zeroes"]
        assert (stats.requests, stats.bytes) == (1, sum(8 * (n % 3) for n in range(16)) * SECTOR)


@every_reactor
@every_kind
async def test_a_discard_of_nothing_succeeds(setting: Setting, kind: str, image: Path) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        await disk.write(0, CONTENT)
        for request_kind in (T_DISCARD, T_WRITE_ZEROES):
            for count in (1, 16):
                assert await disk.request(request_kind, data=segment(0, 0) * count) == Answer(S_OK, b"", 1)
        assert await disk.read(0, SIZE) == CONTENT


@every_reactor
async def test_memory_is_given_back_by_a_discard(setting: Setting, tmp_path: Path) -> None:
    async with plugged(make_disk("memory", tmp_path, size=64 << 20), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        for at in range(0, 64, 2):
            await disk.write(at * 2048, CONTENT * 2)
        before = resident_pages()
        await disk.discard(0, 64 * 2048)
        assert before - resident_pages() > 12 * 1024  # of 16384
        assert await disk.read(30 * 2048, SIZE) == bytes(SIZE)


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])
