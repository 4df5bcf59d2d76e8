"""The block device after a flush failed: how its operator continues, and what stays known. An image that was cut."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
import trio.testing
from devices.blk.test_failing import disk_on, failing_disk
from kit.front_end.frontend import Plugged, Setting, every_reactor, plugged
from kit.guest.blk import S_IOERR, T_FLUSH, T_IN, BlkDriver, pattern
from kit.host.failing_storage import FailingImage

from daemon.cli import main
from daemon.running.control import serve_control
from daemon.running.disks import Disks
from daemon.running.files import Files
from daemon.state import DaemonState
from virtio.capabilities import DiskStorage
from virtio.device import DeviceOptions
from virtio.devices.blk.device import Blk, BlkOptions
from virtio.devices.rng import Rng
from virtio.errors import HostError
from virtio.native.stats import Storage, StorageErrors

SIZE = 1 << 20
ONE = Setting("waist", "split", "io_uring")
LOST = "what the guest has written may be lost"


def blk_of(p: Plugged) -> DiskStorage:
    assert p.device.disk is not None
    return p.device.disk


async def reopen(p: Plugged) -> None:
    await trio.to_thread.run_sync(blk_of(p).reopening())


def storage_of(p: Plugged) -> Storage:
    storage = p.backend.stats().storage
    assert storage is not None
    return storage


async def lose_a_flush(image: FailingImage, disk: BlkDriver) -> None:
    await disk.write(0, pattern(4096, 1))
    await image.fail(write=errno.EIO)
    assert (await disk.request(T_FLUSH)).status == S_IOERR


@every_reactor
async def test_after_the_image_was_opened_again_flushes_of_every_queue_succeed(setting: Setting) -> None:
    async with failing_disk(setting, "writeback", queues=2, workers=2) as (image, p):
        disks = [BlkDriver(queue) for queue in p.guest.queues]
        await lose_a_flush(image, disks[0])
        await image.fail()
        assert (await disks[1].request(T_FLUSH)).status == S_IOERR
        await reopen(p)
        for number, disk in enumerate(disks):
            await disk.write(8 * number, pattern(4096, number))
            await disk.flush()
            assert await disk.read(8 * number, 4096) == pattern(4096, number)
        assert (storage_of(p).flush_failed, storage_of(p).reopened) == (None, 1)


@every_reactor
async def test_a_flush_that_fails_after_the_image_was_opened_again_fails_every_later_one(setting: Setting) -> None:
    async with failing_disk(setting, "writeback", queues=2, workers=2) as (image, p):
        disks = [BlkDriver(queue) for queue in p.guest.queues]
        for number in range(3):
            await lose_a_flush(image, disks[number % 2])
            await image.fail()
            for disk in disks:
                assert (await disk.request(T_FLUSH)).status == S_IOERR
            await reopen(p)
            for disk in disks:
                await disk.flush()
        assert storage_of(p).reopened == 3


async def test_storage_that_still_fails_is_not_opened_again() -> None:
    async with failing_disk(ONE) as (image, p):
        disk = BlkDriver(p.guest.queues[0])
        await image.fail(fsync=errno.EIO)
        assert (await disk.request(T_FLUSH)).status == S_IOERR
        with pytest.raises(HostError, match="not opened again, its storage still fails: Input/output error"):
            await reopen(p)
        await image.fail()
        assert (await disk.request(T_FLUSH)).status == S_IOERR
        assert (storage_of(p).flush_failed, storage_of(p).reopened) == ("EIO", 0)


async def test_a_file_that_took_the_place_of_the_image_is_not_served(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    async with plugged(disk_on(path), ONE) as p:
        await trio.to_thread.run_sync(path.rename, tmp_path / "old.img")
        with pytest.raises(HostError, match="not opened again: No such file"):
            await reopen(p)
        path.write_bytes(b"\1" * SIZE)
        with pytest.raises(HostError, match="is another file than the one that is being served"):
            await reopen(p)
        assert await BlkDriver(p.guest.queues[0]).read(0, 512) == bytes(512)


async def test_a_disk_that_is_closed_while_its_image_is_opened_again_touches_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    disk = disk_on(path)
    step = disk.reopening()
    disk.close()
    await trio.to_thread.run_sync(step)
    again = disk_on(path)  # its lock is gone with it
    again.close()


async def test_what_was_lost_stays_in_the_log_and_is_said_again_when_the_image_is_opened_again() -> None:
    with structlog.testing.capture_logs() as logs:
        async with failing_disk(ONE) as (image, p):
            await image.fail(fsync=errno.EIO)
            assert (await BlkDriver(p.guest.queues[0]).request(T_FLUSH)).status == S_IOERR
            await image.fail()
            await trio.testing.wait_all_tasks_blocked(0.01)
            await reopen(p)
            await trio.testing.wait_all_tasks_blocked(0.01)
    told = [entry["event"].split(":")[0] for entry in logs if entry.get("errno") == "EIO"]
    assert told == ["storage failed", LOST, "the image was opened again and flushes may succeed"]


async def test_a_device_that_was_tried_again_still_knows_what_the_one_before_had_lost(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    disk = disk_on(path)
    disk.inherit_storage(Storage((StorageErrors("flush", "EIO", 2),), "EIO", 1))
    with structlog.testing.capture_logs() as logs:
        async with plugged(disk, ONE) as p:
            await BlkDriver(p.guest.queues[0]).flush()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert storage_of(p) == Storage((StorageErrors("flush", "EIO", 2),), None, 2)
    assert [entry["errno"] for entry in logs if "what was lost before stays lost" in entry["event"]] == ["EIO"]


# --- the command ---


async def test_the_command_opens_an_image_again_and_refuses_what_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = tmp_path / "ctl.sock"
    memory = Blk("ram", BlkOptions(backend="memory", size=SIZE), 1, 64)
    entropy = Rng("entropy", DeviceOptions(), 1, 64)
    async with failing_disk(ONE) as (image, p), trio.open_nursery() as nursery:
        disks = Disks({"disk": p.device, "ram": memory, "entropy": entropy}, Files())
        await nursery.start(serve_control, control, lambda: DaemonState((), ()), None, None, disks)

        async def run(*arguments: str) -> int:
            return await trio.to_thread.run_sync(main, [*arguments, "--control", str(control)])

        await image.fail(fsync=errno.EIO)
        assert (await BlkDriver(p.guest.queues[0]).request(T_FLUSH)).status == S_IOERR
        assert await run("reopen", "disk") == 1
        assert "its storage still fails: Input/output error" in capsys.readouterr().err
        await image.fail()
        assert await run("reopen", "disk") == 0
        assert "disk: opened again" in capsys.readouterr().out
        await BlkDriver(p.guest.queues[0]).flush()
        for name, reason in (("ram", "has no image"), ("entropy", "has no storage"), ("none", "no device 'none'")):
            assert await run("reopen", name) == 1
            assert reason in capsys.readouterr().err
        nursery.cancel_scope.cancel()
    memory.close()


async def test_storage_that_hangs_while_it_is_opened_again_holds_up_no_other_command(
    tmp_path: Path,
) -> None:
    async with failing_disk(ONE) as (image, p):
        disks = Disks({"disk": p.device}, Files(seconds=0.05))
        await image.hang("fsync")
        for _ in range(2):
            answer = await disks.answer("reopen", {"device": "disk"})
            assert (answer["ok"], "has not answered" in answer["error"]) == (False, True)
        await image.hang()


@pytest.mark.parametrize("request_", [{}, {"device": 1}, {"device": None}], ids=str)
async def test_a_command_without_a_name_is_answered_with_an_example(request_: Mapping[str, Any]) -> None:
    answer = await Disks({}, Files()).answer("reopen", request_)
    assert not answer["ok"]
    assert json.dumps({"command": "reopen", "device": "disk"}) in answer["error"]


# --- an image that was cut ---


@every_reactor
async def test_an_image_that_is_cut_while_it_is_served_is_one_line_with_both_sizes(
    setting: Setting, tmp_path: Path
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    with structlog.testing.capture_logs() as logs:
        async with plugged(disk_on(path), setting) as p:
            disk = BlkDriver(p.guest.queues[0])
            await trio.to_thread.run_sync(partial(truncate, path, SIZE // 4))
            for sector in (SIZE // 512 - 8, SIZE // 1024, SIZE // 2048):
                assert (await disk.request(T_IN, sector, room=4096)).status == S_IOERR
            with trio.fail_after(30):
                while not [entry for entry in logs if "bytes_now" in entry]:
                    await trio.testing.wait_all_tasks_blocked(0.01)
    (line,) = [entry for entry in logs if entry.get("errno") == "ENDED"]
    assert "the image is shorter than the disk" in line["event"]
    assert (line["device"], line["bytes_before"], line["bytes_now"]) == ("disk", SIZE, SIZE // 4)


def truncate(path: Path, size: int) -> None:
    with path.open("rb+") as file:
        file.truncate(size)


async def test_an_image_that_a_reload_finds_smaller_is_one_line_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    with structlog.testing.capture_logs() as logs:
        async with plugged(disk_on(path), ONE) as p:
            truncate(path, SIZE // 2)
            p.device.examine()
            assert p.device.refresh()
    (line,) = [entry for entry in logs if "bytes_now" in entry]
    assert (line["device"], line["bytes_before"], line["bytes_now"]) == ("disk", SIZE, SIZE // 2)
