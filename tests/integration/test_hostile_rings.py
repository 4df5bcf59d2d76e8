"""HOSTILE's checklist, items 1 to 6: what a guest puts into its rings breaks one queue of its own, and nothing else."""

from __future__ import annotations

import os
import random
import re
import threading

import pytest
from kit.front_end.frontend import F_EVENT_IDX, F_INDIRECT_DESC, Guest, every_ring
from kit.front_end.scene import Scene
from kit.guest.blk import S_OK, T_GET_ID, T_IN, BlkDriver, header
from kit.ring.attacks import ATTACKS, AVAIL, INDIRECT, NEXT, SIZE, USED, WRITE, Attack, piece, put, table

from virtio.testing.driver import Desc, Element, GuestMemory, PackedDriver, SplitDriver
from virtio.testing.queue import GuestQueue


async def check_that_one_queue_broke(scene: Scene, guest: Guest, mark: int, reason: str, index: int = 0) -> None:
    """The err eventfd, the status, one line of the log and one counter say it, and the guest's other queue goes on."""
    await guest.queues[index].broken()
    await guest.needs_reset()
    entry = await scene.log.expect(mark, "queue broken")
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
            entry = await scene.log.expect(mark, "queue broken")
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
        entry = await scene.log.expect(mark, "queue broken")
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
