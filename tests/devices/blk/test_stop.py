"""The block device with on_error = "stop": what the storage fails is kept, and tried again until it succeeds."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
import trio
import trio.lowlevel
import trio.testing
from devices.blk.test_failing import disk_on, failing_disk
from kit.front_end.frontend import Plugged, Setting, every_native_setting, every_reactor, plugged
from kit.guest.blk import (
    S_IOERR,
    S_OK,
    SHARED_MEMORY,
    T_DISCARD,
    T_FLUSH,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    Answer,
    BlkDriver,
    header,
    pattern,
    segment,
)

from daemon.cli import main
from daemon.commands.show_table import render
from daemon.metrics.storage import storage_metrics
from daemon.running.control import respond, serve_control
from daemon.running.disks import Disks
from daemon.running.files import Files
from daemon.state import DaemonState, DeviceState
from virtio.capabilities import DiskStorage
from virtio.devices.blk import storage_watch
from virtio.devices.blk.device import BlkOptions
from virtio.native.stats import BackendStats, Storage, StorageErrors

SIZE = 1 << 20
ONE = Setting("waist", "split", "io_uring")
BLOCK = 4096


@pytest.fixture(autouse=True)
def only_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disks do not try again by themselves, unless a test wants it."""
    monkeypatch.setattr(storage_watch, "RETRY_SECONDS_MIN", 3600.0)


def storage_of(p: Plugged) -> Storage:
    storage = p.backend.stats().storage
    assert storage is not None
    return storage


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():
            await trio.lowlevel.checkpoint()


def blk_of(p: Plugged) -> DiskStorage:
    assert p.device.disk is not None
    return p.device.disk


def retry(p: Plugged) -> None:
    assert blk_of(p).retry_storage()


REQUESTS = {
    "read": (T_IN, 8, b"", BLOCK),
    "write": (T_OUT, 8, pattern(BLOCK, 3), 0),
    "discard": (T_DISCARD, 0, segment(8, 8), 0),
    "write_zeroes": (T_WRITE_ZEROES, 0, segment(8, 8), 0),
}


@every_reactor
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_that_fails_is_kept_and_answered_once_when_it_succeeds(
    setting: Setting, name: str, error: int
) -> None:
    kind, sector, data, room = REQUESTS[name]
    async with failing_disk(setting, "direct", on_error="stop") as (image, p):
        disk = BlkDriver(p.guest.queues[0])
        await image.fail(read=error, write=error, fallocate=error)
        pieces = [header(kind, sector), *([data] if data else [])]
        token = disk.submit(pieces, [*([room] if room else []), 1])
        disk.queue.kick()
        for attempt in range(3):
            await until(lambda: storage_of(p).kept == 1)
            assert storage_of(p).stopped == f"{name} {errno.errorcode[error]}"
            assert storage_of(p).retries == attempt
            retry(p)
            await until(lambda: sum(each.count for each in storage_of(p).errors) == attempt + 2)  # noqa: B023
        await until(lambda: storage_of(p).kept == 1)
        await image.fail()
        retry(p)
        assert (await disk.answer(token)).status == S_OK
        await until(lambda: storage_of(p).stopped is None)
        assert p.op(name) == (1, 0)
        if name == "write":
            assert await disk.read(8, BLOCK) == data
        assert [*disk.queue.driver.used()] == []


@every_native_setting
async def test_what_comes_after_a_failed_request_waits_and_is_served_in_the_end(setting: Setting) -> None:
    async with failing_disk(setting, "direct", on_error="stop", queues=2, workers=2) as (image, p):
        first, second = (BlkDriver(queue) for queue in p.guest.queues)
        await image.fail(write=errno.ENOSPC)
        failed = first.submit([header(T_OUT, 0), pattern(BLOCK, 1)], [1])
        first.queue.kick()
        await until(lambda: storage_of(p).stopped == "write ENOSPC")
        reads = [disk.submit([header(T_IN, 0)], [BLOCK, 1]) for disk in (first, second) for _ in range(4)]
        flush = second.submit([header(T_FLUSH)], [1])
        first.queue.kick()
        second.queue.kick()
        await until(lambda: storage_of(p).kept == 10)
        assert p.op("read", 0) == p.op("read", 1) == (0, 0)
        await image.fail()
        retry(p)
        assert (await first.answer(failed)).status == S_OK
        for disk, tokens in ((first, reads[:4]), (second, [*reads[4:], flush])):
            assert [(await disk.answer(token)).status for token in tokens] == [S_OK] * len(tokens)
        await until(lambda: storage_of(p).kept == 0)
        assert await second.read(0, BLOCK) == pattern(BLOCK, 1)


