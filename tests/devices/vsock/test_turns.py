"""What a guest is sent takes turns with everything else that the event loop does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import trio
from kit.guest.vsock import RW, VsockGuest, pair, vsock

from virtio.devices.vsock.device import Vsock
from virtio.native import pump
from virtio.native.chain import Chain
from virtio.native.pump import TURN_NS
from virtio.testing import attach

COST_NS = TURN_NS // 4
PACKETS = 40


async def test_packets_for_a_guest_end_their_turn_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, others, sent = 0, 0, Counter[int]()

    class Slow(Vsock):
        def _fill_one(self, chain: Chain) -> bool:
            nonlocal now
            filled = super()._fill_one(chain)
            if filled:
                now += COST_NS
                sent[others] += 1
            return filled

    async def another_task() -> None:
        nonlocal others
        while True:
            await trio.lowlevel.checkpoint()
            others += 1

    monkeypatch.setattr(pump, "now_ns", lambda: now)
    monkeypatch.setattr(pump, "TURN_NS", TURN_NS)
    plain = vsock(tmp_path)
    options = plain.options
    plain.close()
    device = Slow("vsock", options, 1, 64)
    async with attach(device) as driver, trio.open_nursery() as nursery:
        guest = VsockGuest(driver, buffers=PACKETS + 8, room=1024)
        inside, outside = await pair(guest, tmp_path)
        sent.clear()
        nursery.start_soon(another_task)
        await outside.send(bytes(PACKETS * 1024))
        received = 0
        while received < PACKETS * 1024:
            packet = await inside.hear()
            assert packet.op == RW
            received += packet.len
        nursery.cancel_scope.cancel()
        outside.close()
    assert sent.total() >= PACKETS
    assert max(sent.values()) <= TURN_NS // COST_NS
