"""Front-ends that send their messages in other orders than QEMU, over a real socket and with a guest's memory.

What is shown is that requests are served, each once: the session's own rules are in test_vhost_user_order.py.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import kit.front_end.vhost_user_wire as wire
import pytest
import trio.testing
from kit.front_end.frontend import NEEDS_RESET, PACKED_START, Setting, every_ring, plugged
from kit.front_end.links import SocketLink
from kit.front_end.steps import Teller, front_end_of, prepare
from kit.front_end.vhost_user_wire import u64
from kit.ring.driven import Scripted, add_request, check_it_works, every_driven, make_device
from structlog.testing import capture_logs

from virtio.testing.queue import GuestQueue


def over_socket(driven: str, ring: str = "split") -> Setting:
    return Setting("socket", ring, "" if driven == "pump" else driven)


ORDERS = {
    "as QEMU": "features memory num base addr call kick enable",
    "enabled first": "enable features memory num base addr kick call",
    "kicked first": "kick enable addr num base memory call features",
    "call before features": "call num addr base kick memory enable features",
    "memory last": "features num base addr kick call enable memory",
    "base last": "features memory num addr kick call enable base",
    "features last, kicked first": "kick num base addr call memory enable features",
}


@every_driven
@every_ring
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
async def test_requests_are_served_in_whatever_order_a_ring_was_set_up(driven: str, ring: str, order: str) -> None:
    async with plugged(make_device(driven), over_socket(driven, ring), start=False) as p:
        teller = await prepare(p)
        steps: dict[str, Callable[[], Awaitable[None]]] = {name: getattr(teller, name) for name in order.split()}
        for _ in range(2):
            for step in steps.values():
                await step()
            await check_it_works(teller.queue)
            base = await p.guest.link.stop(0)
            assert base == teller.queue.driver.base
            await p.guest.link.reset()


async def bind(teller: Teller) -> None:
    """User-mode Linux, when a driver is bound: to rings that are started and, since the last was unbound, disabled."""
    guest = teller.guest
    await teller.features()
    memory = guest.memory
    room = wire.mem_table(wire.region(memory.gpa, memory.size, memory.uva), count=1) + bytes(32)
    await teller.do(5, room, memory.fd)
    for step in (teller.call, teller.num, teller.base, teller.addr, teller.kick, teller.enable):
        await step()


@every_driven
@every_ring
async def test_a_driver_is_unbound_and_bound_again_and_only_enable_tells_of_it(driven: str, ring: str) -> None:
    async with plugged(make_device(driven), over_socket(driven, ring), start=False) as p:
        teller = await prepare(p)
        for turn in range(4):
            await bind(teller)
            await check_it_works(teller.queue)
            await teller.enable(on=False)
            p.guest.queues.clear()
            p.guest.add_queue(16 if turn % 2 else 32)
            os.close(teller.queue.call_fd)
            teller.queue = p.guest.queues[0]
        assert not await p.guest.link.status() & NEEDS_RESET


async def test_a_python_device_is_reset_for_the_driver_that_is_bound_and_not_for_one_that_goes_on() -> None:
    class Counting(Scripted):
        resets = 0

        def reset(self) -> None:
            self.resets += 1

    device = Counting(queues=2)
    async with plugged(device, Setting("socket", "split"), start=False) as p:
        tellers = [await prepare(p), Teller(p.guest, p.guest.add_queue(16))]
        for turn in range(3):
            await tellers[0].features()
            await tellers[0].memory()
            for teller in tellers:
                for step in (teller.call, teller.num, teller.base, teller.addr):
                    await step()
            for teller in tellers:
                await teller.kick()
                await teller.enable()
            assert device.resets == turn
            for on in (True, False, True, False):
                for teller in tellers:
                    await teller.enable(on)
                if on:
                    for teller in tellers:
                        await teller.queue.request([b"x"], [8])
            assert device.resets == turn
            p.guest.forget_queues()
            tellers = [Teller(p.guest, p.guest.add_queue(16)) for _ in range(2)]


@every_driven
@every_ring
async def test_a_ring_that_is_moved_while_it_runs_is_drained_first(driven: str, ring: str) -> None:
    async with plugged(make_device(driven), over_socket(driven, ring), start=False) as p:
        teller = await prepare(p, size=64)
        await teller.features()
        await teller.memory()
        await teller.everything()
        for size in (32, 128, 32):
            old = teller.queue
            for _ in range(5):
                add_request(old)
            old.ring()
            teller.queue = new = p.guest.add_queue(size)
            new.index = 0
            for step in (teller.num, teller.base, teller.addr):
                await step()
            old.driver.used()
            for _ in range(3):
                add_request(old)
            old.ring()
            for step in (teller.call, teller.err, teller.kick):
                await step()
            await check_it_works(new)
            assert not old.driver.has_used()  # nothing was written to the old ring any more


@every_driven
@every_ring
@pytest.mark.parametrize("rest", ["stopped", "disabled"])
async def test_memory_may_go_and_come_under_a_ring_at_rest(driven: str, ring: str, rest: str) -> None:
    async with plugged(make_device(driven), over_socket(driven, ring), start=False) as p:
        teller = await prepare(p)
        memory = p.guest.memory
        region = wire.single_region(memory.gpa, memory.size, memory.uva)
        await teller.features()
        await teller.do(37, region, memory.fd)
        await teller.everything()
        with capture_logs() as logs:
            for _ in range(3):
                await check_it_works(teller.queue)
                if rest == "stopped":
                    await p.guest.link.stop(0)
                else:
                    await teller.enable(on=False)
                await teller.do(38, region)
                await teller.do(37, region, memory.fd)
                if rest == "stopped":
                    await teller.everything()
                else:
                    await teller.enable()
            await check_it_works(teller.queue)
        assert not await p.guest.link.status() & NEEDS_RESET
        assert not [line for line in logs if line["log_level"] == "warning"]


@every_driven
@every_ring
async def test_memory_that_goes_under_a_ring_that_runs_costs_that_queue_until_it_is_set_up_again(
    driven: str, ring: str
) -> None:
    async with plugged(make_device(driven), over_socket(driven, ring), start=False) as p:
        teller = await prepare(p)
        memory = p.guest.memory
        region = wire.single_region(memory.gpa, memory.size, memory.uva)
        await teller.features()
        await teller.do(37, region, memory.fd)
        await teller.everything()
        for _ in range(3):
            await check_it_works(teller.queue)
            for _ in range(4):
                add_request(teller.queue)
            teller.queue.ring()
            await teller.do(38, region)
            add_request(teller.queue)
            teller.queue.ring()
            await teller.queue.broken()
            await teller.do(37, region, memory.fd)
            await p.guest.link.stop(0)
            p.guest.forget_queues()
            teller.queue = p.guest.add_queue(16)
            await teller.everything()


@every_driven
@every_ring
async def test_a_device_that_is_reset_thrice_finds_its_memory(driven: str, ring: str) -> None:
    async with plugged(make_device(driven), over_socket(driven, ring), start=False) as p:
        teller = await prepare(p)
        await teller.memory()
        for resets in (1, 2, 3):
            await teller.features()
            await teller.everything()
            await check_it_works(teller.queue)
            for _ in range(resets):
                await p.guest.link.reset()
            p.guest.forget_queues()
            teller.queue = p.guest.add_queue(16)


@every_driven
@every_ring
async def test_features_may_change_while_a_ring_runs_and_no_request_is_lost(driven: str, ring: str) -> None:
    async with plugged(make_device(driven), over_socket(driven, ring), start=False) as p:
        teller = await prepare(p, size=64)
        await teller.features()
        await teller.memory()
        await teller.everything()
        indirect = 1 << 28
        for turn in range(6):
            for _ in range(10):
                add_request(teller.queue)
            teller.queue.ring()
            without = indirect if turn % 2 else 0
            await teller.do(2, u64(p.guest.features & ~without | wire.F_PROTOCOL_FEATURES))
            assert len(await teller.queue.used(10)) == 10


# --- where a ring begins ---


class Ordered(Scripted):
    answers_in_order = True


async def use(queue: GuestQueue, *texts: bytes) -> None:
    for text in texts:
        await queue.request([text], [8])


@pytest.mark.parametrize("device_class", [Scripted, Ordered])
async def test_a_back_end_that_lost_its_front_end_repeats_nothing_when_the_base_is_given_as_0(
    device_class: type[Scripted],
) -> None:
    """DPDK's virtio-user in server mode: another connection, no SET_OWNER, and the same rings from base 0."""
    device = device_class()
    async with plugged(device, Setting("socket", "split"), start=False) as p:
        queue = p.guest.add_queue(16)
        sent: list[bytes] = []
        for connection in range(3):
            p.guest.features = 0
            teller = Teller(p.guest, queue)
            await teller.enable(on=False)
            assert await p.guest.link.stop(0) == 0
            await teller.call()
            await teller.features()
            await teller.memory()
            waiting = b"waited %d" % connection
            queue.driver.add([waiting], [16])
            await teller.num()
            texts = [b"%d.%d" % (connection, n) for n in range(30)]
            with capture_logs() as logs:
                await teller.base(0)
                for step in (teller.addr, teller.kick, teller.enable):
                    await step()
                await queue.used()
                await use(queue, *texts)
                await trio.testing.wait_all_tasks_blocked()
            sent += [waiting, *texts]
            assert device.seen == sent  # each once
            moved = [(line["base"], line["used"]) for line in logs if "used index counts" in line["event"]]
            assert moved == ([(0, 31 * connection)] if connection else [])
            front_end_of(p.guest).close()
            p.guest.link = await SocketLink.connect(p.path or pytest.fail("no socket"))