@every_reactor
async def test_more_requests_than_a_queue_may_have_in_flight_wait_too(setting: Setting) -> None:
    async with failing_disk(setting, "direct", on_error="stop") as (image, p):
        disk = BlkDriver(p.guest.queues[0])
        await image.fail(write=errno.ENOSPC)
        for number in range(3):
            tokens = [disk.submit([header(T_OUT, 8 * n), pattern(BLOCK, n + number)], [1]) for n in range(20)]
            disk.queue.kick()
            await until(lambda: storage_of(p).kept == 20)
            await image.fail()
            retry(p)
            assert await disk.statuses(*tokens) == [S_OK] * 20
            await until(lambda: storage_of(p).stopped is None)
            await image.fail(write=errno.EIO)
        await image.fail()
        assert await disk.read(0, 20 * BLOCK) == b"".join(pattern(BLOCK, n + 2) for n in range(20))


@every_reactor
async def test_a_disk_tries_again_by_itself(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_watch, "RETRY_SECONDS_MIN", 0.001)
    with structlog.testing.capture_logs() as logs:
        async with failing_disk(setting, "direct", on_error="stop") as (image, p):
            disk = BlkDriver(p.guest.queues[0])
            await image.fail(write=errno.ENOSPC)
            token = disk.submit([header(T_OUT, 0), pattern(BLOCK, 1)], [1])
            disk.queue.kick()
            await until(lambda: storage_of(p).retries >= 3)
            await image.fail()
            assert (await disk.answer(token)).status == S_OK
            await until(lambda: any(entry["event"] == "the disk continues" for entry in logs))
    told = [entry["event"].split(":")[0] for entry in logs if entry["log_level"] in ("error", "warning")]
    assert told == ["storage failed", "the disk is stopped", "the disk continues"]


@every_reactor
async def test_a_flush_that_fails_is_answered_and_never_tried_again(setting: Setting) -> None:
    async with failing_disk(setting, "writeback", on_error="stop") as (image, p):
        disk = BlkDriver(p.guest.queues[0])
        await disk.write(0, pattern(BLOCK, 1))
        await image.fail(write=errno.EIO)
        assert (await disk.request(T_FLUSH)).status == S_IOERR
        await image.fail()
        assert (await disk.request(T_FLUSH)).status == S_IOERR
        assert storage_of(p).stopped is None
        assert not blk_of(p).retry_storage()
        await trio.to_thread.run_sync(blk_of(p).reopening())
        await disk.flush()


@every_reactor
async def test_a_flush_that_waited_is_no_success_where_a_flush_failed_meanwhile(setting: Setting) -> None:
    async with failing_disk(setting, "direct", on_error="stop") as (image, p):
        disk = BlkDriver(p.guest.queues[0])
        await image.hang("fsync")
        flushes = [disk.submit([header(T_FLUSH)], [1])]
        disk.queue.kick()
        await image.hung("fsync")
        await image.fail(read=errno.EIO, fsync=errno.EIO)
        read = disk.submit([header(T_IN, 0)], [BLOCK, 1])
        disk.queue.kick()
        await until(lambda: storage_of(p).stopped is not None)
        flushes.append(disk.submit([header(T_FLUSH)], [1]))
        disk.queue.kick()
        await until(lambda: storage_of(p).kept == 2)
        await image.hang()
        await until(lambda: storage_of(p).flush_failed == "EIO")
        await image.fail()
        retry(p)
        assert await disk.statuses(read, *flushes) == [S_OK, S_IOERR, S_IOERR]


# --- a queue that stops meanwhile ---


