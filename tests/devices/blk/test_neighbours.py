"""Disks that share a worker: one whose storage hangs holds up its own requests, and nothing of another disk."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio
from kit.front_end.frontend import REACTORS, Guest
from kit.front_end.links import WaistLink
from kit.guest.blk import S_OK, T_FLUSH, T_IN, T_OUT, BlkDriver, header, make_disk, pattern
from kit.host.failing_storage import FailingImage, failing_image

from virtio.backend.backend import Backend
from virtio.devices.blk.device import Blk, BlkOptions
from virtio.native.worker import Worker

SIZE = 1 << 20
DEEP = 600  # more than a queue may have in flight, and many more than the kernel has threads for by default

every_reactor = pytest.mark.parametrize("reactor", REACTORS)


@contextlib.asynccontextmanager
async def served(disk: Blk, worker: Worker, queue_size: int = 64) -> AsyncIterator[BlkDriver]:
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(disk.close)
        backend = await stack.enter_async_context(Backend(disk, workers=[worker], queue_size_max=4096))
        guest = Guest(WaistLink(backend), memory_size=16 << 20)
        stack.callback(guest.close)
        await guest.start(queue_size=queue_size)
        yield BlkDriver(guest.queues[0])


@contextlib.asynccontextmanager
async def hanging_disk(worker: Worker, *options: str) -> AsyncIterator[tuple[FailingImage, BlkDriver]]:
    async with failing_image(SIZE, *options) as image:
        disk = await trio.to_thread.run_sync(partial(Blk, "hangs", BlkOptions(path=image.path), 1, 4096))
        async with served(disk, worker, 4096) as driver:
            try:
                yield image, driver
            finally:
                await image.hang()


async def use(neighbour: BlkDriver, seed: int) -> None:
    await neighbour.write(0, pattern(4096, seed))
    assert await neighbour.read(0, 4096) == pattern(4096, seed)
    await neighbour.flush()


@every_reactor
@pytest.mark.parametrize("options", [(), ("direct",)], ids=["cached", "direct"])
@pytest.mark.parametrize(("operation", "kind"), [("read", T_IN), ("write", T_OUT)])
async def test_a_disk_that_hangs_with_all_it_may_have_in_flight_delays_no_neighbour(
    reactor: str, options: tuple[str, ...], operation: str, kind: int, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    async with (
        Worker("shared", reactor=reactor) as worker,
        served(make_disk("memory", path), worker) as memory,
        served(make_disk("file", path), worker) as file,
        hanging_disk(worker, *options) as (image, hangs),
    ):
        await image.hang(operation)
        for place in range(DEEP):
            head = header(kind, place * 8 % 1024)
            hangs.submit([head, bytes(4096)] if kind == T_OUT else [head], [1] if kind == T_OUT else [4096, 1])
        tokens = [hangs.submit([header(T_FLUSH)], [1])]
        hangs.queue.kick()
        await image.hung(operation)
        for seed in range(3):
            await use(memory, seed)
            await use(file, seed)
        await image.hang()
        assert await hangs.statuses(*tokens) == [S_OK]
