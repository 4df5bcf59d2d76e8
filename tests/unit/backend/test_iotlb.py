"""The waist behind an IOMMU (VIRTIO_F_ACCESS_PLATFORM): addresses are asked for, answered late, and taken back."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from kit.front_end.frontend import F_RING_PACKED, PACKED_START, Setting, every_ring, plugged
from kit.front_end.links import F_ACCESS_PLATFORM, WaistLink
from kit.ring.driven import add_request, check_it_works, every_driven, make_device
from kit.ring.iommu import BOTH, PAGE, READ, WRITE, behind_iommu, start, start_queue

from virtio.errors import PeerError
from virtio.testing.driver import Element
from virtio.testing.queue import GUARD, GuestQueue
from virtio.waist import AddressSpace, IotlbMiss


@every_driven
@every_ring
async def test_every_page_is_asked_for_with_the_right_it_needs(driven: str, ring: str) -> None:
    async with behind_iommu(driven, ring) as (p, iommu):
        queue, memory = p.guest.queues[0], p.guest.memory
        pages = [memory.allocate(PAGE, PAGE) for _ in range(3)]
        await check_it_works(queue)
        assert {miss.perm for miss in iommu.asked if miss.iova == queue.driver.desc} <= {BOTH}
        iommu.asked.clear()
        header = pages[0] + 100
        memory.write(header, b"\x08" + bytes(15))
        pieces = [Element(header, 16, False), Element(pages[1], 20, True), Element(pages[2] + 4000, 1, True)]
        queue.driver.add_elements(pieces)
        queue.kick()
        (used,) = await queue.used()
        assert used.written in (16, 21)
        assert [(miss.iova & -PAGE, miss.perm) for miss in iommu.asked] == [
            (pages[0], READ),
            (pages[1], WRITE),
            (pages[2], WRITE),
        ]


@every_driven
@every_ring
async def test_an_answer_that_is_late_parks_one_queue_and_no_other(driven: str, ring: str) -> None:
    async with behind_iommu(driven, ring, queues=2) as (p, iommu):
        waiting, other = p.guest.queues
        await check_it_works(waiting)
        await check_it_works(other)
        fresh = p.guest.memory.allocate(PAGE, PAGE)
        p.guest.memory.write(fresh, b"\x08" + bytes(15))
        iommu.gate = trio.Event()
        before = len(iommu.asked)
        element = Element(other.driver.memory.allocate(32), 21, True)
        await iommu.map(element.gpa & -PAGE)
        waiting.driver.add_elements([Element(fresh, 16, False), element])
        waiting.kick()
        await iommu.asked_for(before + 1)
        for _ in range(3):
            add_request(waiting)  # behind the one that waits, so in order: none of them comes back
            waiting.ring()
        await check_it_works(other, times=20)
        assert not waiting.driver.has_used()
        assert len(iommu.asked) == before + 1  # asked for once
        iommu.gate.set()
        await waiting.used(4)
        await check_it_works(waiting)


@every_driven
@every_ring
async def test_a_queue_that_waits_for_an_answer_can_be_stopped_and_goes_on_later(driven: str, ring: str) -> None:
    async with behind_iommu(driven, ring) as (p, iommu):
        queue = p.guest.queues[0]
        await check_it_works(queue)
        base = queue.driver.base
        await iommu.unmap_all()
        iommu.gate = trio.Event()
        before = len(iommu.asked)
        add_request(queue)
        queue.ring()
        await iommu.asked_for(before + 1)
        with trio.fail_after(GUARD):
            assert await p.guest.link.stop(0) == base
        iommu.gate.set()
        await iommu.map_all()
        await start_queue(p.guest, queue, base)
        assert len(await queue.used()) == 1


@every_driven
@every_ring
async def test_what_is_invalidated_is_asked_for_again(driven: str, ring: str) -> None:
    async with behind_iommu(driven, ring) as (p, iommu):
        queue = p.guest.queues[0]
        for _ in range(10):
            await check_it_works(queue)
            before = len(iommu.asked)
            await iommu.unmap_all()
            await check_it_works(queue)
            assert len(iommu.asked) > before
        # Part of a translation: all of it is forgotten and asked for again.
        await iommu.map_all()
        before = len(iommu.asked)
        await check_it_works(queue)
        assert len(iommu.asked) == before
        await p.backend.iotlb_invalidate(p.guest.memory.gpa + p.guest.memory.size - PAGE, PAGE)
        await check_it_works(queue)
        assert len(iommu.asked) > before


@every_driven
@every_ring
async def test_invalidations_under_load_lose_nothing(driven: str, ring: str) -> None:
    async with behind_iommu(driven, ring, queues=2) as (p, iommu):
        rounds = [0, 0]

        async def keep_going(queue: GuestQueue) -> None:
            while True:
                await check_it_works(queue)
                rounds[queue.index] += 1

        async with trio.open_nursery() as nursery:
            for queue in p.guest.queues:
                nursery.start_soon(keep_going, queue)
            with trio.fail_after(GUARD):
                for _ in range(15):
                    await iommu.unmap_all()
                    wanted = [number + 2 for number in rounds]
                    while any(number < least for number, least in zip(rounds, wanted, strict=True)):
                        await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert len(iommu.asked) > 15
        assert iommu.broken == []


@every_driven
async def test_a_right_that_is_missing_is_asked_for(driven: str) -> None:
    async with behind_iommu(driven, "split") as (p, iommu):
        queue, memory = p.guest.queues[0], p.guest.memory
        await check_it_works(queue)
        page = memory.allocate(PAGE, PAGE)
        memory.write(page, b"\x08" + bytes(15))
        await iommu.map(page, PAGE, READ)
        before = len(iommu.asked)
        queue.driver.add_elements([Element(page, 16, False), Element(page + 64, 21, True)])
        queue.kick()
        await queue.used()
        assert iommu.asked[before:] == [IotlbMiss(page + 64, WRITE)]


@every_driven
async def test_a_translation_to_where_no_memory_is_breaks_the_queue(driven: str) -> None:
    async with behind_iommu(driven, "split") as (p, iommu):
        queue = p.guest.queues[0]
        await check_it_works(queue)
        page = p.guest.memory.allocate(PAGE, PAGE)
        await p.backend.iotlb_update(page, PAGE, 0x1234_5000, int(BOTH))
        queue.driver.add_elements([Element(page, 16, False), Element(page + 64, 21, True)])
        queue.kick()
        await queue.broken()
        await trio.testing.wait_all_tasks_blocked()
        (broken,) = iommu.broken
        assert broken.error.gpa == page
        assert "a buffer lies outside guest memory" in str(broken.error)


@every_driven
async def test_a_reset_forgets_every_translation(driven: str) -> None:
    async with behind_iommu(driven, "split") as (p, iommu):
        await iommu.map_all()
        await check_it_works(p.guest.queues[0])
        asked = len(iommu.asked)
        await p.guest.link.reset()
        p.guest.forget_queues()
        await start(p.guest, iommu)
        await check_it_works(p.guest.queues[0])
        assert len(iommu.asked) > asked


@pytest.mark.parametrize(
    ("iova", "size", "uva", "perm"),
    [(0, 0, 0, 3), (0, 4096, 0, 0), (0, 4096, 0, 4), (0, 4096, 2**64 - 4095, 3)],
    ids=["no size", "no right", "an unknown right", "wraps"],
)
async def test_a_translation_that_is_none_is_the_peers_mistake(iova: int, size: int, uva: int, perm: int) -> None:
    async with behind_iommu("pump", "split") as (p, _):
        with pytest.raises(PeerError, match="IOTLB update"):
            await p.backend.iotlb_update(iova, size, uva, perm)
        await p.backend.iotlb_invalidate(0, 0)
        await p.backend.iotlb_invalidate(2**64 - 1, 2**64 - 1)
        await check_it_works(p.guest.queues[0])


@every_driven
async def test_more_translations_than_are_kept_are_just_asked_for_again(driven: str) -> None:
    async with behind_iommu(driven, "split") as (p, _):
        queue = p.guest.queues[0]
        await check_it_works(queue)
        for n in range(70_000):
            p.backend._iotlb.update((1 << 40) + n * PAGE, PAGE, p.guest.memory.uva, 3)
        await check_it_works(queue)


@every_driven
@every_ring
@pytest.mark.parametrize("space", [AddressSpace.GPA, AddressSpace.UVA], ids=lambda space: space.name)
async def test_access_platform_without_an_iommu_is_the_identity(driven: str, ring: str, space: AddressSpace) -> None:
    """The transport says that there is none by the space of the ring's addresses; descriptors have physical ones."""
    setting = Setting("waist", ring, "" if driven == "pump" else driven)
    async with plugged(make_device(driven, 1), setting, start=False) as p:
        guest, link = p.guest, p.guest.link
        assert isinstance(link, WaistLink)
        offered = await link.device_features()
        guest.features = offered if ring == "packed" else offered & ~F_RING_PACKED
        assert guest.features & F_ACCESS_PLATFORM
        await link.negotiate(guest.features)
        await link.share(guest.memory)
        link.space = space
        queue = guest.add_queue(64)
        driver = queue.driver
        physical = (driver.desc, driver.avail, driver.used_area)
        areas = queue.areas if space is AddressSpace.UVA else physical
        await link.set_up(0, driver.size, areas, PACKED_START if ring == "packed" else 0)
        await link.set_call(0, queue.call_fd)
        await link.set_kick(0, queue.kick_fd)
        await link.enable(0, True)
        await check_it_works(queue)
