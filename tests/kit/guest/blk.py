"""The driver's side of a block device (section 5.2.6), disks to try it on, and a load that checks every byte."""

from __future__ import annotations

import itertools
import os
import random
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import trio

from virtio.devices.blk.device import Blk, BlkOptions
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.native.disk import file_is_memory
from virtio.testing.driver import Element
from virtio.testing.queue import GUARD, GuestQueue

T_IN: Final = 0
T_OUT: Final = 1
T_FLUSH: Final = 4
T_GET_ID: Final = 8
T_DISCARD: Final = 11
T_WRITE_ZEROES: Final = 13
S_OK: Final = 0
S_IOERR: Final = 1
S_UNSUPP: Final = 2
UNMAP: Final = 1

F_RO: Final = 1 << 5
F_FLUSH: Final = 1 << 9
F_CONFIG_WCE: Final = 1 << 11
F_DISCARD: Final = 1 << 13
F_WRITE_ZEROES: Final = 1 << 14
CONFIG_WRITEBACK: Final = 32

UNTOUCHED: Final = 0xEE
"""What lies in a device-writable buffer before the device writes to it."""

SHARED_MEMORY: Final = Path("/dev/shm")  # tmpfs on every Linux that has one at all
PERSISTENT: Final = Path("/var/tmp")  # survives a reboot (FHS 3.0, 5.15), so it lies on a disk


@dataclass(frozen=True)
class Answer:
    """A request that came back: its status byte, the other writable bytes, and the used length."""

    status: int
    data: bytes
    written: int


def header(kind: int, sector: int = 0) -> bytes:
    """struct virtio_blk_req up to its data."""
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    """struct virtio_blk_discard_write_zeroes."""
    return struct.pack("<QII", sector, sectors, flags)


def pattern(length: int, seed: int) -> bytes:
    """``length`` bytes that tell where they belong."""
    return random.Random(seed).randbytes(length)


