"""What a back end has to tell its transport: in order, and bounded however long nobody asks."""

from __future__ import annotations

import trio
import trio.testing
from kit.front_end.frontend import Setting, plugged
from kit.ring.driven import Scripted

from virtio.backend.events import Events
from virtio.errors import GuestError
from virtio.waist import ConfigChanged, IotlbMiss, Permission, QueueBroken


async def test_a_device_that_changes_its_configuration_without_end_leaves_one_event() -> None:
    device = Scripted()
    async with plugged(device, Setting("waist", "split")) as p:
        for _ in range(100_000):
            device.config_changed()
        assert await p.backend.next_event() == ConfigChanged()
        with trio.move_on_after(0) as waiting:
            await p.backend.next_event()
        assert waiting.cancelled_caught
        device.config_changed()
        assert await p.backend.next_event() == ConfigChanged()


async def test_events_come_in_the_order_in_which_each_was_first_added() -> None:
    events = Events()
    broken, miss = QueueBroken(1, GuestError("x")), IotlbMiss(0x1000, Permission.READ)
    for event in (miss, ConfigChanged(), broken, miss, ConfigChanged()):
        events.add(event)
    assert len(events) == 3
    assert [await events.next() for _ in range(3)] == [miss, ConfigChanged(), broken]
    assert len(events) == 0


async def test_a_wait_that_was_cancelled_takes_no_event_along() -> None:
    events = Events()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(events.next)
        await trio.testing.wait_all_tasks_blocked()
        events.add(ConfigChanged())
        nursery.cancel_scope.cancel()
    assert await events.next() == ConfigChanged()


async def test_what_is_no_more_is_forgotten() -> None:
    events = Events()
    events.add(ConfigChanged())
    events.clear()
    events.add(QueueBroken(0, error := GuestError("y")))
    assert await events.next() == QueueBroken(0, error)
