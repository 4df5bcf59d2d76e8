"""Network interfaces and sockets behind an IOMMU: rings of several pages, whose translations come late."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from kit.front_end.frontend import Guest, every_ring
from kit.guest.blk import pattern
from kit.guest.vsock import VsockGuest, pair, vsock
from kit.ring.iommu import behind_iommu

from virtio.devices.net.device import Net, NetOptions
from virtio.testing.queue import GUARD

RECEIVE = 0
HEADER = bytes(12)
FRAMES = 40
MAC = bytes.fromhex("025e10000001")


def frame(number: int) -> bytes:
    return b"\xff" * 6 + MAC + b"\x08\x00" + pattern(1000 + number, number)


async def sent_until_it_is_back(guest: Guest, number: int) -> bytes:
    """A frame for a buffer whose translation is missing is lost: it is sent again, as a protocol would."""
    receive, transmit = guest.queues
    with trio.fail_after(GUARD):
        while True:
            await transmit.request([HEADER, frame(number)], [])
            with trio.move_on_after(0.05):
                (used,) = await receive.used()
                return b"".join(used.buffers)[len(HEADER) : used.written]


@every_ring
@pytest.mark.parametrize("reactor", ["io_uring", "epoll"])
async def test_frames_go_out_and_come_back(ring: str, reactor: str) -> None:
    device = Net("lan", NetOptions(frames="reflect"), 1, 1024)
    async with behind_iommu(reactor, ring, queues=2, device=device, queue_size=1024) as (p, iommu):
        receive = p.guest.queues[RECEIVE]
        for _ in range(2 * FRAMES):
            receive.driver.add([], [2000])
        receive.kick()
        for number in range(FRAMES):
            assert await sent_until_it_is_back(p.guest, number) == frame(number)
        assert len(iommu.asked) > 10
        await iommu.unmap_all()
        assert await sent_until_it_is_back(p.guest, 7) == frame(7)
        assert not iommu.broken


@every_ring
async def test_bytes_go_both_ways_between_guest_and_host(ring: str, tmp_path: Path) -> None:
    data = pattern(100_000, 3)
    async with behind_iommu("pump", ring, queues=3, device=vsock(tmp_path)) as (p, iommu):
        inside, outside = await pair(VsockGuest(p.guest), tmp_path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outside.send, data)
            assert await inside.receive(len(data)) == data
        await iommu.unmap_all()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inside.send, data)
            assert await outside.receive(len(data)) == data
        assert len(iommu.asked) > 10
        assert not iommu.broken
        outside.close()
