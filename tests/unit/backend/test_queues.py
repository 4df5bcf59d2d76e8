"""The waist: when a queue runs, what its eventfds mean, and where it stands when it stops."""

from __future__ import annotations

import contextlib
import os
import socket
import sys

import pytest
import trio
import trio.testing
from kit.front_end.frontend import F_EVENT_IDX, PACKED_START, Setting, every_ring, plugged
from kit.front_end.vhost_user_wire import eventfd, memfd, no_fd_leaks
from kit.ring.driven import DRIVEN, add_request, check_it_works, every_driven, make_device
from structlog.testing import capture_logs

from virtio.backend.backend import Backend
from virtio.device import DeviceOptions
from virtio.devices.blk.device import Blk, BlkOptions
from virtio.devices.rng import Rng
from virtio.errors import GuestError, PeerError
from virtio.fd import OwnedFd
from virtio.testing.driver import Element, PackedDriver, SplitDriver
from virtio.testing.queue import GUARD
from virtio.waist import AddressSpace, QueueSetup


def setting_of(driven: str, ring: str = "split") -> Setting:
    return Setting("waist", ring, "" if driven == "pump" else driven)


def given(fd: int) -> OwnedFd:
    return OwnedFd(os.dup(fd))


# --- started and enabled ---


@every_driven
@every_ring
async def test_a_queue_runs_only_while_it_is_both_started_and_enabled(driven: str, ring: str) -> None:
    async with plugged(make_device(driven), setting_of(driven, ring)) as p:
        queue, backend = p.guest.queues[0], p.backend
        await check_it_works(queue)
        for _ in range(3):
            await backend.enable_queue(0, False)
            assert not backend.stats().queues[0].running
            add_request(queue)
            queue.ring()
            await trio.testing.wait_all_tasks_blocked(0.001)
            assert not queue.driver.has_used()
            await backend.enable_queue(0, True)
            assert backend.stats().queues[0].running
            await queue.used()
        await check_it_works(queue)


@every_driven
async def test_enabling_first_and_starting_later_is_the_same(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven), start=False) as p:
        guest, backend = p.guest, p.backend
        await guest.negotiate()
        await guest.link.share(guest.memory)
        queue = guest.add_queue(16)
        await backend.enable_queue(0, True)
        assert not backend.stats().queues[0].running
        await guest.link.set_up(0, 16, queue.areas, 0)
        assert not backend.stats().queues[0].running
        await guest.link.set_kick(0, queue.kick_fd)
        assert backend.stats().queues[0].running
        await guest.link.set_call(0, queue.call_fd)
        await check_it_works(queue)


@every_driven
async def test_a_queue_may_be_kicked_before_it_is_set_up(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven), start=False) as p:
        guest = p.guest
        await guest.negotiate()
        queue = guest.add_queue(16)
        await p.backend.enable_queue(0, True)
        await guest.link.set_kick(0, queue.kick_fd)
        await guest.link.set_call(0, queue.call_fd)
        assert not p.backend.stats().queues[0].running
        await guest.link.share(guest.memory)
        await guest.link.set_up(0, 16, queue.areas, 0)
        await check_it_works(queue)


@every_driven
@every_ring
async def test_a_queue_that_is_suspended_keeps_its_descriptors_and_goes_on_where_it_is_set_up(
    driven: str, ring: str
) -> None:
    async with plugged(make_device(driven), setting_of(driven, ring)) as p:
        guest, backend, queue = p.guest, p.backend, p.guest.queues[0]
        for _ in range(3):
            await check_it_works(queue)
            base = await backend.suspend_queue(0)
            assert base == queue.driver.base
            assert await backend.suspend_queue(0) == base
            await backend.enable_queue(0, True)
            add_request(queue)
            queue.ring()
            await trio.testing.wait_all_tasks_blocked(0.001)
            assert not queue.driver.has_used()
            await guest.link.set_up(0, queue.driver.size, queue.areas, base)
            await queue.used()


@every_driven
async def test_starting_a_queue_counts_as_a_kick(driven: str) -> None:
    """After a reconnect the front-end's eventfd is new, and the driver may have kicked the one before."""
    async with plugged(make_device(driven), setting_of(driven), start=False) as p:
        guest = p.guest
        await guest.negotiate()
        await guest.link.share(guest.memory)
        queue = guest.add_queue(16)
        add_request(queue)
        await guest.start_queue(0)
        assert len(await queue.used()) == 1


@every_driven
@every_ring
async def test_a_queue_without_a_kick_descriptor_is_polled(driven: str, ring: str) -> None:
    async with plugged(make_device(driven), setting_of(driven, ring)) as p:
        queue = p.guest.queues[0]
        await p.backend.set_kick(0, None)
        for _ in range(5):
            add_request(queue)
            await queue.used()
        await p.backend.set_kick(0, given(queue.kick_fd))
        await check_it_works(queue)


