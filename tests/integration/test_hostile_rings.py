"""HOSTILE's checklist, items 1 to 6: what a guest puts into its rings breaks one queue of its own, and nothing else."""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Callable

import pytest
from blk_driver import S_OK, T_GET_ID, T_IN, BlkDriver, header
from frontend import F_EVENT_IDX, F_INDIRECT_DESC, Guest, every_ring
from scene import Scene

from virtio.testing.driver import Desc, Element, GuestMemory, PackedDriver, SplitDriver, VirtqueueDriver
from virtio.testing.queue import GuestQueue

NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
SIZE = 64
ADDRESS = "a buffer lies outside guest memory"
LOOP = "a chain is too long, or loops"
BAD_NEXT = "a descriptor's next is outside its table"
TABLE_SIZE = "an indirect table of impossible size"
SHAPE = "a request without the parts its device needs"

Attack = Callable[[VirtqueueDriver], None]


def put(driver: VirtqueueDriver, *pieces: tuple[int, int, int]) -> None:
    """Make a chain of these (address, length, flags) available as they are; NEXT is added to all but the last."""
    last = len(pieces) - 1
    descs = [Desc(gpa, length, flags | (NEXT if n < last else 0), 0) for n, (gpa, length, flags) in enumerate(pieces)]
    if isinstance(driver, PackedDriver):
        driver.put_descs(descs)
        return
    assert isinstance(driver, SplitDriver)
    for n, desc in enumerate(descs):
        driver.write_desc(n, desc._replace(link=n + 1))
    driver.put_avail(0)


def head_of(driver: VirtqueueDriver) -> tuple[int, int, int]:
    """A good header of a request for the serial number."""
    gpa = driver.memory.allocate(16)
    driver.memory.write(gpa, header(T_GET_ID))
    return gpa, 16, 0


def end_of(memory: GuestMemory) -> int:
    return memory.gpa + memory.size


def table(driver: VirtqueueDriver, *descs: Desc, length: int | None = None, flags: int = 0) -> None:
    gpa = driver.write_table(descs)
    put(driver, (gpa, 16 * len(descs) if length is None else length, INDIRECT | flags))


def piece(driver: VirtqueueDriver, length: int = 32, flags: int = WRITE, link: int = 0) -> Desc:
    return Desc(driver.memory.allocate(max(length, 1)), length, flags, link)


# --- in both formats: buffers (item 4) and indirect tables (item 3) ---


def buffer(gpa_of: Callable[[GuestMemory], int], length: int) -> Attack:
    return lambda d: put(d, head_of(d), (gpa_of(d.memory), length, WRITE))


def readable_after_writable(d: VirtqueueDriver) -> None:
    put(d, head_of(d), (d.memory.allocate(32), 32, WRITE), (d.memory.allocate(32), 32, 0))


def total_of_4_gib(d: VirtqueueDriver) -> None:
    table(d, *(Desc(d.memory.gpa, d.memory.size, WRITE | (NEXT if n < 1023 else 0), n + 1) for n in range(1024)))


def table_at(gpa_of: Callable[[GuestMemory], int], length: int) -> Attack:
    return lambda d: put(d, (gpa_of(d.memory), length, INDIRECT))


