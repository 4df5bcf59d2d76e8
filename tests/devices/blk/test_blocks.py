"""The block device's blocks: the guest's are configured, the host's may be larger, and no neighbour is ever lost."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import trio
from kit.front_end.frontend import Setting, every_reactor, plugged
from kit.guest.blk import (
    S_IOERR,
    S_OK,
    T_DISCARD,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    BlkDriver,
    contents,
    header,
    make_disk,
    pattern,
    put,
    segment,
)
from pydantic import ValidationError

from virtio.devices.blk.device import BlkOptions
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.native.disk import direct_alignment, file_is_memory
from virtio.testing.driver import Element
from virtio.testing.queue import GUARD

SECTOR: Final = 512
MIB: Final = 1 << 20

HOSTS: Final = {"512": (512, 512), "4Kn": (512, 4096), "16K": (512, 16384), "64K": (4096, 65536)}
"""What direct I/O takes on some hosts, of memory and of the file."""

every_host = pytest.mark.parametrize("host", HOSTS)
larger_blocks = pytest.mark.parametrize("host", ["4Kn", "64K"])


@pytest.fixture(autouse=True)
def on_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct I/O as on that host. What is larger than this host's own alignment suits this one, too."""
    if "host" in request.fixturenames:
        alignment = HOSTS[request.getfixturevalue("host")]
        monkeypatch.setattr("virtio.devices.blk.image.direct_alignment", lambda fd: alignment)


async def send(disk: BlkDriver, kind: int, sector: int, data: bytes | int, *, skew: int = 0) -> tuple[int, bytes]:
    """A request whose data lies ``skew`` bytes beyond a page's beginning: its status, and what was read."""
    memory = disk.queue.driver.memory
    length = data if isinstance(data, int) else len(data)
    at, frame = memory.allocate(length + 4096, 4096), memory.allocate(32)
    memory.write(frame, header(kind, sector))
    if isinstance(data, bytes):
        memory.write(at + skew, data)
    elements = [
        Element(frame, 16, False),
        Element(at + skew, length, isinstance(data, int)),
        Element(frame + 16, 1, True),
    ]
    token = disk.queue.driver.add_elements(elements, owned=[(frame, 32)])
    (status,) = await disk.statuses(token)
    got = memory.read(at + skew, length)
    memory.release(at, length + 4096)
    return status, got


# --- what the guest sees ---


def test_the_guest_sees_the_same_disk_on_every_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = set()
    for direct, alignment in ((False, (512, 512)), *((True, alignment) for alignment in HOSTS.values())):
        monkeypatch.setattr("virtio.devices.blk.image.direct_alignment", lambda fd, alignment=alignment: alignment)
        disk = make_disk("direct" if direct else "file", tmp_path / "image")
        spaces.add((disk.config_space(), disk.features()))
        disk.close()
    assert len(spaces) == 1
    space = spaces.pop()[0]
    assert int.from_bytes(space[20:24], "little") == 512
    assert space[24] == 3  # eight logical blocks in a physical one


@pytest.mark.parametrize(("logical", "physical", "exponent"), [(512, 512, 0), (4096, 4096, 0), (512, 65536, 7)])
def test_block_sizes_are_those_that_were_configured(logical: int, physical: int, exponent: int, tmp_path: Path) -> None:
    disk = make_disk("file", tmp_path / "image", block_size=logical, physical_block_size=physical)
    space = disk.config_space()
    assert (int.from_bytes(space[20:24], "little"), space[24]) == (logical, exponent)
    assert int.from_bytes(space[:8], "little") == MIB // SECTOR
    disk.close()


@every_reactor
async def test_a_disk_of_4096_byte_blocks_takes_whole_ones_only(setting: Setting, tmp_path: Path) -> None:
    for kind in ("memory", "file", "direct"):
        path = tmp_path / kind
        async with plugged(make_disk(kind, path, block_size=4096), setting) as p:
            disk = BlkDriver(p.guest.queues[0])
            for sector, length in ((1, 4096), (0, 512), (8, 4096 + 512)):
                assert (await disk.request(T_IN, sector, room=length)).status == S_IOERR
                assert (await disk.request(T_OUT, sector, bytes(length))).status == S_IOERR
            assert (await disk.request(T_DISCARD, data=segment(1, 8))).status == S_IOERR
            await disk.write(8, pattern(8192, 1))
            assert await disk.read(8, 8192) == pattern(8192, 1)


