"""The entropy device (5.4): every buffer comes back full of bytes nobody could have known."""

from __future__ import annotations

import pytest
from kit.front_end.frontend import F_EVENT_IDX, Setting, every_python_setting, plugged

from virtio.device import DeviceOptions
from virtio.devices.rng import MAX_BYTES, Rng


def rng() -> Rng:
    return Rng("entropy", DeviceOptions(), 1, 64)


@every_python_setting
async def test_a_buffer_is_filled_and_never_the_same_twice(setting: Setting) -> None:
    async with plugged(rng(), setting) as p:
        queue = p.guest.queues[0]
        seen = set()
        for _ in range(20):
            used = await queue.request([], [64])
            assert used.written == 64
            seen.add(used.buffers[0])
        assert len(seen) == 20
        assert sum(len(set(each)) for each in seen) > 20 * 40  # 64 random bytes have about 57 values
        assert p.op("read") == (20, 0)


@every_python_setting
@pytest.mark.parametrize("pieces", [[1], [1] * 30, [3, 4096, 1, 500], [MAX_BYTES]], ids=str)
async def test_pieces_of_any_size_are_filled_to_the_last_byte(setting: Setting, pieces: list[int]) -> None:
    async with plugged(rng(), setting) as p:
        seen = [bytearray(size) for size in pieces]
        for _ in range(12):  # every byte is something else than 0 sooner or later
            used = await p.guest.queues[0].request([], pieces, indirect=len(pieces) > 1)
            assert used.written == sum(pieces)
            for collected, piece in zip(seen, used.buffers, strict=True):
                at = int.from_bytes(collected, "little") | int.from_bytes(piece, "little")
                collected[:] = at.to_bytes(len(collected), "little")
        assert all(0 not in collected for collected in seen)


@every_python_setting
async def test_one_request_gets_no_more_than_its_share(setting: Setting) -> None:
    async with plugged(rng(), setting) as p:
        used = await p.guest.queues[0].request([], [MAX_BYTES, 4096])
        assert used.written == MAX_BYTES
        assert used.buffers[1] == bytes(4096)


@every_python_setting
@pytest.mark.parametrize("without", [0, F_EVENT_IDX], ids=["event_idx", "flags"])
async def test_a_ring_full_of_buffers_comes_back_with_few_interrupts(setting: Setting, without: int) -> None:
    async with plugged(rng(), setting, without=without) as p:
        queue = p.guest.queues[0]
        queue.driver.want_interrupt_after(64)
        for _ in range(64):
            queue.driver.add([], [16])
        queue.kick()
        back = await queue.used(64)
        assert [each.written for each in back] == [16] * 64
        stats = p.backend.stats().queues[0]
        assert stats.ops["read"].requests == 64
        assert stats.notifications_sent + stats.notifications_suppressed <= 8


@every_python_setting
async def test_a_buffer_that_cannot_be_written_comes_back_empty_and_counts_as_an_error(setting: Setting) -> None:
    async with plugged(rng(), setting) as p:
        used = await p.guest.queues[0].request([b"please"], [])
        assert (used.written, used.buffers) == (0, [])
        assert p.op("read") == (1, 1)
        assert (await p.guest.queues[0].request([b"please"], [8])).written == 8
        assert p.op("read") == (2, 1)


@every_python_setting
async def test_it_has_no_config_space_and_one_queue(setting: Setting) -> None:
    async with plugged(rng(), setting) as p:
        assert await p.guest.link.queue_count() == 1
        assert not p.backend.has_config_space
        assert p.backend.read_config(0, 8) == bytes(8)