@every_native_setting
async def test_a_queue_that_stops_gives_kept_requests_back_to_its_ring(setting: Setting) -> None:
    async with failing_disk(setting, "direct", on_error="stop") as (image, p):
        disk = BlkDriver(p.guest.queues[0])
        await disk.write(0, pattern(BLOCK, 0))
        await image.fail(write=errno.ENOSPC)
        writes = [disk.submit([header(T_OUT, 8 * n), pattern(BLOCK, n)], [1]) for n in range(1, 4)]
        disk.queue.kick()
        await until(lambda: storage_of(p).kept == 3)
        read = disk.submit([header(T_IN, 0)], [BLOCK, 1])
        disk.queue.kick()
        await until(lambda: storage_of(p).kept == 4)
        with trio.fail_after(30):
            base = await p.guest.link.stop(0)
        assert (storage_of(p).kept, [*disk.queue.driver.used()]) == (0, [])
        await image.fail()
        retry(p)
        await p.guest.start_queue(0, base)
        assert await disk.statuses(*writes) == [S_OK] * 3
        assert await disk.answer(read) == Answer(S_OK, pattern(BLOCK, 0), BLOCK + 1)
        for n in range(4):
            assert await disk.read(8 * n, BLOCK) == pattern(BLOCK, n)


@every_native_setting
async def test_a_kept_request_before_one_that_was_answered_gets_an_error_when_its_queue_stops(setting: Setting) -> None:
    async with failing_disk(setting, "direct", on_error="stop") as (image, p):
        disk = BlkDriver(p.guest.queues[0])
        await image.hang("write", "read")
        write = disk.submit([header(T_OUT, 0), bytes(BLOCK)], [1])
        disk.queue.kick()
        await image.hung("write")
        read = disk.submit([header(T_IN, 8)], [BLOCK, 1])
        disk.queue.kick()
        await image.hung("read")
        await image.fail(write=errno.EIO)
        await image.hang("read")
        await until(lambda: storage_of(p).kept == 1)
        late = disk.submit([header(T_IN, 16)], [BLOCK, 1])
        disk.queue.kick()
        await until(lambda: storage_of(p).kept == 2)
        await image.hang()
        assert (await disk.answer(read)).status == S_OK
        with trio.fail_after(30):
            base = await p.guest.link.stop(0)
        assert (await disk.answer(write)).status == S_IOERR
        await image.fail()
        retry(p)
        await p.guest.start_queue(0, base)
        assert await disk.statuses(late) == [S_OK]


@every_native_setting
async def test_no_buffer_is_written_after_the_queue_of_a_kept_read_was_stopped(setting: Setting) -> None:
    async with failing_disk(setting, "direct", on_error="stop") as (image, p):
        disk = BlkDriver(p.guest.queues[0])
        await image.fail(read=errno.EIO)
        disk.submit([header(T_IN, 0)], [BLOCK, 1])
        disk.queue.kick()
        await until(lambda: storage_of(p).kept == 1)
        with trio.fail_after(30):
            await p.guest.link.reset()
        await image.fail()
        retry(p)
        p.guest.forget_queues()
        await p.guest.start()
        assert await BlkDriver(p.guest.queues[0]).read(0, BLOCK) == bytes(BLOCK)
        assert storage_of(p).kept == 0


@every_reactor
async def test_a_daemon_ends_while_requests_are_kept(setting: Setting) -> None:
    with trio.fail_after(60):
        async with failing_disk(setting, "direct", on_error="stop", queues=2, workers=2) as (image, p):
            await image.fail(write=errno.ENOSPC)
            for queue in p.guest.queues:
                disk = BlkDriver(queue)
                for n in range(8):
                    disk.submit([header(T_OUT, 8 * n), bytes(BLOCK)], [1])
                queue.kick()
            await until(lambda: storage_of(p).kept == 16)
            await p.guest.link.reset()


# --- what an operator has of it ---