class BlkDriver:
    """Requests on one queue."""

    def __init__(self, queue: GuestQueue) -> None:
        self.queue = queue
        self._early: dict[int, Answer] = {}

    def submit(self, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False) -> int:
        """Make a request of these pieces available, its writable bytes UNTOUCHED; its token."""
        memory = self.queue.driver.memory
        elements, owned = [], []
        for piece, is_writable in [
            *((data, False) for data in readable),
            *((bytes([UNTOUCHED]) * size, True) for size in writable),
        ]:
            gpa = memory.allocate(max(len(piece), 1))
            memory.write(gpa, piece)
            owned.append((gpa, max(len(piece), 1)))
            elements.append(Element(gpa, len(piece), is_writable))
        return self.queue.driver.add_elements(elements, indirect=indirect, owned=owned)

    async def answer(self, token: int) -> Answer:
        """Wait for this request, whatever comes back before it."""
        while token not in self._early:
            for used in await self.queue.used():
                whole = b"".join(used.buffers)
                self._early[used.token] = Answer(whole[-1], whole[:-1], used.written)
        return self._early.pop(token)

    async def raw(self, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False) -> Answer:
        """A request of these very pieces, there and back."""
        token = self.submit(readable, writable, indirect=indirect)
        self.queue.kick()
        return await self.answer(token)

    async def request(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> Answer:
        """A request laid out as Linux does: header, data, status."""
        return await self.raw([header(kind, sector), *([data] if data else [])], [*([room] if room else []), 1])

    async def read(self, sector: int, length: int) -> bytes:
        answer = await self.request(T_IN, sector, room=length)
        assert (answer.status, answer.written) == (S_OK, length + 1)
        return answer.data

    async def write(self, sector: int, data: bytes) -> None:
        assert await self.request(T_OUT, sector, data) == Answer(S_OK, b"", 1)

    async def flush(self) -> None:
        assert await self.request(T_FLUSH) == Answer(S_OK, b"", 1)

    async def get_id(self) -> bytes:
        answer = await self.request(T_GET_ID, room=20)
        assert (answer.status, answer.written) == (S_OK, 21)
        return answer.data

    async def discard(self, sector: int, sectors: int) -> None:
        assert await self.request(T_DISCARD, data=segment(sector, sectors)) == Answer(S_OK, b"", 1)

    async def write_zeroes(self, sector: int, sectors: int, *, unmap: bool = False) -> None:
        data = segment(sector, sectors, UNMAP if unmap else 0)
        assert await self.request(T_WRITE_ZEROES, data=data) == Answer(S_OK, b"", 1)

    async def statuses(self, *tokens: int) -> list[int]:
        """Kick, and wait for all of these."""
        self.queue.kick()
        return [(await self.answer(token)).status for token in tokens]


class VerifiedLoad:
    """Writes and reads ``blocks`` 4 KiB blocks of the disk from ``first_sector`` on, and checks every byte.

    ``run`` ends only by being cancelled, or with the assertion that failed.
    """

    BLOCK: Final = 4096
    DEPTH: Final = 6

    def __init__(self, queue: GuestQueue, *, first_sector: int = 0, blocks: int = 64, seed: int = 1) -> None:
        self.rounds = 0
        self._driver = BlkDriver(queue)
        self._first = first_sector
        self._blocks = blocks
        self._random = random.Random(seed)
        self._model: dict[int, bytes] = {}
        self._round_done = trio.Event()

    async def run(self) -> None:
        for self.rounds in itertools.count(1):
            await self._round()
            self._round_done.set()
            self._round_done = trio.Event()
            await trio.lowlevel.checkpoint()  # a device that polls is so quick that we never wait for it

    async def progress(self, rounds: int = 3) -> None:
        """Wait until so many rounds more were begun and ended well."""
        wanted = self.rounds + rounds
        with trio.fail_after(GUARD):
            while self.rounds <= wanted:
                await self._round_done.wait()

    def _sector(self, block: int) -> int:
        return self._first + block * (self.BLOCK // 512)

    async def _round(self) -> None:
        driver = self._driver
        chosen = self._random.sample(range(self._blocks), self.DEPTH)
        for block in chosen:
            self._model[block] = self._random.randbytes(self.BLOCK)
        writes = [driver.submit([header(T_OUT, self._sector(b)), self._model[b]], [1]) for b in chosen]
        assert await driver.statuses(*writes) == [S_OK] * len(writes)
        if self.rounds % 8 == 0:
            await driver.flush()
        wanted = self._random.sample(sorted(self._model), self.DEPTH)
        reads = {b: driver.submit([header(T_IN, self._sector(b))], [self.BLOCK, 1]) for b in wanted}
        driver.queue.kick()
        for block, token in reads.items():
            assert await driver.answer(token) == Answer(S_OK, self._model[block], self.BLOCK + 1), f"block {block}"


# --- disks ---


def contents(path: Path) -> bytes:
    return path.read_bytes()


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def blocks_of(path: Path) -> int:
    """The 512-byte blocks the file takes on its file system."""
    return path.stat().st_blocks


KINDS: Final = ("memory", "tmpfs", "file", "direct")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_file = pytest.mark.parametrize("kind", KINDS[1:])


def _is_memory(folder: Path) -> bool:
    with OwnedFd(os.open(folder, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        return file_is_memory(fd)


@contextmanager
def folder_on_disk(temporary: Path) -> Iterator[Path]:
    """``temporary``, or where that is on a tmpfs, as /tmp of Debian 13 is, a folder of ``PERSISTENT``.

    Skips where that is on one too: files on a tmpfs are served as memory, and the kernel gives no block size for direct
    I/O there.
    """
    if not _is_memory(temporary):
        yield temporary
        return
    if _is_memory(PERSISTENT):
        pytest.skip(f"{temporary} and {PERSISTENT} are both on a tmpfs: this machine has no disk for temporary files")
    with tempfile.TemporaryDirectory(prefix="hyperbell-", dir=PERSISTENT) as folder:
        yield Path(folder)


@pytest.fixture
def disk_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose files are on a disk."""
    with folder_on_disk(tmp_path) as folder:
        yield folder


@pytest.fixture
def image(kind: str, tmp_path: Path) -> Iterator[Path]:
    """Where the image of a disk of this ``kind`` is to lie: on tmpfs, on a disk, or wherever temporary files are."""
    if kind in ("file", "direct"):
        with folder_on_disk(tmp_path) as folder:
            yield folder / "disk.img"
        return
    if kind != "tmpfs":
        yield tmp_path / "disk.img"
        return
    with tempfile.TemporaryDirectory(prefix="hyperbell-", dir=SHARED_MEMORY) as name:
        if not _is_memory(Path(name)):
            pytest.skip(f"{SHARED_MEMORY} is no tmpfs on this machine")
        yield Path(name, "disk.img")


def make_disk(kind: str, path: Path, *, size: int = 1 << 20, queues: int = 1, **options: object) -> Blk:
    """A disk of this kind and size; ``path`` is made unless it is there. Skips where the host has no direct I/O."""
    if kind in ("memory", "null"):
        return Blk("disk", BlkOptions(backend=kind, size=size, **options), queues, 64)
    if not path.exists():
        with path.open("wb") as file:
            file.truncate(size)
    try:
        return Blk("disk", BlkOptions(path=path, direct=kind == "direct", **options), queues, 64)
    except HostError as error:
        if kind == "direct" and "has no direct I/O" in str(error):
            pytest.skip("the file system of the temporary folder has no direct I/O")
        raise
