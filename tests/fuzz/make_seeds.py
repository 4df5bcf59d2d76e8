"""Writes the hand-made seeds of the fuzz targets: honest rings and requests, for a fuzzer to spoil.

usage: python tests/fuzz/make_seeds.py. The formats are described at the top of fuzz_ring.c and fuzz_blk.c.
"""

from __future__ import annotations

import itertools
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from virtio.testing.driver import Desc, Element, GuestMemory, PackedDriver, SplitDriver  # noqa: E402
from virtio.testing.virtqueue_driver import VIRTQ_DESC_F_NEXT  # noqa: E402

SEEDS = HERE / "seeds"
PACKED, EVENT_IDX, INDIRECT, IOMMU, RAW_ADDRESSES = 1, 2, 4, 8, 16
POP, PUBLISH, NOTIFY, ARM, DISARM, POKE, SET_MEMORY, RESUME, MAP, CYCLE = 0, 2, 3, 4, 5, 6, 8, 9, 10, 14
ALL_RIGHTS = 3 << 4


def ring_image(flags: int, queue_size: int) -> tuple[bytes, int]:
    """A ring with four buffers of one to three pieces, the last beyond the end of the first region; its base."""
    memory = GuestMemory(640, gpa=0)
    driver: PackedDriver | SplitDriver
    driver = (PackedDriver if flags & PACKED else SplitDriver)(memory, queue_size, event_idx=bool(flags & EVENT_IDX))
    shapes = [[False], [True], [False, True], [False, False, True]]
    for at, shape in enumerate(shapes):
        elements = [Element(460 + 16 * at, 20 + 8 * i, writable) for i, writable in enumerate(shape)]
        indirect = bool(flags & INDIRECT) and at % 2 == 1
        if (1 if indirect else len(elements)) <= driver.free_slots:
            driver.add_elements(elements, indirect=indirect)
    image = memory.read(0, 640)
    base = 0x80008000 if flags & PACKED else 0
    memory.close()
    return image, base


def ring_seeds() -> None:
    for packed, event, indirect, iommu in itertools.product((0, PACKED), (0, EVENT_IDX), (0, INDIRECT), (0, IOMMU)):
        flags = packed | event | indirect | iommu
        for size in (4, 8) if not packed else (5, 8):
            image, base = ring_image(flags, size)
            code = size if size % 4 else (size.bit_length() - 1) << 2
            steps = [POP, POP, ARM, POP, CYCLE, POKE, 0, 1, 7, CYCLE, DISARM, PUBLISH, NOTIFY, SET_MEMORY, POP, CYCLE]
            if iommu:
                learn = [step for page in range(5) for step in (MAP | ALL_RIGHTS, page * 128, page * 128 >> 8, 128)]
                steps = [POP, *[s & 0xFF for s in learn], RESUME, *steps]
            data = struct.pack("<BBIH", flags, code, base, len(image)) + image + bytes(steps)
            (SEEDS / "fuzz_ring" / f"honest-{flags:02x}-{size}").write_bytes(data)


def scattered_seeds() -> None:
    """Rings that lie across the end of the first region, at 512."""
    for packed, event, iommu in itertools.product((0, PACKED), (0, EVENT_IDX), (0, IOMMU)):
        flags = packed | event | iommu | RAW_ADDRESSES
        size = 8 if packed else 4
        memory = GuestMemory(640, gpa=0)
        memory.allocate(448 if packed else 480)  # its descriptors cross
        driver: PackedDriver | SplitDriver
        driver = (PackedDriver if packed else SplitDriver)(memory, size, event_idx=bool(event))
        for at in range(4):
            driver.add_elements([Element(16 * at, 20, bool(at % 2))])
        image = memory.read(0, 640)
        areas = struct.pack("<HHH", driver.desc, driver.avail, driver.used_area)
        memory.close()
        steps = [POP, POP, ARM, POP, CYCLE, POKE, 0, 1, 7, CYCLE, DISARM, PUBLISH, NOTIFY, SET_MEMORY, POP, CYCLE]
        if iommu:
            learn = [step for page in range(10) for step in (MAP | ALL_RIGHTS, page * 64 & 0xFF, page * 64 >> 8, 64)]
            steps = [POP, *learn, RESUME, *steps]
        data = struct.pack("<BBI", flags, (size.bit_length() - 1) << 2, 0x80008000 if packed else 0) + areas
        data += struct.pack("<H", len(image)) + image + bytes(steps)
        (SEEDS / "fuzz_ring" / f"scattered-{flags:02x}").write_bytes(data)


