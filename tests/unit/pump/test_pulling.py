"""Devices that pull chains themselves: what they do not need is found again, and reading without a copy."""

from __future__ import annotations

from typing import ClassVar

import pytest
import trio
from kit.front_end.frontend import Setting, every_ring, plugged

from virtio.device import Chain, Device, DeviceOptions, Queue
from virtio.testing import attach


class Hesitant(Device):
    """Puts every chain back once before it answers it with what it read."""

    virtio_id: ClassVar[int] = 42
    type_name = "hesitant"

    def __init__(self) -> None:
        super().__init__("hesitant", DeviceOptions(), 1, 64)
        self.heads: list[int] = []
        self.used_before: list[bool] = []

    async def run_queue(self, queue: Queue) -> None:
        self.used_before.append(queue.used_before)
        while True:
            chain = await queue.next_chain()
            self.heads.append(chain.head)
            queue.put_back(chain)
            with pytest.raises(ValueError, match="went back"):
                chain.read()
            chain = await queue.next_chain()
            self.heads.append(chain.head)
            self._answer(chain)
            chain.complete()

    def _answer(self, chain: Chain) -> None:
        room = memoryview(bytearray(8))
        while count := chain.read_into(room):
            chain.write(room[:count])


@every_ring
async def test_a_chain_that_was_put_back_is_the_next_one_again(ring: str) -> None:
    device = Hesitant()
    async with attach(device, ring=ring) as driver:  # type: ignore[arg-type]
        for number in range(200):
            question = b"%d" % number * 7
            assert await driver.request(0, question, writable=64) == question
    assert device.heads[::2] == device.heads[1::2]
    assert len(device.heads) == 400


@every_ring
async def test_a_queue_tells_whether_its_ring_was_used_before(ring: str) -> None:
    device = Hesitant()
    async with plugged(device, Setting("waist", ring)) as p:
        await p.guest.queues[0].request([b"one"], [8])
        base = await p.guest.link.stop(0)
        await p.guest.start_queue(0, base)
        await p.guest.queues[0].request([b"two"], [8])
        await trio.testing.wait_all_tasks_blocked()
    assert device.used_before == [False, True]