BOTH: dict[str, tuple[Attack, str]] = {
    "buffer_at_0": (buffer(lambda m: 0, 32), ADDRESS),
    "buffer_below_memory": (buffer(lambda m: m.gpa - 1, 32), ADDRESS),
    "buffer_at_the_end_of_memory": (buffer(end_of, 32), ADDRESS),
    "buffer_across_the_end_of_memory": (buffer(lambda m: end_of(m) - 31, 32), ADDRESS),
    "buffer_of_2_gib": (buffer(lambda m: m.gpa, 1 << 31), ADDRESS),
    "buffer_that_wraps": (buffer(lambda m: 2**64 - 16, 32), ADDRESS),
    "buffer_at_the_last_byte_of_all": (buffer(lambda m: 2**64 - 1, 1), ADDRESS),
    "buffer_at_the_user_address": (buffer(lambda m: m.uva, 32), ADDRESS),
    "buffer_of_length_0": (buffer(lambda m: m.gpa, 0), "a descriptor of length 0"),
    "header_outside": (lambda d: put(d, (16, 16, 0), (d.memory.gpa, 32, WRITE)), ADDRESS),
    "readable_after_writable": (readable_after_writable, "a device-readable descriptor after a device-writable one"),
    "no_status_byte": (lambda d: put(d, head_of(d)), SHAPE),
    "half_a_header": (lambda d: put(d, (d.memory.gpa, 8, 0), (d.memory.gpa, 1, WRITE)), SHAPE),
    "nothing_but_a_status_byte": (lambda d: put(d, (d.memory.gpa, 1, WRITE)), SHAPE),
    "total_of_4_gib": (total_of_4_gib, "a chain of more than 4 GiB"),
    "table_of_length_0": (lambda d: table(d, piece(d), length=0), TABLE_SIZE),
    "table_a_byte_short": (lambda d: table(d, piece(d), length=15), TABLE_SIZE),
    "table_a_byte_long": (lambda d: table(d, piece(d), length=17), TABLE_SIZE),
    "table_of_1025_entries": (lambda d: table(d, *[piece(d, 1)] * 1025), TABLE_SIZE),
    "table_of_4_gib": (table_at(lambda m: m.gpa, 0xFFFF_FFF0), TABLE_SIZE),
    "table_that_wraps": (table_at(lambda m: 2**64 - 16, 32), TABLE_SIZE),
    "table_outside": (table_at(lambda m: 0x1000, 32), ADDRESS),
    "table_across_the_end_of_memory": (table_at(lambda m: end_of(m) - 8, 32), ADDRESS),
    "table_in_a_table": (lambda d: table(d, piece(d, 16, INDIRECT)), "an indirect descriptor inside an indirect table"),
    "table_with_next": (
        lambda d: put(d, (d.write_table([piece(d)]), 16, INDIRECT | NEXT), (d.memory.gpa, 1, WRITE)),
        "an indirect descriptor that is chained",
    ),
    "table_whose_entry_lies_outside": (lambda d: table(d, Desc(0, 16, 0, 0)), ADDRESS),
    "table_whose_entry_is_empty": (lambda d: table(d, piece(d, 0, 0)), "a descriptor of length 0"),
}


# --- split only (items 1 and 2) ---


def linked(*links: int) -> Attack:
    """A chain of good pieces whose ``next`` fields are these."""

    def attack(d: VirtqueueDriver) -> None:
        assert isinstance(d, SplitDriver)
        for n, link in enumerate(links):
            d.write_desc(n, Desc(d.memory.gpa, 16, NEXT, link))
        d.put_avail(0)

    return attack


def avail_index(change: int) -> Attack:
    def attack(d: VirtqueueDriver) -> None:
        assert isinstance(d, SplitDriver)
        d.set_avail_idx(d.avail_idx + change)

    return attack


def head(number: int) -> Attack:
    def attack(d: VirtqueueDriver) -> None:
        assert isinstance(d, SplitDriver)
        d.put_avail(number)

    return attack