def loop_seeds() -> None:
    """Chains without an end, which a fuzzer finds hard to make: all of a ring must fit together."""
    for flags, size in itertools.product((0, PACKED), (1, 4, 8)):
        memory = GuestMemory(640, gpa=0)
        if flags & PACKED:
            packed = PackedDriver(memory, size)
            packed.put_descs([Desc(400, 8, VIRTQ_DESC_F_NEXT, 1)] * size)
        else:
            split = SplitDriver(memory, size)
            for i in range(size):
                split.write_desc(i, Desc(400, 8, VIRTQ_DESC_F_NEXT, (i + 1) % size))
            split.put_avail(0)
        image = memory.read(0, 640)
        memory.close()
        code = (size.bit_length() - 1) << 2
        header = struct.pack("<BBIH", flags, code, 0x80008000 if flags & PACKED else 0, len(image))
        (SEEDS / "fuzz_ring" / f"loop-{flags:02x}-{size}").write_bytes(header + image + bytes([POP, CYCLE, POP]))


def request(kind: int, sector: int, data: bytes = b"", room: int = 0, *, cuts: int = 1) -> bytes:
    """One request of fuzz_blk.c: the lengths of the pieces, then the readable bytes."""

    def lengths(total: int) -> list[int]:
        """Codes of pieces: an even one stands for (code + 2) * 128 bytes, an odd one for (code >> 1) + 1."""
        blocks, rest = divmod(total, 256)
        return [2 * blocks - 2] * (blocks > 0) + [(n - 1) << 1 | 1 for n in (rest - rest // 2, rest // 2) if n]

    readable = struct.pack("<IIQ", kind, 0, sector) + data
    out = [(16 // cuts - 1) << 1 | 1] * cuts + lengths(len(data))
    back = [*lengths(room), 1]
    return bytes([len(out), *out, len(back), *back]) + readable


def blk_seeds() -> None:
    def segment(sector: int, count: int, flags: int) -> bytes:
        return struct.pack("<QII", sector, count, flags)

    requests = {
        "write-read": request(1, 3, bytes(range(256)) * 4) + request(0, 3, room=1024) + request(4, 0),
        "header-in-pieces": request(0, 0, room=512, cuts=4),
        "get-id": request(8, 0, room=20) + request(8, 0, room=7),
        "discard": request(1, 0, b"\xaa" * 512) + request(11, 0, segment(0, 1, 0)) + request(0, 0, room=512),
        "write-zeroes": request(13, 0, segment(4, 4, 1) + segment(1, 2, 0)),
        "too-far": request(0, 31, room=1024) + request(1, (1 << 63) - 1, b"x" * 512),
        "unaligned": request(1, 1, b"y" * 100) + request(0, 1, room=513),
        "unknown": request(77, 0) + request(2, 0, b"z" * 64, room=64),
    }
    for (name, data), flags in itertools.product(requests.items(), (6, 7, 14, 22)):
        (SEEDS / "fuzz_blk" / f"{name}-{flags}").write_bytes(bytes([flags]) + data)


if __name__ == "__main__":
    for target in ("fuzz_ring", "fuzz_blk"):
        (SEEDS / target).mkdir(parents=True, exist_ok=True)
    ring_seeds()
    scattered_seeds()
    loop_seeds()
    blk_seeds()
