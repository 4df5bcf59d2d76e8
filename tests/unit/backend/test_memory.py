"""The waist: guest memory that changes, goes away, or is cut off, and the queues that stand in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from kit.front_end.frontend import PACKED_START, Guest, Plugged, Setting, every_ring, plugged
from kit.front_end.vhost_user_wire import eventfd, memfd, no_fd_leaks, open_fds
from kit.guest.blk import VerifiedLoad
from kit.ring.driven import check_it_works, every_driven, make_device

from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.testing.driver import Element, GuestMemory, PackedDriver, SplitDriver
from virtio.testing.queue import GUARD, GuestQueue
from virtio.waist import MemoryRegion, QueueBroken


def setting_of(driven: str, ring: str = "split") -> Setting:
    return Setting("waist", ring, "" if driven == "pump" else driven)


def other_memory(size: int = 1 << 20) -> GuestMemory:
    return GuestMemory(size, gpa=0x9000_0000, uva=0x6F00_0000_0000, name="other")


async def start_in(guest: Guest, index: int, memory: GuestMemory) -> GuestQueue:
    """A queue whose rings and buffers lie in ``memory``; it takes the place of the guest's own."""
    make = PackedDriver if guest.ring == "packed" else SplitDriver
    queue = GuestQueue(index, make(memory, 16, event_idx=True))
    guest.queues[index].close()
    guest.queues[index] = queue
    await guest.link.stop(index)
    await guest.start_queue(index)
    return queue


async def event_of(p: Plugged) -> object:
    with trio.fail_after(GUARD):
        return await p.backend.next_event()


# --- changes ---


@every_driven
@every_ring
async def test_io_goes_on_while_the_memory_table_changes_under_it(driven: str, ring: str) -> None:
    async with plugged(make_device(driven, queues=2), setting_of(driven, ring)) as p:
        guest = p.guest
        before = sorted(open_fds().values())
        with other_memory() as other:
            stopping = False

            async def keep_going(queue: GuestQueue) -> None:
                while not stopping:
                    await check_it_works(queue)

            async with trio.open_nursery() as nursery:
                for queue in guest.queues:
                    nursery.start_soon(keep_going, queue)
                for _ in range(30):
                    await guest.link.share(guest.memory, other)
                    await guest.link.share(other, guest.memory)
                    await guest.link.share(guest.memory)
                stopping = True
        assert sorted(open_fds().values()) == before
        for queue in guest.queues:
            await check_it_works(queue)
        assert not any(queue.broken for queue in p.backend.stats().queues)