@every_driven
@every_ring
async def test_a_new_kick_descriptor_takes_over_while_the_queue_runs(driven: str, ring: str) -> None:
    async with plugged(make_device(driven), setting_of(driven, ring)) as p:
        queue, backend = p.guest.queues[0], p.backend
        with no_fd_leaks():
            for _ in range(4):
                await check_it_works(queue)
                os.close(queue.kick_fd)
                queue.kick_fd = eventfd()
                add_request(queue)  # kicked nowhere: the new descriptor counts as a kick
                await backend.set_kick(0, given(queue.kick_fd))
                assert len(await queue.used()) == 1
            await check_it_works(queue)


@every_driven
async def test_a_full_kick_eventfd_is_one_kick_and_not_many(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        queue = p.guest.queues[0]
        for _ in range(3):
            add_request(queue)
            with contextlib.suppress(BlockingIOError):  # nobody has read it since the last time
                os.eventfd_write(queue.kick_fd, 2**64 - 2)
            await queue.used()
        assert p.backend.stats().queues[0].wakeups < 20


# --- the call descriptor ---


def drain(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)


@pytest.mark.parametrize("state", ["running", "stopped", "never set up"])
@every_driven
async def test_a_new_call_descriptor_is_signalled_once(driven: str, state: str) -> None:
    async with plugged(make_device(driven), setting_of(driven), start=state != "never set up") as p:
        if state == "stopped":
            await p.guest.link.stop(0)
        for _ in range(3):
            call_fd = eventfd()
            await p.backend.set_call(0, given(call_fd))
            assert os.eventfd_read(call_fd) == 1
            os.close(call_fd)


@every_driven
@every_ring
@pytest.mark.parametrize("without", [0, F_EVENT_IDX], ids=["event_idx", "flags"])
async def test_a_driver_that_wants_no_interrupts_gets_none(driven: str, ring: str, without: int) -> None:
    async with plugged(make_device(driven), setting_of(driven, ring), without=without) as p:
        queue = p.guest.queues[0]
        await check_it_works(queue)
        queue.driver.want_interrupts(False)
        drain(queue.call_fd)
        before = p.backend.stats().queues[0]
        for _ in range(5):
            add_request(queue)
            queue.kick()
            with trio.fail_after(GUARD):
                while not queue.driver.has_used():
                    await trio.lowlevel.checkpoint()
            queue.driver.used()
            queue.driver.want_interrupts(False)
        await p.backend.enable_queue(0, False)  # so that nothing is on its way any more
        after = p.backend.stats().queues[0]
        assert after.notifications_sent == before.notifications_sent
        assert after.notifications_suppressed > before.notifications_suppressed
        with pytest.raises(BlockingIOError):
            os.eventfd_read(queue.call_fd)


@every_driven
async def test_without_a_call_descriptor_requests_are_served_all_the_same(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        queue = p.guest.queues[0]
        await p.backend.set_call(0, None)
        add_request(queue)
        queue.kick()
        with trio.fail_after(GUARD):
            while not queue.driver.has_used():
                await trio.lowlevel.checkpoint()


# --- where it stands ---


@every_driven
@every_ring
async def test_the_base_is_where_the_next_device_goes_on(driven: str, ring: str) -> None:
    async with plugged(make_device(driven), setting_of(driven, ring), queue_size=8) as p:
        guest, queue = p.guest, p.guest.queues[0]
        for _ in range(15):  # several times round a ring of 8 descriptors
            await check_it_works(queue, times=1)
            base = await guest.link.stop(0)
            assert base == queue.driver.base
            add_request(queue)  # while nobody serves it
            await guest.start_queue(0, base)
            assert len(await queue.used()) == 1
        assert await guest.link.stop(0) == queue.driver.base
        if ring == "split":
            assert queue.driver.base == 30


@every_driven
async def test_a_split_ring_goes_on_across_the_wrap_of_its_index(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven), start=False) as p:
        guest = p.guest
        await guest.negotiate()
        await guest.link.share(guest.memory)
        queue = guest.add_queue(8)
        queue.driver = SplitDriver(guest.memory, 8, event_idx=True, start=65530)
        await guest.start_queue(0, 65530)
        await check_it_works(queue, times=20)
        assert await guest.link.stop(0) == (65530 + 20) & 0xFFFF


@every_driven
async def test_a_packed_ring_goes_on_from_any_place_and_wrap_counter(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven, "packed"), start=False) as p:
        guest = p.guest
        await guest.negotiate()
        await guest.link.share(guest.memory)
        queue = guest.add_queue(7)
        for start, wrap in ((5, False), (6, True), (0, False)):
            queue.driver = PackedDriver(guest.memory, 7, event_idx=True, start=start, wrap=wrap)
            await guest.start_queue(0, queue.driver.base)
            await check_it_works(queue, times=12)
            assert await guest.link.stop(0) == queue.driver.base