SPLIT: dict[str, tuple[Attack, str]] = {
    "next_is_the_queue_size": (linked(SIZE), BAD_NEXT),
    "next_is_65535": (linked(65535), BAD_NEXT),
    "next_is_32768": (linked(1, 2, 32768), BAD_NEXT),
    "loop_to_itself": (linked(0), LOOP),
    "loop_of_two": (linked(1, 0), LOOP),
    "loop_through_the_whole_table": (linked(*range(1, SIZE), 0), LOOP),
    "loop_back_to_the_middle": (linked(*range(1, SIZE), SIZE // 2), LOOP),
    "head_is_the_queue_size": (head(SIZE), "a chain's head is not a descriptor of the queue"),
    "head_is_65535": (head(65535), "a chain's head is not a descriptor of the queue"),
    "avail_index_jumps": (avail_index(SIZE + 1), "the avail index jumped by more than the queue size"),
    "avail_index_jumps_far": (avail_index(0x8000), "the avail index jumped by more than the queue size"),
    "avail_index_goes_back": (avail_index(-1), "the avail index jumped by more than the queue size"),
    "loop_in_a_table": (lambda d: table(d, piece(d, 16, NEXT, 1), piece(d, 16, NEXT, 0)), LOOP),
    "next_outside_its_table": (lambda d: table(d, piece(d, 16, NEXT, 2), piece(d)), BAD_NEXT),
    "next_far_outside_its_table": (lambda d: table(d, piece(d, 16, NEXT, 65535), piece(d)), BAD_NEXT),
}


# --- packed only (item 5) ---


def endless(d: VirtqueueDriver) -> None:
    """Every descriptor of the ring has NEXT: the chain goes round and round."""
    assert isinstance(d, PackedDriver)
    d.put_descs([Desc(d.memory.gpa, 16, NEXT, 0)] * d.size)


def table_inside_a_chain(d: VirtqueueDriver) -> None:
    put(d, head_of(d), (d.write_table([piece(d)]), 16, INDIRECT))


PACKED: dict[str, tuple[Attack, str]] = {
    "every_descriptor_has_next": (endless, LOOP),
    "table_inside_a_chain": (table_inside_a_chain, "an indirect descriptor that is chained"),
}

ATTACKS = [(ring, name, *BOTH[name]) for ring in ("split", "packed") for name in BOTH]
ATTACKS += [("split", name, *attack) for name, attack in SPLIT.items()]
ATTACKS += [("packed", name, *attack) for name, attack in PACKED.items()]


async def check_that_one_queue_broke(scene: Scene, guest: Guest, mark: int, reason: str, index: int = 0) -> None:
    """The err eventfd, the status, one line of the log and one counter say it, and the guest's other queue goes on."""
    await guest.queues[index].broken()
    await guest.needs_reset()
    entry = await scene.log.expect(mark, "queue broken by the driver")
    assert (entry["device"], entry["queue"], entry["level"]) == ("victim", index, "warning")
    assert re.match(rf"queue {index} is broken: {re.escape(reason)} \(head ", entry["error"])
    assert scene.counters().broken == (index == 0, index == 1)
    await BlkDriver(guest.queues[1 - index]).write(0, bytes(512))
    guest.queues[index].ring()  # nothing more to be had from it
    await BlkDriver(guest.queues[1 - index]).flush()
    assert len(scene.log.since(mark, "queue broken")) == 1


async def check_that_it_starts_anew(guest: Guest) -> None:
    """After a reset the device is as good as new."""
    await guest.link.reset()
    guest.forget_queues()
    await guest.start()
    assert await guest.link.status() == 0
    await BlkDriver(guest.queues[0]).write(0, bytes(512))


@pytest.mark.parametrize(
    ("ring", "attack", "reason"),
    [(ring, attack, reason) for ring, _, attack, reason in ATTACKS],
    ids=[f"{ring}-{name}" for ring, name, *_ in ATTACKS],
)
async def test_a_malformed_request_breaks_its_queue(scene: Scene, ring: str, attack: Attack, reason: str) -> None:
    guest = await scene.started(ring, queue_size=SIZE)
    mark = scene.log.mark
    try:
        attack(guest.queues[0].driver)
        guest.queues[0].ring()
        await check_that_one_queue_broke(scene, guest, mark, reason)
        await check_that_it_starts_anew(guest)
    finally:
        guest.close()
    await scene.aftermath()


@every_ring
async def test_an_indirect_table_without_the_feature_breaks_its_queue(scene: Scene, ring: str) -> None:
    guest = await scene.started(ring, without=F_INDIRECT_DESC)
    mark = scene.log.mark
    try:
        table(guest.queues[0].driver, piece(guest.queues[0].driver, 64))
        guest.queues[0].ring()
        await check_that_one_queue_broke(scene, guest, mark, "an indirect descriptor without VIRTIO_F_INDIRECT_DESC")
    finally:
        guest.close()
    await scene.aftermath()


@pytest.mark.parametrize("flags", [AVAIL | USED, USED, 0, AVAIL | USED | NEXT], ids=hex)
async def test_a_descriptor_whose_turn_it_is_not_is_not_looked_at(scene: Scene, flags: int) -> None:
    """2.8.1: AVAIL and USED say whose it is; a wrong wrap counter makes it nobody's."""
    guest = await scene.started("packed")
    try:
        driver = guest.queues[0].driver
        assert isinstance(driver, PackedDriver)
        driver.write_desc(0, Desc(1, 1, flags, 0xFFFF))
        for _ in range(3):
            guest.queues[0].ring()
            await BlkDriver(guest.queues[1]).flush()
        assert driver.read_desc(0) == Desc(1, 1, flags, 0xFFFF)
        assert not any(scene.counters().broken)
        await BlkDriver(guest.queues[0]).flush()  # the driver's own, over it
    finally:
        guest.close()
    await scene.aftermath()


# --- rings that are not where they should be (item 6) ---


@every_ring
@pytest.mark.parametrize("area", [0, 1, 2], ids=["descriptors", "avail", "used"])
@pytest.mark.parametrize("where", ["outside", "across the end", "last bytes of all", "guest physical"])
async def test_a_ring_outside_of_memory_breaks_its_queue(scene: Scene, ring: str, area: int, where: str) -> None:
    guest = await scene.connect(ring)
    mark = scene.log.mark
    try:
        await guest.negotiate()
        await guest.link.share(guest.memory)
        for index in range(2):
            guest.add_queue(SIZE)
            areas = list(guest.queues[index].areas)
            if index == 0:
                memory, length = guest.memory, guest.queues[0].driver.area_sizes[area]
                areas[area] = {
                    "outside": 0x1000,
                    "across the end": memory.uva + memory.size - (length - 1 & -16),
                    "last bytes of all": 2**64 - 16,
                    "guest physical": memory.gpa,
                }[where]
            await start_at(guest, guest.queues[index], (areas[0], areas[1], areas[2]))
        guest.queues[0].ring()
        await check_that_one_queue_broke(scene, guest, mark, "the ring lies outside guest memory")
        await check_that_it_starts_anew(guest)
    finally:
        guest.close()
    await scene.aftermath()


async def start_at(guest: Guest, queue: GuestQueue, areas: tuple[int, int, int]) -> None:
    base = 0x8000_8000 if guest.ring == "packed" else 0
    await guest.link.set_up(queue.index, queue.driver.size, areas, base)
    await guest.link.set_err(queue.index, queue.err_fd)
    await guest.link.set_call(queue.index, queue.call_fd)
    await guest.link.set_kick(queue.index, queue.kick_fd)
    await guest.link.enable(queue.index, True)


@every_ring
async def test_ring_areas_that_overlap_harm_nobody_else(scene: Scene, ring: str) -> None:
    guest = await scene.connect(ring)
    try:
        await guest.negotiate()
        await guest.link.share(guest.memory)
        for _ in range(2):
            guest.add_queue(SIZE)
        victim, other = guest.queues
        base = victim.areas[0]
        await start_at(guest, victim, (base, base, base))
        await start_at(guest, other, other.areas)
        randomness = random.Random(5)
        for _ in range(20):
            guest.memory.write(victim.driver.desc, randomness.randbytes(16 * SIZE))
            victim.ring()
            await BlkDriver(other).write(0, bytes(512))
        assert scene.counters().broken[1] is False
    finally:
        guest.close()
    await scene.aftermath()


@every_ring
async def test_two_queues_in_the_same_ring_harm_nobody_else(scene: Scene, ring: str) -> None:
    guest = await scene.connect(ring)
    try:
        await guest.negotiate()
        await guest.link.share(guest.memory)
        for _ in range(2):
            guest.add_queue(SIZE)
            await start_at(guest, guest.queues[-1], guest.queues[0].areas)
        for _ in range(20):
            guest.queues[0].driver.add([header(T_GET_ID)], [20, 1])
            for queue in guest.queues:
                queue.ring()
            await scene.unharmed()
    finally:
        guest.close()
    await scene.aftermath()


# --- memory that goes away ---


@every_ring
async def test_memory_that_is_cut_off_under_the_rings_breaks_them(scene: Scene, ring: str) -> None:
    guest = await scene.started(ring)
    mark = scene.log.mark
    try:
        os.ftruncate(guest.memory.fd, 0)
        for index, queue in enumerate(guest.queues):
            queue.ring()
            await queue.broken()
            entry = await scene.log.expect(mark, "queue broken by the driver")
            assert entry["error"].startswith(f"queue {index} is broken: the file behind guest memory was truncated")
            mark = scene.log.mark
        assert scene.counters().broken == (True, True)
        await scene.unharmed()
    finally:
        guest.close()
    await scene.aftermath()


@every_ring
async def test_memory_that_is_cut_off_under_a_buffer_breaks_its_queue(scene: Scene, ring: str) -> None:
    guest = await scene.started(ring)
    other = GuestMemory(1 << 20, gpa=0x9000_0000, uva=0x6F00_0000_0000, name="other")
    try:
        mark = scene.log.mark
        await guest.link.share(guest.memory, other)
        lost = Element(other.allocate(4096, 4096), 4096, True)
        os.ftruncate(other.fd, 0)
        driver = guest.queues[0].driver
        head, status = driver.memory.allocate(16), driver.memory.allocate(1)
        driver.memory.write(head, header(T_IN))
        driver.add_elements([Element(head, 16, False), lost, Element(status, 1, True)])
        driver.add([header(T_GET_ID)], [20, 1])  # the first is answered, for all we care; at the next it is noticed
        guest.queues[0].ring()
        await guest.queues[0].broken()
        entry = await scene.log.expect(mark, "queue broken by the driver")
        assert "the file behind guest memory was truncated" in entry["error"]
        await scene.unharmed()
    finally:
        guest.close()
        other.close()
    await scene.aftermath()


# --- a guest that changes what it wrote while it is read (item 3) ---


@every_ring
@pytest.mark.parametrize("what", ["indirect table", "ring"])
async def test_descriptors_that_change_while_they_are_read_harm_nobody_else(scene: Scene, ring: str, what: str) -> None:
    guest = await scene.started(ring, without=F_EVENT_IDX)
    queue = guest.queues[0]
    driver, memory = queue.driver, guest.memory
    good = [Desc(memory.allocate(16), 16, NEXT, 1), Desc(memory.allocate(64), 21, WRITE, 0)]
    memory.write(good[0].gpa, header(T_GET_ID))
    place = driver.write_table(good) if what == "indirect table" else driver.desc
    stop = threading.Event()

    def flip() -> None:
        randomness = random.Random(7)
        values = [0, 1, 2, 0xFFFF, 16, 0xFFFF_FFFF, 21 | WRITE << 32, memory.gpa, memory.gpa + 64, 2**64 - 1]
        while not stop.is_set():
            memory.store(place + 8 * randomness.randrange(4), 8, randomness.choice(values))
            memory.write(place, b"".join(driver._pack(d) for d in good))

    flipper = threading.Thread(target=flip)
    flipper.start()
    try:
        for _ in range(150):
            if what == "indirect table":
                put(driver, (place, 32, INDIRECT))
            elif isinstance(driver, SplitDriver):
                driver.put_avail(0)
            queue.ring()
            await BlkDriver(guest.queues[1]).flush()
            if scene.counters().broken[0]:
                break
        assert scene.counters().broken[1] is False
    finally:
        stop.set()
        flipper.join()
        guest.close()
    await scene.aftermath()


async def test_a_daemon_that_went_through_all_this_serves_as_before(scene: Scene) -> None:
    await scene.aftermath()
    guest = await scene.started("packed")
    try:
        assert (await BlkDriver(guest.queues[0]).request(T_IN, 0, room=512)).status == S_OK
    finally:
        guest.close()
