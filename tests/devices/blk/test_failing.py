"""The block device on storage that fails: a promise is never given falsely, and every error is known by its errno."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
import trio
import trio.testing
from kit.front_end.frontend import Plugged, Setting, every_reactor, plugged
from kit.guest.blk import S_IOERR, S_OK, T_FLUSH, T_IN, T_OUT, BlkDriver, header, pattern
from kit.host.failing_storage import FailingImage, failing_image

from virtio.devices.blk.device import Blk, BlkOptions

SIZE = 1 << 20


def disk_on(path: Path, queues: int = 1, **options: object) -> Blk:
    return Blk("disk", BlkOptions(path=path, **options), queues, 64)


@asynccontextmanager
async def failing_disk(
    setting: Setting, *options: str, queues: int = 1, workers: int = 1, **device: object
) -> AsyncIterator[tuple[FailingImage, Plugged]]:
    async with failing_image(SIZE, *options) as image:
        disk = await trio.to_thread.run_sync(lambda: disk_on(image.path, queues, **device))
        async with plugged(disk, setting, workers=workers) as p:
            try:
                yield image, p
            finally:
                await image.hang()


# --- a write-back that failed ---


@every_reactor
async def test_after_a_write_back_that_failed_no_flush_of_any_queue_succeeds(setting: Setting) -> None:
    async with failing_disk(setting, "writeback", queues=2, workers=2) as (image, p):
        first, second = (BlkDriver(queue) for queue in p.guest.queues)
        await first.write(0, pattern(4096, 1))
        await image.fail(write=errno.EIO)
        assert (await first.request(T_FLUSH)).status == S_IOERR
        await image.fail()  # the storage works again, and the kernel has nothing left to write
        for disk in (second, first, second, first):
            assert (await disk.request(T_FLUSH)).status == S_IOERR
        await first.write(8, pattern(4096, 2))
        assert (await first.request(T_FLUSH)).status == S_IOERR
        assert await second.read(8, 4096) == pattern(4096, 2)


@every_reactor
async def test_a_flush_that_failed_fails_every_later_one(setting: Setting) -> None:
    async with failing_disk(setting) as (image, p):
        disk = BlkDriver(p.guest.queues[0])
        await disk.flush()
        await image.fail(fsync=errno.EIO)
        assert (await disk.request(T_FLUSH)).status == S_IOERR
        await image.fail()
        assert (await disk.request(T_FLUSH)).status == S_IOERR
        await p.guest.link.reset()  # another driver on the same open file
        p.guest.forget_queues()
        await p.guest.start()
        assert (await BlkDriver(p.guest.queues[0]).request(T_FLUSH)).status == S_IOERR


@every_reactor
async def test_flushes_at_once_on_two_workers_all_hear_of_a_write_back_that_failed(setting: Setting) -> None:
    async with failing_disk(setting, "writeback", queues=2, workers=2) as (image, p):
        disks = [BlkDriver(queue) for queue in p.guest.queues]
        await disks[0].write(0, pattern(4096, 1))
        await image.fail(write=errno.EIO)
        tokens = [(disk, disk.submit([header(T_FLUSH)], [1])) for _ in range(8) for disk in disks]
        for disk in disks:
            disk.queue.kick()
        assert [(await disk.answer(token)).status for disk, token in tokens] == [S_IOERR] * len(tokens)


@every_reactor
async def test_flushes_that_wait_for_one_share_the_next(setting: Setting) -> None:
    async with failing_disk(setting) as (image, p):
        disk = BlkDriver(p.guest.queues[0])
        await image.hang("fsync")
        first = disk.submit([header(T_FLUSH)], [1])
        disk.queue.kick()
        await image.hung("fsync")
        others = [disk.submit([header(T_FLUSH)], [1]) for _ in range(7)]
        await disk.read(0, 4096)  # served after them, so they were taken
        await image.hang()
        assert await disk.statuses(first, *others) == [S_OK] * 8
        assert (await image.counts())["fsync"] == 2


# --- what is reported ---


@every_reactor
async def test_errors_are_counted_by_operation_and_errno(setting: Setting) -> None:
    async with failing_disk(setting, "direct") as (image, p):
        disk = BlkDriver(p.guest.queues[0])
        await image.fail(write=errno.ENOSPC, read=errno.EIO)
        for _ in range(3):
            assert (await disk.request(T_OUT, 0, bytes(4096))).status == S_IOERR
        assert (await disk.request(T_IN, 0, room=4096)).status == S_IOERR
        await image.fail()
        await image.resize(SIZE // 2)
        assert (await disk.request(T_IN, SIZE // 2 // 512, room=4096)).status == S_IOERR
        await disk.flush()
        storage = p.backend.stats().storage
        assert storage is not None
        assert {(each.op, each.errno): each.count for each in storage.errors} == {
            ("write", "ENOSPC"): 3,
            ("read", "EIO"): 1,
            ("read", "ENDED"): 1,
        }
        assert storage.flush_failed is None


async def test_what_a_driver_may_not_ask_for_is_no_error_of_the_storage(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    async with plugged(disk_on(path), Setting("waist", "split", "io_uring")) as p:
        disk = BlkDriver(p.guest.queues[0])
        assert (await disk.request(T_IN, SIZE // 512, room=512)).status == S_IOERR
        storage = p.backend.stats().storage
        assert storage is not None
        assert storage.errors == ()


@every_reactor
async def test_a_failed_flush_is_logged_with_its_errno_and_what_follows(setting: Setting) -> None:
    with structlog.testing.capture_logs() as logs:
        async with failing_disk(setting) as (image, p):
            await image.fail(fsync=errno.EDQUOT)
            assert (await BlkDriver(p.guest.queues[0]).request(T_FLUSH)).status == S_IOERR
            await trio.testing.wait_all_tasks_blocked(0.01)
            storage = p.backend.stats().storage
    assert storage is not None
    assert storage.flush_failed == "EDQUOT"
    told = [entry for entry in logs if entry["log_level"] in ("error", "critical")]
    assert [(entry["event"].split(":")[0], entry["errno"]) for entry in told] == [
        ("storage failed", "EDQUOT"),
        ("what the guest has written may be lost", "EDQUOT"),
    ]
    assert [told[0][key] for key in ("device", "op", "times")] == ["disk", "flush", 1]


@every_reactor
async def test_any_number_of_errors_of_one_kind_is_one_line_a_minute(setting: Setting) -> None:
    async with failing_disk(setting, "direct") as (image, p):
        disk = BlkDriver(p.guest.queues[0])
        await image.fail(write=errno.ENOSPC)
        with structlog.testing.capture_logs() as logs:
            for _ in range(64):
                assert (await disk.request(T_OUT, 0, bytes(512))).status == S_IOERR
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert [entry["event"] for entry in logs if "errno" in entry] == ["storage failed"]