@pytest.mark.parametrize("device_class", [Scripted, Ordered])
async def test_a_base_ahead_of_the_used_index_is_believed_unless_the_device_answers_in_order(
    device_class: type[Scripted],
) -> None:
    device = device_class()
    async with plugged(device, Setting("socket", "split"), start=False) as p:
        teller = await prepare(p)
        await teller.features()
        await teller.memory()
        await teller.everything()
        await use(teller.queue, b"a")
        await p.guest.link.stop(0)
        for text in (b"b", b"c", b"d"):
            teller.queue.driver.add([text], [8])
        await teller.num()
        await teller.base(2)  # "b" is with another back-end
        for step in (teller.addr, teller.call, teller.kick):
            await step()
        expected = [b"a", b"b", b"c", b"d"] if device_class is Ordered else [b"a", b"c", b"d"]
        await teller.queue.used(len(expected) - 1)
        assert device.seen == expected


async def test_a_packed_ring_begins_where_its_base_says() -> None:
    device = Ordered()
    async with plugged(device, Setting("socket", "packed"), start=False) as p:
        teller = await prepare(p)
        await teller.features()
        await teller.memory()
        await teller.everything()
        await use(teller.queue, b"a", b"b")
        assert await p.guest.link.stop(0) == teller.queue.driver.base != PACKED_START
        await teller.num()
        await teller.base(teller.queue.driver.base & 0xFFFF)  # DPDK: the avail position alone
        for step in (teller.addr, teller.call, teller.kick):
            await step()
        await use(teller.queue, b"c")
        assert device.seen == [b"a", b"b", b"c"]
