"""Files that another process serves (FUSE here): as guest memory, and as anything else that a front-end may send."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from kit.front_end.vhost_user_wire import memfd
from kit.host.failing_storage import failing_image

from virtio.backend.backend import Backend
from virtio.backend.memory_files import ANSWER_SECONDS
from virtio.device import DeviceOptions
from virtio.devices.rng import Rng
from virtio.errors import HostError, HyperbellError
from virtio.fd import OwnedFd, may_block
from virtio.native.memory import file_system
from virtio.waist import MemoryRegion

SIZE = 1 << 20
TMPFS_MAGIC = 0x0102_1994


def received(number: int) -> OwnedFd:
    """As a transport takes one."""
    return OwnedFd(number, may_block=may_block(number))


def region(fd: OwnedFd) -> MemoryRegion:
    return MemoryRegion(0x1000_0000, SIZE, 0x7F00_0000_0000, 0, fd)


async def opened(path: Path) -> int:
    return await trio.to_thread.run_sync(os.open, path, os.O_RDWR)


def backend(*, remote_memory: bool = False) -> Backend:
    return Backend(Rng("entropy", DeviceOptions(), 1, 64), remote_memory=remote_memory)


def test_what_is_memory_a_socket_a_pipe_or_an_eventfd_never_blocks_and_a_file_may(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    numbers = [reader, writer, os.eventfd(0), memfd()]
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert [may_block(number) for number in numbers] == [False] * 4
        assert may_block(file) is (file_system(file) != TMPFS_MAGIC)
    finally:
        for number in (*numbers, file):
            os.close(number)


async def test_a_file_of_fuse_is_refused_as_guest_memory_with_the_key_to_set() -> None:
    async with failing_image() as image, backend() as one:
        fd = received(await opened(image.path))
        with pytest.raises(HostError, match=r"is on FUSE.*memfd.*remote_memory = true"):
            await one.set_memory([region(fd)])
        assert fd.closed


async def test_an_operator_may_allow_it() -> None:
    async with failing_image() as image, backend(remote_memory=True) as one:
        await one.set_memory([region(received(await opened(image.path)))])
        await one.set_memory([])


async def test_a_file_on_a_disk_is_guest_memory_as_ever(tmp_path: Path) -> None:
    file = tmp_path / "memory"
    file.touch()
    os.truncate(file, SIZE)
    async with backend() as one:
        fd = received(os.open(file, os.O_RDWR))
        await one.set_memory([region(fd)])
        assert not fd.may_block
        await one.set_memory([])
        assert fd.closed


@pytest.mark.parametrize("allowed", [False, True])
async def test_a_file_system_that_does_not_answer_is_refused_and_holds_up_nobody(allowed: bool) -> None:
    async with failing_image() as image, backend(remote_memory=allowed) as one:
        number = await opened(image.path)
        await image.hang("statfs", "flush", "getattr")
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                await trio.sleep(ANSWER_SECONDS / 100)
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(turn)
            with pytest.raises(HostError, match="has not answered"):
                await one.set_memory([region(received(number))])
            nursery.cancel_scope.cancel()
        assert turns > 1  # the loop went on, and even to close the file does not stop it
        await image.hang()


@pytest.mark.parametrize("sent_as", ["call", "err", "kick"])
async def test_a_file_of_fuse_in_the_place_of_an_eventfd_is_refused_without_asking_it(sent_as: str) -> None:
    async with failing_image() as image, backend() as one:
        number = await opened(image.path)
        await image.hang("statfs", "flush", "getattr")
        with pytest.raises(HyperbellError):
            await getattr(one, f"set_{sent_as}")(0, received(number))
        await image.hung("flush")  # it is being closed, by a thread
        await image.hang()
