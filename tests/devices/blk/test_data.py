"""The block device: what is written is what is read and what lies in the image, whatever the request's shape."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import trio
from kit.front_end.frontend import NATIVE_SETTINGS, Setting, every_native_setting, every_reactor, plugged
from kit.guest.blk import (
    S_OK,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    UNTOUCHED,
    Answer,
    BlkDriver,
    VerifiedLoad,
    contents,
    every_file,
    every_kind,
    header,
    make_disk,
    pattern,
    put,
)
from kit.host.peak import Peak

from virtio.testing.driver import Element, SplitDriver
from virtio.testing.queue import GUARD

MIB = 1 << 20
SECTOR = 512


@every_native_setting
@every_kind
async def test_what_is_written_is_read_back_and_nothing_beside_it_changes(
    setting: Setting, kind: str, image: Path
) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        data = pattern(16 * SECTOR, 1)
        await disk.write(8, data)
        assert await disk.read(0, 40 * SECTOR) == bytes(8 * SECTOR) + data + bytes(16 * SECTOR)
        await disk.write(16, bytes(8 * SECTOR))
        assert await disk.read(8, 16 * SECTOR) == data[: 8 * SECTOR] + bytes(8 * SECTOR)
        await disk.flush()
        assert p.op("write") == (2, 0)
        assert p.op("read") == (2, 0)
        assert p.op("flush") == (1, 0)
    if kind != "memory":
        assert contents(image) == (bytes(8 * SECTOR) + data[: 8 * SECTOR]).ljust(MIB, b"\0")


@every_reactor
@every_kind
async def test_first_and_last_sector_belong_to_the_disk(setting: Setting, kind: str, image: Path) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        capacity = int.from_bytes(await p.guest.link.read_config(0, 8), "little")
        block = int.from_bytes(await p.guest.link.read_config(20, 4), "little")
        assert capacity == MIB // SECTOR
        for sector in (0, capacity - block // SECTOR):
            await disk.write(sector, pattern(block, sector))
            assert await disk.read(sector, block) == pattern(block, sector)


@every_native_setting
@every_kind
async def test_many_requests_under_way_at_once_all_come_back_right(setting: Setting, kind: str, image: Path) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        blocks = {n: pattern(4096, n) for n in range(20)}
        writes = [disk.submit([header(T_OUT, 8 * n), data], [1]) for n, data in blocks.items()]
        assert await disk.statuses(*writes) == [S_OK] * 20
        reads = {n: disk.submit([header(T_IN, 8 * n)], [4096, 1], indirect=n % 2 == 0) for n in blocks}
        disk.queue.kick()
        for n, token in reads.items():
            assert await disk.answer(token) == Answer(S_OK, blocks[n], 4097)
        assert p.backend.stats().queues[0].inflight == 0


@every_native_setting
async def test_a_load_over_two_queues_on_two_workers_stays_right(setting: Setting, tmp_path: Path) -> None:
    async with plugged(make_disk("file", tmp_path / "image", queues=2), setting, workers=2) as p:
        first, second = (VerifiedLoad(q, first_sector=512 * q.index, seed=q.index) for q in p.guest.queues)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.run)
            nursery.start_soon(second.run)
            await first.progress(10)
            await second.progress(10)
            nursery.cancel_scope.cancel()


# --- shapes: the framing is the driver's affair (2.7.4.1) ---


@every_native_setting
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
async def test_a_request_in_pieces_of_one_byte_is_a_request(setting: Setting, indirect: bool, tmp_path: Path) -> None:
    async with plugged(make_disk("file", tmp_path / "image"), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        data = pattern(SECTOR, 1)
        pieces = [bytes([byte]) for byte in header(T_OUT, 3)]
        assert await disk.raw([*pieces, data[:1], data[1:2], data[2:]], [1], indirect=indirect) == Answer(S_OK, b"", 1)
        answer = await disk.raw([bytes([b]) for b in header(T_IN, 3)], [1, 1, 1, SECTOR - 3, 1], indirect=indirect)
        assert answer == Answer(S_OK, data, SECTOR + 1)


@every_native_setting
@every_kind
async def test_header_data_and_status_may_share_descriptors(setting: Setting, kind: str, image: Path) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        block = int.from_bytes(await p.guest.link.read_config(20, 4), "little")
        data = pattern(4 * block, 2)
        at = 2 * block // SECTOR
        assert await disk.raw([header(T_OUT, at) + data[:100], data[100:]], [1]) == Answer(S_OK, b"", 1)
        for room in ([4 * block + 1], [1, 4 * block], [4 * block - 7, 8], [4 * block, 1]):
            assert await disk.raw([header(T_IN, at)], room) == Answer(S_OK, data, 4 * block + 1)


@every_native_setting
@every_kind
async def test_as_many_segments_as_promised_are_served(setting: Setting, kind: str, image: Path) -> None:
    async with plugged(make_disk(kind, image), setting, queue_size=128) as p:
        disk = BlkDriver(p.guest.queues[0])
        seg_max = int.from_bytes(await p.guest.link.read_config(12, 4), "little")
        assert seg_max == 62  # of a device whose queues are configured to have 64 entries
        data = pattern(seg_max * SECTOR * 2, 3)
        pieces = [data[n : n + 2 * SECTOR] for n in range(0, len(data), 2 * SECTOR)]
        assert await disk.raw([header(T_OUT), *pieces], [1]) == Answer(S_OK, b"", 1)
        assert await disk.raw([header(T_IN)], [2 * SECTOR] * seg_max + [1]) == Answer(S_OK, data, len(data) + 1)


@every_reactor
@every_kind
async def test_a_request_without_data_is_nothing_and_succeeds(setting: Setting, kind: str, image: Path) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        for kind_of_request in (T_IN, T_OUT, T_FLUSH):
            assert await disk.request(kind_of_request) == Answer(S_OK, b"", 1)


@pytest.mark.parametrize("setting", [s for s in NATIVE_SETTINGS if s.way == "waist"], ids=str)
@pytest.mark.parametrize("shape", ["no_status_byte", "no_writable_part", "half_a_header"])
async def test_a_request_that_cannot_be_answered_breaks_its_queue_and_no_other(
    setting: Setting, shape: str, tmp_path: Path
) -> None:
    async with plugged(make_disk("file", tmp_path / "image", queues=2), setting) as p:
        bad, good = p.guest.queues
        readable = [header(T_OUT)[:9]] if shape == "half_a_header" else [header(T_OUT), bytes(SECTOR)]
        bad.driver.add(readable, [1] if shape == "half_a_header" else [])
        bad.kick()
        await bad.broken()
        await p.guest.needs_reset()
        stats = p.backend.stats()
        assert [queue.broken for queue in stats.queues] == [True, False]
        assert bad.driver.used() == []
        await BlkDriver(good).write(0, bytes(SECTOR))


# --- back ends ---


@every_native_setting
async def test_a_null_disk_answers_everything_and_moves_nothing(setting: Setting, tmp_path: Path) -> None:
    async with plugged(make_disk("null", tmp_path), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        await disk.write(5, pattern(SECTOR, 1))
        await disk.flush()
        await disk.discard(0, 8)
        await disk.write_zeroes(0, 8)
        assert await disk.read(5, SECTOR) == bytes([UNTOUCHED]) * SECTOR
        assert p.op("read") == (1, 0)


@every_reactor
async def test_an_image_with_a_format_inside_is_served_as_the_bytes_it_has(setting: Setting, tmp_path: Path) -> None:
    """Never a guess at the format: a guest could write a header that names a host's file as backing file."""
    image = tmp_path / "image"
    victim = tmp_path / "secret"
    put(victim, b"secret" * 1000)
    name = str(victim).encode()
    qcow2 = b"QFI\xfb" + (3).to_bytes(4, "big") + (256).to_bytes(8, "big") + len(name).to_bytes(4, "big")
    qcow2 += (16).to_bytes(4, "big") + MIB.to_bytes(8, "big")
    content = (qcow2.ljust(256, b"\0") + name).ljust(64 << 10, b"\0")
    put(image, content)
    for _ in range(2):  # the second time with what the guest wrote over it
        async with plugged(make_disk("file", image), setting) as p:
            disk = BlkDriver(p.guest.queues[0])
            assert int.from_bytes(await p.guest.link.read_config(0, 8), "little") == len(content) // SECTOR
            assert await disk.read(0, len(content)) == content
            content = pattern(SECTOR, 9) + content[SECTOR:]
            await disk.write(0, content[:SECTOR])
            content = qcow2.ljust(SECTOR, b"\1") + content[SECTOR:]
            await disk.write(0, content[:SECTOR])
    assert contents(image) == content