@every_driven
async def test_stopping_answers_only_when_everything_came_back(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        queue = p.guest.queues[0]
        for _ in range(21):
            add_request(queue)
        queue.kick()
        base = await p.guest.link.stop(0)
        done = len(queue.driver.used())
        assert base == done  # what was begun is done, what was not begun is still in the ring
        assert p.backend.stats().queues[0].inflight == 0
        await p.guest.start_queue(0, base)
        assert len(await queue.used(21 - done)) == 21 - done


# --- what is refused ---

GOOD = QueueSetup(8, 0x1000, 0x2000, 0x3000, 0, AddressSpace.UVA)


@every_driven
async def test_a_queue_that_is_not_there_is_the_peers_mistake_and_no_descriptor_leaks(driven: str) -> None:
    async with plugged(make_device(driven, queues=2), setting_of(driven), start=False) as p:
        backend = p.backend
        with no_fd_leaks():
            for index in (-1, 2, 255, 1 << 31):
                for verb in (backend.set_kick, backend.set_call, backend.set_err):
                    with pytest.raises(PeerError, match=f"queue {index} does not exist, the device has 2"):
                        await verb(index, OwnedFd(eventfd()))
                with pytest.raises(PeerError):
                    await backend.enable_queue(index, True)
                with pytest.raises(PeerError):
                    await backend.stop_queue(index)
                with pytest.raises(PeerError):
                    await backend.configure_queue(index, GOOD)


@pytest.mark.parametrize("which", ["kick", "call", "err"])
@pytest.mark.parametrize("state", ["running", "stopped"])
@every_driven
async def test_what_cannot_notify_is_refused_and_closed(driven: str, state: str, which: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        queue, backend = p.guest.queues[0], p.backend
        if state == "stopped":
            base = await p.guest.link.stop(0)
            await p.guest.link.set_up(0, queue.driver.size, queue.areas, base)
        verb = {"kick": backend.set_kick, "call": backend.set_call, "err": backend.set_err}[which]
        readable, writable = os.pipe()
        with no_fd_leaks():
            kicks = [os.dup(writable)] if which == "kick" else []
            for fd in (memfd(), os.dup(readable), *kicks, os.open("/dev/null", os.O_RDWR)):
                with pytest.raises(PeerError, match=f"{which} fd of queue 0: n(ot|either) an eventfd"):
                    await verb(0, OwnedFd(fd))
        os.close(readable)
        os.close(writable)
        await backend.set_kick(0, given(queue.kick_fd))
        await backend.set_call(0, given(queue.call_fd))
        await check_it_works(queue)


@every_driven
async def test_a_kick_fd_that_is_refused_leaves_a_running_queue_as_it_is(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        with pytest.raises(PeerError, match="not an eventfd"):
            await p.backend.set_kick(0, OwnedFd(memfd()))
        await check_it_works(p.guest.queues[0])


@every_driven
async def test_a_driver_that_waits_at_a_socket_is_interrupted_until_it_hangs_up_which_is_logged_once(
    driven: str,
) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        queue = p.guest.queues[0]

        async def ask() -> None:
            queue.driver.want_interrupts(True)
            add_request(queue)
            queue.ring()
            while not queue.driver.used():
                await trio.lowlevel.checkpoint()

        ours, theirs = socket.socketpair()
        await p.backend.set_call(0, OwnedFd(theirs.detach()))
        with capture_logs() as logs, trio.fail_after(GUARD):
            for number in range(4):  # the first one is for what was completed before
                if number:
                    await ask()
                await trio.lowlevel.wait_readable(ours)
                assert ours.recv(16) == (1).to_bytes(8, sys.byteorder)
            trio.lowlevel.notify_closing(ours)
            ours.close()
            await ask()
            while not logs:
                await trio.lowlevel.checkpoint()
            await ask()
            await p.backend.enable_queue(0, False)
        told = [line for line in logs if line["log_level"] == "warning"]
        assert [(line["queue"], line["error"]) for line in told] == [(0, "Broken pipe")]
        assert p.backend.stats().queues[0].notifications_lost == 1


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"size": 0}, PeerError, "size 0"),
        ({"size": 2048}, PeerError, "queue 0 of size 2048, allowed are 1 to 1024"),
        ({"size": 65536}, PeerError, "size 65536"),
        ({"size": 12}, PeerError, "size 12"),
        ({"base": 1 << 16}, PeerError, "base 0x10000"),
        ({"desc": 0x1008}, GuestError, "not aligned"),
        ({"avail": 0x2001}, GuestError, "not aligned"),
        ({"used": 0x3002}, GuestError, "not aligned"),
    ],
    ids=str,
)
async def test_an_impossible_split_ring_is_refused(change: dict[str, int], error: type[Exception], reason: str) -> None:
    async with plugged(make_device("io_uring"), setting_of("io_uring"), start=False) as p:
        await p.guest.negotiate()
        values = {name: getattr(GOOD, name) for name in ("size", "desc", "avail", "used", "base", "space")}
        with pytest.raises(error, match=reason):
            await p.backend.configure_queue(0, QueueSetup(**(values | change)))