@pytest.mark.parametrize("driven", ["io_uring", "epoll"])
async def test_no_byte_of_a_disk_is_lost_while_the_memory_table_changes(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        load = VerifiedLoad(p.guest.queues[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            await load.progress()
            for _ in range(50):
                await p.guest.link.share(p.guest.memory)
            await load.progress()
            nursery.cancel_scope.cancel()


@every_driven
async def test_a_region_that_stays_is_not_mapped_anew(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        memory = p.guest.memory
        kept = MemoryRegion(memory.gpa, memory.size, memory.uva, 0, OwnedFd(os.dup(memory.fd)))
        await p.backend.set_memory([kept])
        before = mappings_of("memfd:guest")
        with other_memory() as other, no_fd_leaks():
            more = MemoryRegion(other.gpa, other.size, other.uva, 0, OwnedFd(os.dup(other.fd)))
            await p.backend.set_memory([kept, more])
            assert mappings_of("memfd:guest") == before
            assert mappings_of("memfd:other") == 2  # the guest's and ours
            await p.backend.set_memory([kept])
            assert not kept.fd.closed
            assert more.fd.closed
            assert mappings_of("memfd:other") == 1
        await check_it_works(p.guest.queues[0])


def mappings_of(name: str) -> int:
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


@every_driven
@every_ring
async def test_a_queue_whose_ring_went_away_breaks_and_the_other_goes_on(driven: str, ring: str) -> None:
    async with plugged(make_device(driven, queues=2), setting_of(driven, ring)) as p:
        guest = p.guest
        with other_memory() as other:
            await guest.link.share(guest.memory, other)
            lost = await start_in(guest, 1, other)
            await check_it_works(lost)
            await guest.link.share(guest.memory)
            lost.ring()
            await lost.broken()
            event = await event_of(p)
            assert isinstance(event, QueueBroken)
            assert event.index == 1
            assert "the ring lies outside guest memory" in str(event.error)
            await guest.needs_reset()
            assert [queue.broken for queue in p.backend.stats().queues] == [False, True]
            await check_it_works(guest.queues[0])
            # Set up again where there is memory it works again.
            await guest.link.share(guest.memory, other)
            again = await start_in(guest, 1, other)
            await check_it_works(again)


@every_driven
@every_ring
async def test_a_buffer_that_went_away_breaks_its_queue_only(driven: str, ring: str) -> None:
    async with plugged(make_device(driven, queues=2), setting_of(driven, ring)) as p:
        guest = p.guest
        with other_memory() as other:
            await guest.link.share(guest.memory, other)
            add_request_in(other, guest.queues[0])
            await guest.queues[0].used()
            await guest.link.share(guest.memory)
            add_request_in(other, guest.queues[0])
            await guest.queues[0].broken()
            event = await event_of(p)
            assert isinstance(event, QueueBroken)
            assert event.error.gpa >= other.gpa
            assert "a buffer lies outside guest memory" in str(event.error)
            await check_it_works(guest.queues[1])


def add_request_in(memory: GuestMemory, queue: GuestQueue) -> None:
    header = memory.allocate(16)
    memory.write(header, b"\x08" + bytes(15))
    queue.driver.add_elements([Element(header, 16, False), Element(memory.allocate(21), 21, True)])
    queue.kick()


@every_driven
@every_ring
async def test_a_buffer_may_cross_from_one_region_into_the_next(driven: str, ring: str) -> None:
    async with plugged(make_device(driven), setting_of(driven, ring)) as p:
        guest = p.guest
        memory = guest.memory
        half = memory.size // 2

        def region(offset: int) -> MemoryRegion:
            # Neighbours for the guest, strangers in the front-end.
            uva = memory.uva + 3 * offset
            return MemoryRegion(memory.gpa + offset, half, uva, offset, OwnedFd(os.dup(memory.fd)))

        await p.backend.set_memory([region(half), region(0)])
        header, answer = memory.gpa + half - 7, memory.gpa + half + 0x1000
        memory.write(header, b"\x08" + bytes(15))
        guest.queues[0].driver.add_elements([Element(header, 16, False), Element(answer, 21, True)])
        guest.queues[0].kick()
        (used,) = await guest.queues[0].used()
        assert used.written in (16, 21)


# --- what cannot be mapped ---


@every_driven
async def test_memory_that_cannot_be_mapped_leaves_the_old_table_and_no_descriptor(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        memory = p.guest.memory
        readable, writable = os.pipe()
        bad = {
            "shorter than claimed": (memfd(4096), 8192, 0),
            "offset beyond the end": (memfd(4096), 4096, 4096),
            "offset and size wrap": (memfd(4096), 1 << 63, 1 << 63),
            "an eventfd": (eventfd(), 4096, 0),
            "a pipe": (os.dup(readable), 4096, 0),
            "a folder": (os.open("/", os.O_RDONLY), 4096, 0),
            "not writable": (read_only_memfd(), 4096, 0),
        }
        for name, (fd, size, offset) in bad.items():
            good = MemoryRegion(memory.gpa, memory.size, memory.uva, 0, OwnedFd(os.dup(memory.fd)))
            wrong = MemoryRegion(0x1000_0000, size, 0x1000_0000, offset, OwnedFd(fd))
            with pytest.raises(HostError):
                await p.backend.set_memory([good, wrong])
            assert good.fd.closed, name
            assert wrong.fd.closed, name
            await check_it_works(p.guest.queues[0], times=1)
        os.close(readable)
        os.close(writable)


def read_only_memfd() -> int:
    fd = memfd(4096)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return again


# --- a file that is cut under us ---


@every_driven
@every_ring
async def test_guest_memory_that_is_cut_off_breaks_the_queues_in_it_and_no_others(driven: str, ring: str) -> None:
    async with plugged(make_device(driven, queues=2), setting_of(driven, ring)) as p:
        guest = p.guest
        other = other_memory()
        await guest.link.share(guest.memory, other)
        cut = await start_in(guest, 1, other)
        await check_it_works(cut)
        os.ftruncate(other.fd, 0)
        cut.ring()
        await cut.broken()
        event = await event_of(p)
        assert isinstance(event, QueueBroken)
        assert event.index == 1
        assert "the file behind guest memory was truncated" in str(event.error)
        other.close()


@every_driven
async def test_after_a_truncation_the_device_is_reset_and_serves_again(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        for _ in range(3):
            guest = p.guest
            await check_it_works(guest.queues[0])
            os.ftruncate(guest.memory.fd, 0)
            guest.queues[0].ring()
            await guest.queues[0].broken()
            await guest.needs_reset()
            await guest.link.reset()
            guest.close()
            guest = await p.connect()
            await guest.start()
        assert await guest.link.status() == 0
        await check_it_works(p.guest.queues[0])


@every_driven
async def test_a_queue_that_fell_out_of_memory_stops_with_a_base_all_the_same(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        await check_it_works(p.guest.queues[0], times=3)
        await p.backend.set_memory([])
        assert await p.guest.link.stop(0) == 3


@every_driven
async def test_a_packed_ring_that_starts_anywhere_survives_no_memory_at_all(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven, "packed"), start=False) as p:
        guest = p.guest
        await guest.negotiate()
        queue = guest.add_queue(16)
        await guest.start_queue(0, PACKED_START)
        await queue.broken()
        event = await event_of(p)
        assert isinstance(event, QueueBroken)
        assert await guest.link.stop(0) == PACKED_START