@every_reactor
async def test_the_command_tries_again_and_says_whether_the_disk_was_stopped(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = tmp_path / "ctl.sock"
    async with failing_disk(setting, "direct", on_error="stop") as (image, p), trio.open_nursery() as nursery:
        state = DaemonState((), ())
        await nursery.start(serve_control, control, lambda: state, None, None, Disks({"disk": p.device}, Files()))

        async def run() -> str:
            assert await trio.to_thread.run_sync(main, ["retry", "disk", "--control", str(control)]) == 0
            return capsys.readouterr().out

        assert "disk: not stopped" in await run()
        disk = BlkDriver(p.guest.queues[0])
        await image.fail(write=errno.ENOSPC)
        token = disk.submit([header(T_OUT, 0), bytes(BLOCK)], [1])
        disk.queue.kick()
        await until(lambda: storage_of(p).stopped is not None)
        await image.fail()
        assert "disk: tried again" in await run()
        assert (await disk.answer(token)).status == S_OK
        nursery.cancel_scope.cancel()


def test_a_stopped_disk_is_in_the_metrics_and_in_what_is_shown() -> None:
    storage = Storage((StorageErrors("write", "ENOSPC", 3),), None, 0, "write ENOSPC", 7, 2)
    backend = BackendStats("disk", "blk", 0, (), storage=storage)
    state = DaemonState((DeviceState(backend, None, "vhost-user", Path("/run/disk.sock")),), ())
    found = {metric.name: metric.samples[0].value for metric in storage_metrics(state.devices)}
    assert found["hyperbell_storage_stopped"] == 1
    assert found["hyperbell_storage_kept_requests"] == 7
    assert found["hyperbell_storage_retries"] == 2
    text = render(json.loads(json.dumps(respond(b'{"command": "stats"}', state), default=str)))
    assert "stopped (write ENOSPC): 7 requests wait, tried 2 times" in text


def test_a_disk_in_memory_has_nothing_to_stop_for() -> None:
    with pytest.raises(ValueError, match="on_error has no meaning"):
        BlkOptions(backend="memory", size=SIZE, on_error="stop")


# --- a real file system ---


def write_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    with path.open("rb+") as file:
        file.truncate(size)


@every_reactor
@pytest.mark.parametrize("length", [BLOCK, 3 << 20], ids=["short", "of_several_parts"])
async def test_a_read_behind_the_end_of_a_cut_file_is_answered_when_the_file_is_whole_again(
    setting: Setting, length: int
) -> None:
    with tempfile.TemporaryDirectory(prefix="hyperbell-", dir=SHARED_MEMORY) as folder:
        path, content = Path(folder, "disk.img"), pattern(4 << 20, 5)
        write_file(path, content)
        async with plugged(disk_on(path, on_error="stop"), setting) as p:
            disk = BlkDriver(p.guest.queues[0])
            await trio.to_thread.run_sync(cut, path, 1 << 20)
            token = disk.submit([header(T_IN, 2048)], [length, 1])
            disk.queue.kick()
            await until(lambda: storage_of(p).stopped == "read ENDED")
            await trio.to_thread.run_sync(write_file, path, content)
            retry(p)
            assert await disk.answer(token) == Answer(S_OK, content[1 << 20 : (1 << 20) + length], length + 1)


@every_reactor
async def test_writes_to_a_full_file_system_succeed_when_there_is_room(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = await trio.run_process(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=False, capture_stderr=True
    )
    if mounted.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        path = folder / "disk.img"
        write_file(path, b"")
        cut(path, SIZE)
        async with plugged(disk_on(path, on_error="stop"), setting) as p:
            disk = BlkDriver(p.guest.queues[0])
            content = pattern(512 << 10, 9)
            writes = [
                disk.submit([header(T_OUT, at // 512), content[at : at + (64 << 10)]], [1])
                for at in range(0, len(content), 64 << 10)
            ]
            disk.queue.kick()
            await until(lambda: storage_of(p).stopped == "write ENOSPC")
            await trio.run_process(["mount", "-o", "remount,size=4m", str(folder)])
            retry(p)
            assert await disk.statuses(*writes) == [S_OK] * len(writes)
            assert await disk.read(0, 512 << 10) == content
    finally:
        await trio.run_process(["umount", "-l", str(folder)])