async def test_a_packed_ring_of_any_size_is_accepted_and_a_base_outside_it_is_not() -> None:
    async with plugged(make_device("io_uring"), setting_of("io_uring", "packed"), start=False) as p:
        await p.guest.negotiate()
        for size in (1, 3, 12, 1000):
            await p.backend.configure_queue(0, QueueSetup(size, 0x1000, 0x8000, 0x9000, PACKED_START, GOOD.space))
            for base in (size, size << 16, PACKED_START | size, PACKED_START | size << 16):
                with pytest.raises(PeerError, match="base"):
                    await p.backend.configure_queue(0, QueueSetup(size, 0x1000, 0x8000, 0x9000, base, GOOD.space))
        with pytest.raises(GuestError, match="not aligned"):
            await p.backend.configure_queue(0, QueueSetup(8, 0x1000, 0x8002, 0x9000, PACKED_START, GOOD.space))


async def test_a_running_queue_cannot_be_set_up_anew() -> None:
    async with plugged(make_device("io_uring"), setting_of("io_uring")) as p:
        with pytest.raises(PeerError, match="set up while it is started"):
            await p.backend.configure_queue(0, GOOD)
        await check_it_works(p.guest.queues[0])


async def test_features_that_were_not_offered_are_refused() -> None:
    device = Rng("rng", DeviceOptions(), 1, 64)
    async with Backend(device, features_off=[34, 29]) as backend:
        offered = backend.device_features()
        assert offered >> 32 & 1
        assert not offered >> 34 & 1
        assert not offered >> 29 & 1
        for bit in (0, 29, 34, 35, 63):
            with pytest.raises(PeerError, match="were not offered"):
                backend.set_driver_features(1 << 32 | 1 << bit)
        backend.set_driver_features(offered)


async def test_a_native_device_without_a_worker_is_our_own_mistake() -> None:
    device = Blk("disk", BlkOptions(backend="null", size=512), 1, 64)
    with pytest.raises(ValueError, match="disk: a native device needs a worker"):
        Backend(device)
    device.close()


async def test_the_config_space_ends_at_256_bytes() -> None:
    async with plugged(make_device("io_uring"), setting_of("io_uring"), start=False) as p:
        assert p.backend.read_config(0, 256)[60:] == bytes(196)
        assert p.backend.read_config(256, 0) == b""
        for offset, size in ((0, 257), (256, 1), (1 << 32, 1), (-1, 1), (0, -1)):
            with pytest.raises(PeerError, match="is beyond its 256 bytes"):
                p.backend.read_config(offset, size)
        with pytest.raises(PeerError):
            p.backend.write_config(250, bytes(7))


# --- chains of more than one device's making ---


@pytest.mark.parametrize("driven", DRIVEN)
@every_ring
async def test_a_chain_as_long_as_the_queue_is_served(driven: str, ring: str) -> None:
    async with plugged(make_device(driven), setting_of(driven, ring), queue_size=32) as p:
        queue = p.guest.queues[0]
        for indirect in (False, True):
            used = await queue.request([bytes([b]) for b in b"\x08" + bytes(15)], [1] * 15 + [6], indirect=indirect)
            assert used.written in (16, 21)
            assert b"".join(used.buffers)[:1] in (b"\x08", b"x")


@every_driven
async def test_one_buffer_may_lie_in_many_places_at_once(driven: str) -> None:
    """The same bytes as two descriptors: odd, legal, and the device's problem only if it makes it one."""
    async with plugged(make_device(driven), setting_of(driven)) as p:
        queue, memory = p.guest.queues[0], p.guest.memory
        header, answer = memory.allocate(16), memory.allocate(21)
        memory.write(header, b"\x08" + bytes(15))
        for _ in range(3):
            queue.driver.add_elements([Element(header, 16, False), Element(answer, 21, True)])
        queue.kick()
        assert len(await queue.used(3)) == 3
