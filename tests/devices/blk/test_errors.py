"""The block device: what a driver may not ask for is answered by the right status, and nothing happens (5.2.6.2)."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.front_end.frontend import Setting, every_native_setting, every_reactor, plugged
from kit.guest.blk import (
    F_DISCARD,
    F_RO,
    F_WRITE_ZEROES,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    UNMAP,
    Answer,
    BlkDriver,
    contents,
    every_kind,
    header,
    make_disk,
    pattern,
    segment,
)

SECTOR = 512
CAPACITY = 2048  # sectors of a 1 MiB disk
CONTENT = pattern(1 << 20, 7)

# Sector and length in bytes of what no disk of 1 MiB has.
BAD_RANGES = {
    "one_sector_at_the_end": (CAPACITY, SECTOR),
    "nothing_beyond_the_end": (CAPACITY + 1, 0),
    "across_the_end": (CAPACITY - 8, 16 * SECTOR),
    "far_beyond": (1 << 40, SECTOR),
    "byte_offset_wraps_to_0": (1 << 55, 8 * SECTOR),
    "byte_offset_wraps_below_the_end": ((1 << 55) + 8, 8 * SECTOR),
    "negative_as_off_t": (1 << 54, 8 * SECTOR),
    "last_sector_number": ((1 << 64) - 1, SECTOR),
    "end_wraps": ((1 << 64) - 8, 16 * SECTOR),
    "half_a_sector": (0, 256),
    "a_sector_and_a_byte": (8, SECTOR + 1),
    "a_byte": (8, 1),
    "more_than_the_disk": (0, (1 << 20) + SECTOR),
}


@every_native_setting
@every_kind
async def test_a_range_the_disk_does_not_have_is_an_error_and_touches_nothing(
    setting: Setting, kind: str, image: Path
) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        await disk.write(0, CONTENT[: 64 << 10])
        for name, (sector, length) in BAD_RANGES.items():
            read = await disk.request(T_IN, sector, room=length)
            assert (read.status, read.written) == (S_IOERR, 1), name
            write = await disk.request(T_OUT, sector, bytes(length))
            assert write == Answer(S_IOERR, b"", 1), name
        assert await disk.read(0, 1 << 20) == CONTENT[: 64 << 10].ljust(1 << 20, b"\0")
        assert p.op("read") == (len(BAD_RANGES) + 1, len(BAD_RANGES))
        assert p.op("write") == (len(BAD_RANGES) + 1, len(BAD_RANGES))
        assert not p.backend.stats().queues[0].broken
    if kind != "memory":
        assert contents(image) == CONTENT[: 64 << 10].ljust(1 << 20, b"\0")


@every_native_setting
async def test_the_null_disk_has_an_end_too(setting: Setting, tmp_path: Path) -> None:
    async with plugged(make_disk("null", tmp_path), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        for sector, length in BAD_RANGES.values():
            assert (await disk.request(T_IN, sector, room=length)).status == S_IOERR


@every_native_setting
async def test_an_unknown_type_is_unsupported(setting: Setting, tmp_path: Path) -> None:
    async with plugged(make_disk("file", tmp_path / "image"), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        unknown = [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 26, 1 << 16, 0x8000_0000, 0x8000_0001, 0xFFFF_FFFF]
        for kind in unknown:
            for data, room in ((b"", 0), (bytes(SECTOR), 0), (b"", SECTOR), (bytes(SECTOR), SECTOR)):
                answer = await disk.request(kind, 0, data, room)
                assert (answer.status, answer.written) == (S_UNSUPP, 1), kind
        assert p.op("other") == (4 * len(unknown), 4 * len(unknown))
        assert await disk.read(0, SECTOR) == bytes(SECTOR)


@every_reactor
async def test_a_request_with_data_in_the_wrong_direction_is_an_error(setting: Setting, tmp_path: Path) -> None:
    async with plugged(make_disk("file", tmp_path / "image"), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        both = [(kind, bytes(SECTOR), SECTOR) for kind in (T_IN, T_OUT, T_FLUSH, T_GET_ID)]
        both += [(kind, segment(0, 8), SECTOR) for kind in (T_DISCARD, T_WRITE_ZEROES)]
        sent = [(kind, bytes(SECTOR), 0) for kind in (T_IN, T_FLUSH, T_GET_ID)]
        received = [(kind, b"", SECTOR) for kind in (T_OUT, T_DISCARD, T_WRITE_ZEROES)]
        for kind, data, room in (*both, *sent, *received):
            answer = await disk.request(kind, 0, data, room)
            assert (answer.status, answer.written) == (S_IOERR, 1), (kind, len(data), room)
        assert await disk.read(0, SECTOR) == bytes(SECTOR)


@every_native_setting
@pytest.mark.parametrize("turned_off", [False, True], ids=["not_accepted", "turned_off"])
async def test_a_request_whose_feature_was_not_negotiated_is_unsupported_and_does_nothing(
    setting: Setting, turned_off: bool, tmp_path: Path
) -> None:
    requests = {T_DISCARD: F_DISCARD, T_WRITE_ZEROES: F_WRITE_ZEROES}
    for number, (declined, feature) in enumerate(requests.items()):
        off = [feature.bit_length() - 1] if turned_off else []
        disk_of_ours = make_disk("file", tmp_path / f"image{number}")
        async with plugged(disk_of_ours, setting, without=0 if turned_off else feature, features_off=off) as p:
            disk = BlkDriver(p.guest.queues[0])
            await disk.write(0, CONTENT[: 64 << 10])
            assert await disk.request(declined, data=segment(0, 8)) == Answer(S_UNSUPP, b"", 1)
            assert await disk.read(0, 64 << 10) == CONTENT[: 64 << 10]
            for other in requests.keys() - {declined}:
                assert (await disk.request(other, data=segment(0, 8))).status == S_OK
            await p.guest.link.reset()
            p.guest.forget_queues()
            if not turned_off:  # the next driver may think otherwise
                await p.guest.start()
                answer = await BlkDriver(p.guest.queues[0]).request(declined, data=segment(0, 8))
                assert answer.status == S_OK


@every_reactor
@every_kind
async def test_direct_io_or_not_the_alignment_is_that_of_the_block_size(
    setting: Setting, kind: str, image: Path
) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        block = int.from_bytes(await p.guest.link.read_config(20, 4), "little")
        expected = S_OK if block == SECTOR else S_IOERR
        assert (await disk.request(T_IN, 1, room=SECTOR)).status == expected
        assert (await disk.request(T_OUT, 1, bytes(SECTOR))).status == expected
        assert (await disk.request(T_DISCARD, data=segment(1, 1))).status == expected


# --- read-only ---


@every_native_setting
@pytest.mark.parametrize("acknowledged", [True, False], ids=["RO_acknowledged", "RO_ignored"])
async def test_a_read_only_disk_is_never_written_to(setting: Setting, acknowledged: bool, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    path.chmod(0o444)
    async with plugged(make_disk("file", path, read_only=True), setting, without=0 if acknowledged else F_RO) as p:
        assert bool(await p.guest.link.device_features() & F_RO)
        disk = BlkDriver(p.guest.queues[0])
        assert await disk.request(T_OUT, 0, bytes(SECTOR)) == Answer(S_IOERR, b"", 1)
        for kind in (T_DISCARD, T_WRITE_ZEROES):
            assert (await disk.request(kind, data=segment(0, 8))).status in (S_IOERR, S_UNSUPP)
        assert await disk.read(0, 64 << 10) == CONTENT[: 64 << 10]
        await disk.flush()
        assert p.op("write") == (1, 1)
    assert contents(path) == CONTENT


# --- discard and write zeroes ---


@every_native_setting
async def test_unknown_flags_are_unsupported_whatever_else_is_wrong(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "image"
    async with plugged(make_disk("file", path), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        await disk.write(0, CONTENT[: 64 << 10])
        cases = [(T_DISCARD, UNMAP), (T_DISCARD, 2), (T_DISCARD, 1 << 31), (T_WRITE_ZEROES, 2)]
        cases += [(T_WRITE_ZEROES, UNMAP | 4), (T_WRITE_ZEROES, 0xFFFF_FFFE)]
        for kind, flags in cases:
            for data in (segment(0, 8, flags), segment(0, 8) + segment(8, 8, flags), segment(CAPACITY, 1, flags)):
                assert await disk.request(kind, data=data) == Answer(S_UNSUPP, b"", 1)
        assert await disk.read(0, 64 << 10) == CONTENT[: 64 << 10]
        assert p.op("discard") == (9, 9)
        assert p.op("write_zeroes") == (9, 9)


@every_native_setting
@every_kind
@pytest.mark.parametrize("request_kind", [T_DISCARD, T_WRITE_ZEROES], ids=["discard", "write_zeroes"])
async def test_segments_beyond_the_limits_are_errors_and_none_of_them_is_carried_out(
    setting: Setting, kind: str, request_kind: int, image: Path
) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        await disk.write(0, CONTENT[: 64 << 10])
        good = segment(0, 8)
        cases = {
            "none": b"",
            "a_byte_short": good[:-1],
            "a_byte_long": good + b"\0",
            "one_too_many": good * 17,
            "beyond_the_end": good + segment(CAPACITY - 8, 16),
            "at_the_end": good + segment(CAPACITY, 8),
            "start_wraps": good + segment(1 << 55, 8),
            "sum_wraps": good + segment((1 << 64) - 8, 16),
            "everything": good + segment((1 << 64) - 1, 0xFFFF_FFFF),
        }
        for name, data in cases.items():
            assert await disk.request(request_kind, data=data) == Answer(S_IOERR, b"", 1), name
        assert await disk.read(0, 64 << 10) == CONTENT[: 64 << 10]


@every_reactor
@pytest.mark.parametrize("request_kind", [T_DISCARD, T_WRITE_ZEROES], ids=["discard", "write_zeroes"])
@pytest.mark.parametrize("kind", ["memory", "file"])
async def test_a_segment_longer_than_promised_is_an_error(
    setting: Setting, kind: str, request_kind: int, image: Path
) -> None:
    async with plugged(make_disk(kind, image, size=3 << 30), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        at = 36 if request_kind == T_DISCARD else 48
        longest = int.from_bytes(await p.guest.link.read_config(at, 4), "little")
        segments_max = int.from_bytes(await p.guest.link.read_config(at + 4, 4), "little")
        assert (longest, segments_max) == (1 << 21, 16)
        assert (await disk.request(request_kind, data=segment(0, longest, 0))).status == S_OK
        assert (await disk.request(request_kind, data=segment(0, longest + 8, 0))).status == S_IOERR


@every_native_setting
async def test_errors_do_not_stop_the_requests_around_them(setting: Setting, tmp_path: Path) -> None:
    async with plugged(make_disk("file", tmp_path / "image"), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        tokens = []
        for n in range(16):
            tokens.append(disk.submit([header(T_OUT, 8 * n), pattern(4096, n)], [1]))
            tokens.append(disk.submit([header(T_OUT, CAPACITY + n), bytes(SECTOR)], [1]))
            if n % 4 == 3:
                assert await disk.statuses(*tokens) == [S_OK, S_IOERR] * 4
                tokens.clear()
        assert await disk.read(0, 16 * 4096) == b"".join(pattern(4096, n) for n in range(16))
        assert (await disk.request(T_FLUSH)).status == S_OK