# --- blocks of the host's that are larger ---


@every_reactor
@every_host
async def test_requests_of_any_place_and_length_are_served_whatever_the_host_takes(
    setting: Setting, host: str, tmp_path: Path
) -> None:
    rng = random.Random(host)
    size = MIB + 3 * SECTOR  # it ends inside a block of the host's
    model = bytearray(pattern(size, 2))
    path = tmp_path / "image"
    put(path, bytes(model))
    async with plugged(make_disk("direct", path), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        for turn in range(150):
            sectors = rng.choice((1, 2, 7, 8, 9, 16, 100, 600))
            sector = rng.choice((rng.randrange(size // SECTOR - sectors + 1), size // SECTOR - sectors, 0))
            at, length, skew = sector * SECTOR, sectors * SECTOR, rng.choice((0, 512, 4, 1))
            if rng.random() < 0.5:
                data = rng.randbytes(length)
                model[at : at + length] = data
                assert (await send(disk, T_OUT, sector, data, skew=skew))[0] == S_OK
            elif rng.random() < 0.2:
                model[at : at + length] = bytes(length)
                await disk.write_zeroes(sector, sectors, unmap=turn % 2 == 0)
            assert await send(disk, T_IN, sector, length, skew=skew) == (S_OK, bytes(model[at : at + length]))
        await disk.flush()
        assert not p.backend.stats().queues[0].broken
    assert contents(path) == bytes(model)


@every_reactor
@larger_blocks
@pytest.mark.parametrize("write_cache", ["writeback", "writethrough"])
async def test_an_image_that_ends_inside_a_block_of_the_host_stays_as_long_as_it_is(
    setting: Setting, host: str, write_cache: str, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    before = pattern(65536 + 5 * SECTOR, 3)
    put(path, before)
    async with plugged(make_disk("direct", path, write_cache=write_cache), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        await disk.write(128 + 4, pattern(SECTOR, 4))
        assert await disk.read(128 + 3, 2 * SECTOR) == before[-2 * SECTOR : -SECTOR] + pattern(SECTOR, 4)
        await disk.write(126, pattern(4 * SECTOR, 5))
        assert (await disk.request(T_OUT, 128 + 5, bytes(SECTOR))).status == S_IOERR
        await disk.flush()
    after = bytearray(before)
    after[-SECTOR:] = pattern(SECTOR, 4)
    after[126 * SECTOR : 130 * SECTOR] = pattern(4 * SECTOR, 5)
    assert contents(path) == bytes(after)


class Neighbours:
    """A writer that has every second sector, and so shares each of the host's blocks with the other one."""

    def __init__(self, disk: BlkDriver, first: int, count: int) -> None:
        self.disk = disk
        self.sectors = range(first, 2 * count, 2)
        self.last: dict[int, bytes] = {}

    async def run(self, rounds: int) -> None:
        rng = random.Random(self.sectors.start)
        for _ in range(rounds):
            tokens = []
            for sector in rng.sample(self.sectors, 8):
                self.last[sector] = rng.randbytes(SECTOR)
                tokens.append(self.disk.submit([header(T_OUT, sector), self.last[sector]], [1]))
            assert set(await self.disk.statuses(*tokens)) == {S_OK}
            await trio.lowlevel.checkpoint()  # a device that is quick never makes its driver wait


@every_reactor
@larger_blocks
async def test_neighbouring_sectors_that_two_workers_write_at_once_are_all_kept(
    setting: Setting, host: str, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    put(path, bytes(128 * SECTOR))
    async with plugged(make_disk("direct", path, queues=2), setting, workers=2) as p:
        writers = [Neighbours(BlkDriver(queue), queue.index, 32) for queue in p.guest.queues]
        async with trio.open_nursery() as nursery:
            for writer in writers:
                nursery.start_soon(writer.run, 60)
        await writers[0].disk.flush()
    after = contents(path)
    for sector, data in (writers[0].last | writers[1].last).items():
        assert after[sector * SECTOR : (sector + 1) * SECTOR] == data, sector
    assert after[64 * SECTOR :] == bytes(64 * SECTOR)


@every_reactor
@larger_blocks
async def test_discards_and_whole_blocks_among_them_lose_nothing_either(
    setting: Setting, host: str, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    put(path, bytes(256 * SECTOR))
    async with plugged(make_disk("direct", path, queues=2), setting, workers=2) as p:
        writer, other = Neighbours(BlkDriver(p.guest.queues[0]), 0, 32), BlkDriver(p.guest.queues[1])

        async def disturb() -> None:
            """Zeroes in the odd sectors of the writer's blocks, and whole blocks right behind them."""
            for turn in range(120):
                odd = 2 * (turn % 32) + 1
                tokens = [
                    other.submit([header(T_WRITE_ZEROES), segment(odd, 1, turn % 2)], [1]),
                    other.submit([header(T_DISCARD), segment(odd, 1)], [1]),
                    other.submit([header(T_OUT, 128), pattern(128 * SECTOR, turn)], [1]),
                ]
                assert set(await other.statuses(*tokens)) == {S_OK}
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run, 60)
            nursery.start_soon(disturb)
        await other.flush()
    after = contents(path)
    for sector, data in writer.last.items():
        assert after[sector * SECTOR : (sector + 1) * SECTOR] == data, sector
    assert all(after[n * SECTOR : (n + 1) * SECTOR] == bytes(SECTOR) for n in range(1, 64, 2))
    assert after[128 * SECTOR :] == pattern(128 * SECTOR, 119)


@every_reactor
@larger_blocks
async def test_writes_to_one_sector_end_in_the_order_in_which_they_came(
    setting: Setting, host: str, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    put(path, bytes(128 * SECTOR))
    async with plugged(make_disk("direct", path), setting, queue_size=64) as p:
        disk = BlkDriver(p.guest.queues[0])
        for turn in range(10):
            tokens = [disk.submit([header(T_OUT, 3), pattern(SECTOR, 100 * turn + n)], [1]) for n in range(20)]
            assert set(await disk.statuses(*tokens)) == {S_OK}
            assert await disk.read(3, SECTOR) == pattern(SECTOR, 100 * turn + 19)


@every_reactor
@larger_blocks
async def test_a_queue_that_stops_with_writes_in_wait_ends_them_all(
    setting: Setting, host: str, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    put(path, bytes(128 * SECTOR))
    async with plugged(make_disk("direct", path, queues=2), setting, workers=2) as p:
        disks = [BlkDriver(queue) for queue in p.guest.queues]
        for _ in range(5):
            tokens = [[disk.submit([header(T_OUT, 3), bytes(SECTOR)], [1]) for _ in range(16)] for disk in disks]
            for queue in p.guest.queues:
                queue.ring()
            with trio.fail_after(GUARD):
                bases = [await p.guest.link.stop(index) for index in range(2)]
                for index, base in enumerate(bases):
                    await p.guest.start_queue(index, base)
            for disk, waiting in zip(disks, tokens, strict=True):
                assert set(await disk.statuses(*waiting)) == {S_OK}


# --- a real disk of 4096-byte blocks ---


@pytest.fixture
def disk_of_4096(tmp_path: Path) -> Iterator[Path]:
    """A loop device whose logical blocks have 4096 bytes."""
    backing = tmp_path / "backing"
    backing.write_bytes(pattern(MIB, 8))
    command = ["losetup", "--find", "--show", "--sector-size", "4096", str(backing)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError as error:
        pytest.skip(f"a disk of 4096-byte blocks cannot be made here: losetup: {error.strerror}")
    if done.returncode != 0:
        pytest.skip(f"a disk of 4096-byte blocks cannot be made here: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    yield device
    subprocess.run(["losetup", "--detach", device], check=True, timeout=20)


@every_reactor
@pytest.mark.parametrize("kind", ["file", "direct"])
async def test_a_disk_of_4096_byte_blocks_serves_a_guest_of_512_byte_ones(
    setting: Setting, kind: str, disk_of_4096: Path
) -> None:
    rng = random.Random(kind)
    model = bytearray(pattern(MIB, 8))
    async with plugged(make_disk(kind, disk_of_4096), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        assert int.from_bytes(await p.guest.link.read_config(20, 4), "little") == 512
        for turn in range(60):
            sector, sectors = rng.randrange(2000), rng.choice((1, 3, 8, 24, 40))
            at, length = sector * SECTOR, sectors * SECTOR
            if turn % 3 == 0:
                await disk.write_zeroes(sector, sectors, unmap=turn % 2 == 0)
                model[at : at + length] = bytes(length)
            elif turn % 3 == 1:
                model[at : at + length] = rng.randbytes(length)
                await disk.write(sector, bytes(model[at : at + length]))
            else:  # what a discard leaves is undefined inside its range, and nothing else
                await disk.discard(sector, sectors)
                model[at : at + length] = await disk.read(sector, length)
            first = max(0, sector - 9)
            assert await disk.read(first, length + 9 * SECTOR) == model[first * SECTOR :][: length + 9 * SECTOR]
        await disk.flush()


def test_a_block_device_is_not_taken_for_a_file_in_memory(disk_of_4096: Path) -> None:
    """Its node may lie on a devtmpfs, whose type is a tmpfs's: it would be served by calls that block."""
    with OwnedFd(os.open(disk_of_4096, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        assert not file_is_memory(fd)


def test_what_direct_io_takes_here_is_asked_or_tried(tmp_path: Path) -> None:
    """This host's own answer works, in memory and in the file."""
    path = tmp_path / "image"
    put(path, pattern(MIB, 1))
    try:
        fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        pytest.skip("the file system of the temporary folder has no direct I/O")
    with fd:
        memory, offset = direct_alignment(fd)
        assert memory & (memory - 1) == offset & (offset - 1) == 0
        with mmap.mmap(-1, 1 << 18) as area, memoryview(area)[memory : memory + offset] as buffer:
            assert os.preadv(fd.fileno(), [buffer], offset) == offset
            assert bytes(buffer) == pattern(MIB, 1)[offset : 2 * offset]


# --- sizes ---


def test_an_image_of_no_whole_blocks_is_refused_with_what_to_set(tmp_path: Path) -> None:
    path = tmp_path / "image"
    put(path, bytes(1_000_300))
    with pytest.raises(HostError) as caught:
        make_disk("file", path)
    for word in ("1000300 bytes", "block_size = 512", "truncate -s %512", 'tail = "extend"', 'tail = "cut"', "364"):
        assert word in str(caught.value)
    assert len(contents(path)) == 1_000_300
    put(path, bytes(7 * SECTOR))
    with pytest.raises(HostError, match="or set block_size = 512"):
        make_disk("file", path, block_size=4096)


def test_a_tail_is_cut_or_extended_as_configured(tmp_path: Path) -> None:
    path = tmp_path / "image"
    put(path, pattern(1_000_300, 1))
    disk = make_disk("file", path, tail="cut", read_only=True)
    assert int.from_bytes(disk.config_space()[:8], "little") == 1953
    disk.close()
    assert contents(path) == pattern(1_000_300, 1)
    disk = make_disk("file", path, tail="extend")
    assert int.from_bytes(disk.config_space()[:8], "little") == 1954
    disk.close()
    assert contents(path) == pattern(1_000_300, 1) + bytes(1954 * SECTOR - 1_000_300)
    put(path, bytes(100))
    with pytest.raises(HostError, match="nothing would be left"):
        make_disk("file", path, tail="cut")


def test_a_disk_that_grows_to_no_whole_blocks_keeps_its_size_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "image"
    disk = make_disk("file", path)
    put(path, bytes(MIB + 100))
    with pytest.raises(HostError, match="no multiple of block_size"):
        disk.refresh()
    assert int.from_bytes(disk.config_space()[:8], "little") == MIB // SECTOR
    disk.close()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"backend": "memory", "size": 1024, "block_size": 4096}, "not a multiple of 4096"),
        ({"path": "x", "block_size": 4096, "physical_block_size": 512}, "less than block_size"),
        ({"path": "x", "tail": "extend", "read_only": True}, "read_only forbids it"),
        ({"path": "x", "block_size": 1024}, "512 or 4096"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        BlkOptions(**options)