@every_native_setting
@pytest.mark.parametrize("room", [1, 7, 19, 20, 21, 64])
async def test_the_serial_fits_itself_into_the_buffer_it_gets(setting: Setting, room: int, tmp_path: Path) -> None:
    serial = "SERIAL-7"
    async with plugged(make_disk("memory", tmp_path, serial=serial), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        answer = await disk.request(T_GET_ID, room=room)
        written = min(room, 20)
        assert answer.status == S_OK
        assert answer.data == serial.encode().ljust(20, b"\0")[:written].ljust(room, bytes([UNTOUCHED]))
        assert answer.written == written + 1


@every_reactor
async def test_a_serial_of_twenty_characters_has_no_terminator(setting: Setting, tmp_path: Path) -> None:
    async with plugged(make_disk("memory", tmp_path, serial="x" * 20), setting) as p:
        assert await BlkDriver(p.guest.queues[0]).get_id() == b"x" * 20


@every_reactor
@every_file
async def test_a_disk_larger_than_any_buffer_is_read_whole(setting: Setting, kind: str, image: Path) -> None:
    content = pattern(3 * MIB, 4)
    put(image, content)
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        read = [await disk.read(at // SECTOR, MIB) for at in range(0, len(content), MIB)]
        assert b"".join(read) == content


@every_reactor
@pytest.mark.parametrize("request_kind", [T_IN, T_OUT], ids=["read", "write"])
async def test_requests_that_claim_far_more_than_the_guest_has_cost_no_memory(
    setting: Setting, request_kind: int, disk_folder: Path
) -> None:
    """A misaligned MiB a hundred times over, in each of four requests: direct I/O has to copy all of it."""
    async with plugged(make_disk("direct", disk_folder / "image", size=128 * MIB), setting, queue_size=512) as p:
        ring, memory = p.guest.queues[0].driver, p.guest.memory
        start, status = memory.allocate(16), memory.allocate(1)
        memory.write(start, header(request_kind))
        piece = Element(memory.allocate(MIB + 1) + 1, MIB - SECTOR, request_kind == T_IN)
        for _ in range(4):
            ring.add_elements([Element(start, 16, False), *[piece] * 100, Element(status, 1, True)])
        peak = Peak()
        p.guest.queues[0].kick()
        assert isinstance(ring, SplitDriver)
        with trio.fail_after(GUARD):
            while ring.used_idx != 4:  # taking them back would copy all of it, here
                await trio.lowlevel.checkpoint()
        assert peak.kib < 32 * 1024
        assert memory.read(status, 1) == bytes([S_OK])


@every_reactor
async def test_a_misaligned_request_is_copied_whole_by_direct_io(setting: Setting, disk_folder: Path) -> None:
    async with plugged(make_disk("direct", disk_folder / "image", size=4 * MIB), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        data = pattern(MIB + 3 * 4096, 12)
        cuts = [0, 1, 700, 5000, 300_000, 300_001, 900_000, len(data)]
        pieces = [data[a:b] for a, b in itertools.pairwise(cuts)]
        assert await disk.raw([header(T_OUT, 8), *pieces], [1]) == Answer(S_OK, b"", 1)
        sizes = [len(piece) for piece in reversed(pieces)]
        assert await disk.raw([header(T_IN, 8)], [*sizes, 1]) == Answer(S_OK, data, len(data) + 1)
        assert contents(disk_folder / "image")[4096 : 4096 + len(data)] == data
