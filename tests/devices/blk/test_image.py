"""The block device and its image: who may open it, what its size means, and what happens when it changes or is full."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from kit.front_end.frontend import Setting, every_native_setting, every_reactor, plugged
from kit.front_end.vhost_user_wire import no_fd_leaks
from kit.guest.blk import (
    KINDS,
    S_IOERR,
    S_OK,
    T_IN,
    T_OUT,
    UNTOUCHED,
    Answer,
    BlkDriver,
    VerifiedLoad,
    contents,
    every_file,
    header,
    make_disk,
    pattern,
    put,
)

from virtio.devices.blk.device import Blk, BlkOptions
from virtio.errors import HostError
from virtio.testing.queue import GUARD

SECTOR = 512
MIB = 1 << 20


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


# --- an image that is shorter than it was ---


@every_native_setting
@every_file
async def test_what_was_cut_off_an_image_is_an_error_and_never_zeroes(setting: Setting, kind: str, image: Path) -> None:
    put(image, pattern(MIB, 1))
    async with plugged(make_disk(kind, image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        cut(image, MIB // 2)
        for sector, length in ((1024, 4096), (1536, 64 << 10), (2040, 4096)):
            answer = await disk.request(T_IN, sector, room=length)
            assert (answer.status, answer.written) == (S_IOERR, 1)
            assert answer.data == bytes([UNTOUCHED]) * length
        across = await disk.request(T_IN, 1016, room=8192)
        assert (across.status, across.written) == (S_IOERR, 1)
        assert await disk.read(1016, 4096) == pattern(MIB, 1)[1016 * SECTOR : MIB // 2]
        assert p.op("read") == (5, 4)
        assert not p.backend.stats().queues[0].broken


@every_reactor
@every_file
async def test_an_image_that_is_cut_under_load_fails_requests_and_nothing_else(
    setting: Setting, kind: str, image: Path
) -> None:
    async with plugged(make_disk(kind, image, queues=2), setting, workers=2) as p:
        steady = VerifiedLoad(p.guest.queues[1], blocks=64)
        disk = BlkDriver(p.guest.queues[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(steady.run)
            await steady.progress()
            for size in (MIB // 2, MIB // 4 + 512, MIB // 2, MIB // 4):
                cut(image, size)
                tokens = [disk.submit([header(T_IN, 8 * n)], [4096, 1]) for n in range(100, 120)]
                statuses = await disk.statuses(*tokens)
                beyond = [n for n in range(100, 120) if (n + 1) * 4096 > size]
                assert [n for n, status in zip(range(100, 120), statuses, strict=True) if status != S_OK] == beyond
            await steady.progress()
            nursery.cancel_scope.cancel()


# --- an image that changes its size, announced ---


@every_native_setting
@every_file
async def test_a_grown_image_is_announced_and_used_from_then_on(setting: Setting, kind: str, image: Path) -> None:
    async with plugged(make_disk(kind, image), setting) as p:
        disk, link = BlkDriver(p.guest.queues[0]), p.guest.link
        if setting.way == "socket":
            await link.open_channel()  # type: ignore[attr-defined]
        assert p.device.refresh() is False
        cut(image, 2 * MIB)
        assert (await disk.request(T_OUT, 2048, bytes(4096))).status == S_IOERR
        assert p.device.refresh() is True
        with trio.fail_after(GUARD):
            await link.config_change()
        assert int.from_bytes(await link.read_config(0, 8), "little") == 4096
        await disk.write(4088, pattern(4096, 2))
        assert await disk.read(4088, 4096) == pattern(4096, 2)
        assert p.device.refresh() is False


@every_reactor
async def test_a_shrunken_image_is_announced_too(setting: Setting, tmp_path: Path) -> None:
    image = tmp_path / "image"
    async with plugged(make_disk("file", image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        cut(image, MIB // 2)
        assert p.device.refresh() is True
        with trio.fail_after(GUARD):
            await p.guest.link.config_change()
        assert int.from_bytes(await p.guest.link.read_config(0, 8), "little") == 1024
        assert await disk.request(T_OUT, 1024, bytes(SECTOR)) == Answer(S_IOERR, b"", 1)
        assert len(contents(image)) == MIB // 2


# --- a full file system ---


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "hyperbell-test", folder],
        capture_output=True,
        text=True,
        timeout=20,
    )
    if done.returncode != 0:
        pytest.skip(f"a file system of 512 KiB cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True, timeout=20)


@every_native_setting
async def test_a_full_file_system_is_an_error_and_what_was_written_stays(setting: Setting, small_tmpfs: Path) -> None:
    image = small_tmpfs / "image"
    async with plugged(make_disk("file", image), setting) as p:
        disk = BlkDriver(p.guest.queues[0])
        written: list[int] = []
        failed: list[int] = []
        for n in range(64):
            answer = await disk.request(T_OUT, 32 * n, pattern(16 << 10, n))
            assert answer.status in (S_OK, S_IOERR)
            (written if answer.status == S_OK else failed).append(n)
        assert len(written) >= 28
        assert len(failed) >= 30
        assert p.op("write") == (64, len(failed))
        for n in written:
            assert await disk.read(32 * n, 16 << 10) == pattern(16 << 10, n)
        await disk.flush()
        await disk.discard(0, 32 * 8)  # room is made, and what failed works
        for n in failed[:4]:
            await disk.write(32 * n, pattern(16 << 10, n))
            assert await disk.read(32 * n, 16 << 10) == pattern(16 << 10, n)
        assert not p.backend.stats().queues[0].broken
    assert contents(image)[written[-1] * (16 << 10) :][: 16 << 10] == pattern(16 << 10, written[-1])


# --- who may have the image ---


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "memory"])
def test_an_image_has_one_writer(kind: str, image: Path) -> None:
    with no_fd_leaks():
        first = make_disk(kind, image)
        for read_only in (False, True):
            with pytest.raises(HostError, match=r"disk.img: the image is being (used|written) by another device or"):
                Blk("second", BlkOptions(path=image, read_only=read_only), 1, 64)
        first.close()
        make_disk(kind, image).close()


def test_an_image_has_many_readers_and_then_no_writer(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    with no_fd_leaks():
        readers = [make_disk("file", image, read_only=True) for _ in range(3)]
        with pytest.raises(HostError, match="used by another device or daemon"):
            make_disk("file", image)
        for reader in readers:
            reader.close()
        make_disk("file", image).close()


def test_another_process_cannot_have_it_either(tmp_path: Path) -> None:
    image = tmp_path / "image"
    disk = make_disk("file", image)
    script = (
        "import sys; from pathlib import Path; from virtio.devices.blk.device import Blk, BlkOptions\n"
        "Blk('other', BlkOptions(path=Path(sys.argv[1])), 1, 64).close()"
    )
    command = [sys.executable, "-c", script, str(image)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].endswith(f"{image}: the image is being used by another device or daemon")
    disk.close()
    subprocess.run(command, check=True, timeout=60)


# --- what is no image ---


def test_every_refusal_names_the_path_and_says_what_to_do(tmp_path: Path) -> None:
    fifo, empty = tmp_path / "fifo", tmp_path / "empty"
    os.mkfifo(fifo)
    empty.touch()
    refusals = {
        tmp_path / "missing": "make it first, for instance: truncate -s 10G",
        tmp_path: "Is a directory",
        fifo: "neither a regular file nor a block device",
        empty: "the image is empty; give it a size: truncate -s 10G",
        empty / "below": "Not a directory",
    }
    with no_fd_leaks():
        for path, reason in refusals.items():
            with pytest.raises(HostError) as caught:
                Blk("disk", BlkOptions(path=path), 1, 64)
            assert str(caught.value).startswith(f"{path}: ")
            assert reason in str(caught.value)
