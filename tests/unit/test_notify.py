"""Eventfds from a peer: what is taken, what is refused, and that none of them can hold us."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ring_device import FORMATS, RingDevice, Rings, make_driver, put_one, read_counter

from virtio.dataplane import lib
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.testing.driver import SplitDriver
from virtio.testing.virtqueue_driver import Desc
from virtio.virtqueue import Virtqueue

FULL = (1 << 64) - 2
Setter = Callable[[Virtqueue, OwnedFd | None], None]
SETTERS = [Virtqueue.set_kick, Virtqueue.set_call, Virtqueue.set_err]


def eventfd(flags: int = os.EFD_NONBLOCK, count: int = 0) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | flags)
    if count:
        os.eventfd_write(fd, count)
    return fd


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def not_eventfds() -> Iterator[tuple[str, int]]:
    reader, writer = os.pipe()
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryFile() as file:
        yield "pipe", reader
        yield "pipe's other end", writer
        yield "socket", os.dup(ours.fileno())
        yield "file", os.dup(file.fileno())
    yield "memfd", os.memfd_create("anon_inode:[eventfd]")
    yield "folder", os.open("/", os.O_RDONLY)
    yield "path only", os.open("/", os.O_PATH)
    yield "device", os.open("/dev/null", os.O_RDWR)


@pytest.mark.parametrize("setter", SETTERS, ids=lambda s: s.__name__)
def test_what_is_no_eventfd_is_refused_and_closed(rings: Rings, setter: Setter) -> None:
    device = rings.device(SplitDriver(rings.memory(), 8))
    before = open_descriptors()
    for _, fd in not_eventfds():
        owned = OwnedFd(fd)
        with pytest.raises(HostError, match="not an eventfd"):
            setter(device.vq, owned)
        assert owned.closed
    assert open_descriptors() == before


@pytest.mark.parametrize("setter", SETTERS, ids=lambda s: s.__name__)
def test_a_descriptor_that_is_replaced_is_closed(rings: Rings, setter: Setter) -> None:
    device = rings.device(SplitDriver(rings.memory(), 8))
    setter(device.vq, None)
    before = open_descriptors()
    for _ in range(5):
        setter(device.vq, OwnedFd(eventfd()))
        assert open_descriptors() == before + 1
    setter(device.vq, None)
    assert open_descriptors() == before


def test_descriptors_are_closed_with_their_queue(rings: Rings) -> None:
    memory = rings.memory()
    before = open_descriptors()
    device = RingDevice(SplitDriver(memory, 8))
    for setter in SETTERS:
        setter(device.vq, OwnedFd(eventfd()))
    device.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("ring", FORMATS)
def test_without_a_call_fd_nobody_is_interrupted_and_nothing_is_lost(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = rings.device(driver)
    device.vq.set_call(None)
    token = driver.add([], [1])
    (chain,) = device.pop()
    device.push((chain, b"x"))
    assert driver.used() == [(token, 1, [b"x"])]
    assert device.interrupts() == 0


def test_setting_a_full_blocking_call_fd_ends_and_breaks_the_queue(rings: Rings) -> None:
    device = rings.device(SplitDriver(rings.memory(), 8))
    device.vq.set_call(OwnedFd(eventfd(0, FULL)))
    assert device.fault == lib.VQ_FAULT_CALL_FD
    assert read_counter(device.event_fd) == 1


@pytest.mark.parametrize("ring", FORMATS)
def test_a_blocking_call_fd_that_nobody_reads_breaks_its_queue_when_it_is_full(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = rings.device(driver)
    device.vq.set_call(OwnedFd(eventfd(0, FULL - 2)))  # room for two
    faults = []
    tokens = []
    for _ in range(2):
        tokens.append(driver.add([], [1]))
        (chain,) = device.pop()
        device.push((chain, b"x"))
        faults.append(device.fault)
    assert faults == [0, lib.VQ_FAULT_CALL_FD]
    assert [used.token for used in driver.used()] == tokens  # what was done was published first


@pytest.mark.parametrize("ring", FORMATS)
def test_a_full_call_fd_that_does_not_block_is_a_driver_that_was_told_already(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = rings.device(driver)
    device.vq.set_call(OwnedFd(eventfd(os.EFD_NONBLOCK, FULL)))
    for _ in range(3):
        driver.add([], [1])
        device.push(*((chain, b"x") for chain in device.pop()))
    assert len(driver.used()) == 3
    assert device.fault == 0


def test_the_peer_may_clear_o_nonblock_and_still_not_hold_us(rings: Rings) -> None:
    device = rings.device(SplitDriver(rings.memory(), 8))
    fd = eventfd(os.EFD_NONBLOCK, FULL)
    device.vq.set_call(OwnedFd(os.dup(fd)))
    assert device.fault == 0
    os.set_blocking(fd, True)
    lib.virtqueue_signal(device.vq.pointer)
    assert device.fault == lib.VQ_FAULT_CALL_FD
    os.close(fd)


def test_the_err_fd_is_signalled_once_when_the_queue_breaks(rings: Rings) -> None:
    driver = SplitDriver(rings.memory(), 8)
    device = rings.device(driver)
    fd = eventfd()
    device.vq.set_err(OwnedFd(os.dup(fd)))
    assert read_counter(fd) == 0
    put_one(driver, Desc(0, 1, 0, 0))
    device.pop()
    device.pop()
    assert read_counter(fd) == 1
    os.close(fd)


def test_a_full_blocking_err_fd_does_not_hold_us(rings: Rings) -> None:
    driver = SplitDriver(rings.memory(), 8)
    device = rings.device(driver)
    device.vq.set_err(OwnedFd(eventfd(0, FULL)))
    put_one(driver, Desc(0, 1, 0, 0))
    assert device.pop() == []
    assert device.fault == lib.VQ_FAULT_ADDRESS


@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK])
def test_taking_kicks_never_blocks_and_counts_them(rings: Rings, flags: int) -> None:
    device = rings.device(SplitDriver(rings.memory(), 8))
    assert device.vq.take_kicks() == 0  # no kick fd at all
    fd = eventfd(flags)
    device.vq.set_kick(OwnedFd(os.dup(fd)))
    assert device.vq.take_kicks() == 0
    for _ in range(3):
        os.eventfd_write(fd, 1)
    assert device.vq.take_kicks() == 3
    assert device.vq.take_kicks() == 0
    os.eventfd_write(fd, FULL)
    assert device.vq.take_kicks() == 0xFFFFFFFF  # the peer's word, capped so that the metric stays readable
    assert device.vq.stats([], True, 0).kicks == 3 + 0xFFFFFFFF
    os.close(fd)


def test_a_kick_fd_that_counts_down_by_one_is_read_once_a_wake_up(rings: Rings) -> None:
    device = rings.device(SplitDriver(rings.memory(), 8))
    device.vq.set_kick(OwnedFd(eventfd(os.EFD_SEMAPHORE, 1000)))
    assert [device.vq.take_kicks() for _ in range(3)] == [1, 1, 1]
