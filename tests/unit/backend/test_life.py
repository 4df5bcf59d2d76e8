"""The waist: a reset is a new beginning, nothing leaks, a broken queue is one queue, and workers share the queues."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing
from kit.front_end.frontend import NEEDS_RESET, REACTORS, Setting, every_ring, plugged
from kit.front_end.vhost_user_wire import no_fd_leaks
from kit.guest.blk import BlkDriver, VerifiedLoad
from kit.ring.driven import add_request, check_it_works, every_driven, make_device

from virtio.backend.backend import Backend
from virtio.errors import HostError
from virtio.native.stats import DURATION_BOUNDS
from virtio.native.worker import Worker
from virtio.testing.driver import Element
from virtio.testing.queue import GUARD
from virtio.waist import ConfigChanged, QueueBroken

DRIVER_OK = 15


def setting_of(driven: str, ring: str = "split") -> Setting:
    return Setting("waist", ring, "" if driven == "pump" else driven)


# --- reset ---


@every_driven
@every_ring
async def test_a_reset_forgets_everything_and_the_next_driver_starts_anew(driven: str, ring: str) -> None:
    async with plugged(make_device(driven, queues=2), setting_of(driven, ring), start=False) as p:
        guest, backend = p.guest, p.backend
        before = maps_of("memfd:guest")  # its own, and what tests before this one have not given back yet
        with no_fd_leaks():
            for _ in range(5):
                await guest.start()
                backend.set_status(DRIVER_OK)
                assert backend.stats().driver_features == guest.features
                for queue in guest.queues:
                    await check_it_works(queue)
                await guest.link.reset()
                assert (backend.status, backend.stats().driver_features) == (0, 0)
                assert not any(queue.running or queue.broken for queue in backend.stats().queues)
                assert maps_of("memfd:guest") <= before
                for index in range(2):
                    await backend.enable_queue(index, True)
                    await backend.set_kick(index, None)
                assert not any(queue.running for queue in backend.stats().queues)
                await guest.link.reset()
                guest.forget_queues()


def worker_threads() -> dict[str, int]:
    """Thread ids of our native workers by name."""
    tasks = {int(path.name): (path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()}
    return {name: task for task, name in tasks.items() if name.startswith("hb-")}


def maps_of(name: str) -> int:
    return sum(name in line for line in Path("/proc/self/maps").read_text().splitlines())


@every_driven
async def test_a_reset_in_the_middle_of_things_leaves_nothing(driven: str) -> None:
    async with plugged(make_device(driven, queues=2), setting_of(driven), start=False) as p:
        guest = p.guest
        with no_fd_leaks():
            for _ in range(10):
                await guest.start()
                for queue in guest.queues:
                    for _ in range(21):
                        add_request(queue)
                    queue.ring()
                await guest.link.reset()
                assert [queue.inflight for queue in p.backend.stats().queues] == [0, 0]
                guest.forget_queues()
        await guest.start()
        await check_it_works(guest.queues[1])


@every_driven
async def test_events_of_before_a_reset_are_not_told_afterwards(driven: str) -> None:
    async with plugged(make_device(driven), setting_of(driven)) as p:
        guest = p.guest
        guest.queues[0].driver.add_elements([Element(0x10, 16, False), Element(0x1000, 21, True)])
        guest.queues[0].ring()
        await guest.queues[0].broken()
        p.device.config_changed()
        await trio.testing.wait_all_tasks_blocked()
        await guest.link.reset()
        guest.forget_queues()
        await guest.start()
        p.device.config_changed()
        assert isinstance(await p.backend.next_event(), ConfigChanged)


@every_driven
async def test_ten_lives_of_a_back_end_leak_no_descriptor_and_no_thread(driven: str) -> None:
    before = maps_of("memfd:guest")
    with no_fd_leaks():
        for _ in range(10):
            async with plugged(make_device(driven, queues=3), setting_of(driven), workers=2) as p:
                await check_it_works(p.guest.queues[2])
    assert not worker_threads()
    assert maps_of("memfd:guest") <= before


# --- a broken queue ---


@every_driven
@every_ring
async def test_a_broken_queue_says_so_in_four_places_and_the_others_go_on(driven: str, ring: str) -> None:
    async with plugged(make_device(driven, queues=3), setting_of(driven, ring)) as p:
        guest, backend = p.guest, p.backend
        backend.set_status(DRIVER_OK)
        bad = guest.queues[1]
        bad.driver.add_elements([Element(0x10, 16, False), Element(0x1000, 21, True)])
        bad.ring()
        await bad.broken()  # its err eventfd
        with trio.fail_after(GUARD):
            event = await backend.next_event()
        assert isinstance(event, QueueBroken)
        assert (event.index, event.error.queue_index, event.error.gpa) == (1, 1, 0x10)
        assert str(event.error).startswith("queue 1 is broken: a buffer lies outside guest memory (head ")
        assert backend.status == DRIVER_OK | NEEDS_RESET
        backend.set_status(DRIVER_OK)
        assert backend.status == DRIVER_OK | NEEDS_RESET  # only a reset takes it away (2.1.2)
        assert [queue.broken for queue in backend.stats().queues] == [False, True, False]
        for index in (0, 2):
            await check_it_works(guest.queues[index])
        bad.ring()
        await check_it_works(guest.queues[0])
        assert not bad.driver.has_used()
        await guest.link.reset()
        assert backend.status == 0
        guest.forget_queues()
        await guest.start()
        for queue in guest.queues:
            await check_it_works(queue)


@every_driven
async def test_a_queue_that_broke_is_mended_by_setting_it_up_again(driven: str) -> None:
    """RING_RESET, where a transport carries it, and a front-end that stops and starts one ring."""
    async with plugged(make_device(driven, queues=2), setting_of(driven)) as p:
        guest = p.guest
        for _ in range(3):
            bad = guest.queues[1]
            bad.driver.add_elements([Element(0x10, 16, False), Element(0x1000, 21, True)])
            bad.ring()
            await bad.broken()
            await guest.link.stop(1)
            guest.queues.pop().close()
            guest.add_queue(32)
            await guest.start_queue(1)
            await check_it_works(guest.queues[1])


# --- workers ---


@pytest.mark.parametrize("reactor", REACTORS)
@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_queues_are_dealt_out_over_the_workers_and_all_work_at_once(reactor: str, workers: int) -> None:
    async with plugged(make_device(reactor, queues=4), Setting("waist", "split", reactor), workers=workers) as p:
        loads = [VerifiedLoad(q, first_sector=512 * q.index, blocks=32, seed=q.index) for q in p.guest.queues]
        async with trio.open_nursery() as nursery:
            for load in loads:
                nursery.start_soon(load.run)
            for load in loads:
                await load.progress()
            nursery.cancel_scope.cancel()
        assert all(queue.ops["write"].requests > 0 for queue in p.backend.stats().queues)
        assert worker_threads().keys() == {f"hb-test{n}" for n in range(workers)}


@pytest.mark.parametrize("reactor", REACTORS)
async def test_two_devices_may_share_a_worker_and_one_leaves_without_a_trace(reactor: str) -> None:
    async with Worker("shared", reactor=reactor) as worker:
        assert worker.reactor == reactor
        stats = worker.stats()
        assert (stats.name, stats.reactor) == ("shared", reactor)
        first, second = make_device(reactor), make_device(reactor)
        async with Backend(first, workers=[worker]):
            pass
        async with Backend(second, workers=[worker]):
            pass
        first.close()
        second.close()
        assert worker.stats().cpu_seconds > 0


async def test_a_worker_for_a_cpu_that_is_not_there_says_so() -> None:
    with pytest.raises(HostError, match=r"starting worker far on CPUs 3998-4000,9999"):
        async with Worker("far", cpus=[3998, 3999, 4000, 9999]):
            raise AssertionError("unreachable")


async def test_any_cpu_set_that_has_a_cpu_of_this_host_works() -> None:
    """As many CPUs as the configuration takes, with numbers beyond what this host has."""
    async with Worker("wide", cpus=range(10000)):
        assert os.sched_getaffinity(worker_threads()["hb-wide"]) >= os.sched_getaffinity(0)


async def test_a_worker_stays_on_its_cpus() -> None:
    cpu = min(os.sched_getaffinity(0))
    async with Worker("pinned", cpus=[cpu]):
        assert os.sched_getaffinity(worker_threads()["hb-pinned"]) == {cpu}


@pytest.mark.parametrize("reactor", REACTORS)
async def test_a_worker_whose_scope_is_cancelled_ends_in_order(reactor: str) -> None:
    with no_fd_leaks(), trio.CancelScope() as scope:
        async with plugged(make_device(reactor), Setting("waist", "split", reactor)) as p:
            for _ in range(21):
                add_request(p.guest.queues[0])
            p.guest.queues[0].ring()
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


@pytest.mark.parametrize("reactor", REACTORS)
async def test_a_worker_wakes_up_for_kicks_and_for_nothing_else(reactor: str) -> None:
    async with plugged(make_device(reactor), Setting("waist", "split", reactor)) as p:
        queue = p.guest.queues[0]
        await check_it_works(queue, times=20)
        seen = p.backend.stats().queues[0]
        assert seen.kicks <= 20
        assert seen.wakeups <= 21
        assert seen.empty_wakeups <= seen.wakeups


# --- counters ---


@pytest.mark.parametrize("reactor", REACTORS)
async def test_every_request_is_counted_once_with_its_bytes_and_its_time(reactor: str) -> None:
    async with plugged(make_device(reactor), Setting("waist", "split", reactor)) as p:
        disk = BlkDriver(p.guest.queues[0])
        for n in range(10):
            await disk.write(8 * n, bytes(4096))
            await disk.read(8 * n, 512)
        await disk.write_zeroes(0, 16)
        stats = p.backend.stats()
        ops = stats.queues[0].ops
        assert {name: (op.requests, op.bytes) for name, op in ops.items() if op.requests} == {
            "read": (10, 5120),
            "write": (10, 40960),
            "write_zeroes": (1, 8192),
        }
        for op in ops.values():
            assert len(op.duration_buckets) == len(DURATION_BOUNDS) + 1
            assert sum(op.duration_buckets) == op.requests
            assert (op.duration_sum_seconds > 0) == (op.requests > 0)
        assert (stats.device, stats.type) == ("disk", "blk")
