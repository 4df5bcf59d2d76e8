"""Descriptors from a peer: what is taken, what is refused, and that none of them can hold us."""

from __future__ import annotations

import errno
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit.ring.device import FORMATS, RingDevice, Rings, make_driver, put_one, read_counter

from virtio.dataplane import lib
from virtio.errors import HostError, KeptFullError
from virtio.fd import OwnedFd
from virtio.native.virtqueue import Virtqueue
from virtio.testing.driver import SplitDriver
from virtio.testing.virtqueue_driver import Desc

FULL = (1 << 64) - 2
Setter = Callable[[Virtqueue, OwnedFd | None], None]
SETTERS = [Virtqueue.set_kick, Virtqueue.set_call, Virtqueue.set_err]
ONE = (1).to_bytes(8, sys.byteorder)


def eventfd(flags: int = os.EFD_NONBLOCK, count: int = 0) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | flags)
    if count:
        os.eventfd_write(fd, count)
    return fd


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def not_notifiers() -> Iterator[tuple[str, int]]:
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as file:
        yield "pipe's read end", reader
        yield "path of a pipe", os.open(f"/proc/self/fd/{writer}", os.O_PATH)
        os.close(writer)
        yield "file", os.dup(file.fileno())
    for family in (socket.AF_INET, socket.AF_NETLINK):
        with socket.socket(family, socket.SOCK_DGRAM) as other:
            yield "socket of another family", os.dup(other.fileno())
    yield "memfd", os.memfd_create("anon_inode:[eventfd]")
    yield "folder", os.open("/", os.O_RDONLY)
    yield "path only", os.open("/", os.O_PATH)
    yield "device", os.open("/dev/null", os.O_RDWR)


@pytest.mark.parametrize("setter", SETTERS, ids=lambda s: s.__name__)
def test_what_cannot_notify_is_refused_and_closed(rings: Rings, setter: Setter) -> None:
    device = rings.device(SplitDriver(rings.memory(), 8))
    reason = "not an eventfd" if setter is Virtqueue.set_kick else "neither an eventfd nor a pipe's write end"
    before = open_descriptors()
    for what, fd in not_notifiers():
        owned = OwnedFd(fd)
        with pytest.raises(HostError, match=reason):
            setter(device.vq, owned)
        assert owned.closed, what
    assert open_descriptors() == before


def test_only_an_eventfd_kicks(rings: Rings) -> None:
    """Front-ends that bring pipes and sockets bring them to be signalled; what rings is an eventfd for all of them."""
    device = rings.device(SplitDriver(rings.memory(), 8))
    ours, theirs = socket.socketpair()
    reader, writer = os.pipe()
    with ours, theirs:
        for fd in (os.dup(ours.fileno()), reader, writer):
            with pytest.raises(HostError, match="kick fd of queue 0: not an eventfd"):
                device.vq.set_kick(OwnedFd(fd))


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


def test_a_full_blocking_call_fd_is_refused_and_the_one_before_it_stays(rings: Rings) -> None:
    device = rings.device(SplitDriver(rings.memory(), 8))
    device.interrupts()
    before = open_descriptors()
    for _ in range(3):
        with pytest.raises(
            KeptFullError, match="call fd of queue 0: a blocking eventfd that the other side keeps full"
        ):
            device.vq.set_call(OwnedFd(eventfd(0, FULL)))
    assert open_descriptors() == before
    assert device.fault == 0
    lib.virtqueue_signal(device.vq.pointer)
    assert device.interrupts() == 1


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


@pytest.mark.parametrize("count", [1, 3000, 5000])
def test_a_kick_fd_that_counts_down_is_served_to_its_end(rings: Rings, count: int) -> None:
    device = rings.device(SplitDriver(rings.memory(), 8))
    device.vq.set_kick(OwnedFd(eventfd(os.EFD_SEMAPHORE | os.EFD_NONBLOCK, count)))
    takes = 0
    while device.vq.take_kicks():
        takes += 1
    assert takes <= 4096
    assert device.vq.stats([], True, 0).kicks == count
    assert device.fault == 0


@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK])
def test_a_kick_fd_that_counts_down_without_end_breaks_its_queue_after_so_many_kicks(rings: Rings, flags: int) -> None:
    device = rings.device(SplitDriver(rings.memory(), 8))
    device.vq.set_kick(OwnedFd(eventfd(os.EFD_SEMAPHORE | flags, FULL)))
    takes = 0
    while not device.fault:
        device.vq.take_kicks()
        takes += 1
        assert takes <= 4096
    assert device.fault == lib.VQ_FAULT_KICK_FD
    assert device.vq.broken


def test_an_eventfd_that_is_kicked_once_at_a_time_never_breaks_its_queue(rings: Rings) -> None:
    device = rings.device(SplitDriver(rings.memory(), 8))
    fd = eventfd()
    device.vq.set_kick(OwnedFd(os.dup(fd)))
    for _ in range(10_000):
        os.eventfd_write(fd, 1)
        assert device.vq.take_kicks() == 1
    assert device.fault == 0
    os.close(fd)


# ---- pipes and sockets ----


class Channel:
    """Something that is signalled by 8 bytes, and its two ends."""

    def __init__(self, kind: str, folder: Path) -> None:
        if kind in ("pipe", "fifo"):
            if kind == "pipe":
                self.reader, self.writer = os.pipe()
            else:
                os.mkfifo(folder / "fifo")
                self.reader = os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)
                self.writer = os.open(folder / "fifo", os.O_WRONLY)
        else:
            ours, theirs = socket.socketpair(socket.AF_UNIX, getattr(socket, f"SOCK_{kind.upper()}"))
            self.reader, self.writer = ours.detach(), theirs.detach()

    def read(self, size: int = 8) -> bytes:
        os.set_blocking(self.reader, False)
        try:
            return os.read(self.reader, size)
        except BlockingIOError:
            return b""

    def hang_up(self) -> None:
        os.close(self.reader)
        self.reader = -1

    def close(self) -> None:
        for fd in (self.reader, self.writer):
            if fd >= 0:
                os.close(fd)


KINDS = ["pipe", "fifo", "stream", "seqpacket", "dgram"]


@pytest.fixture(params=KINDS)
def channel(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Channel]:
    opened = Channel(request.param, tmp_path)
    yield opened
    opened.close()


@pytest.mark.parametrize("ring", FORMATS)
def test_a_pipe_or_socket_is_signalled_with_8_bytes(rings: Rings, ring: str, channel: Channel) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = rings.device(driver)
    device.vq.set_call(OwnedFd(os.dup(channel.writer)))
    assert channel.read() == ONE  # what was completed before it came
    assert channel.read() == b""
    for _ in range(3):
        driver.add([], [1])
        (chain,) = device.pop()
        device.push((chain, b"x"))
        assert channel.read() == ONE
    assert os.get_blocking(channel.writer)  # the file status flags are the peer's


def test_a_full_pipe_or_socket_is_a_driver_that_was_told_already(rings: Rings, channel: Channel) -> None:
    """Blocking as it is, it holds nobody; and whatever is read meanwhile, what follows is whole."""
    device = rings.device(SplitDriver(rings.memory(), 8))
    device.vq.set_call(OwnedFd(os.dup(channel.writer)))
    signals = 1
    got = b""
    for turn in range(5):
        for _ in range(20_000):
            lib.virtqueue_signal(device.vq.pointer)
        signals += 20_000
        got += channel.read(8 * (turn + 1))
    while more := channel.read():
        got += more
    assert device.fault == 0
    assert device.vq.report().call_error == 0
    assert len(got) < 8 * signals
    assert got == ONE * (len(got) // 8)
    lib.virtqueue_signal(device.vq.pointer)
    assert channel.read() == ONE


@pytest.mark.parametrize("ring", FORMATS)
def test_where_nobody_is_at_the_other_end_requests_are_served_without_interrupts(
    rings: Rings, ring: str, channel: Channel
) -> None:
    driver = make_driver(ring, rings.memory(), 8)
    device = rings.device(driver)
    device.vq.set_call(OwnedFd(os.dup(channel.writer)))
    channel.hang_up()
    read_counter(device.event_fd)
    for _ in range(3):
        token = driver.add([], [1])
        (chain,) = device.pop()
        device.push((chain, b"x"))
        assert [used.token for used in driver.used()] == [token]
    assert device.fault == 0
    assert device.vq.report().call_error in (errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOTCONN)
    assert read_counter(device.event_fd) == 1
    assert device.vq.stats([], True, 0).notifications_lost == 1  # and the descriptor is closed
    device.vq.set_call(OwnedFd(os.dup(device.call_fd)))
    assert device.vq.report().call_error == 0
    assert device.interrupts() == 1


def test_the_err_fd_may_be_a_pipe_or_socket(rings: Rings, channel: Channel) -> None:
    driver = SplitDriver(rings.memory(), 8)
    device = rings.device(driver)
    device.vq.set_err(OwnedFd(os.dup(channel.writer)))
    assert channel.read() == b""
    put_one(driver, Desc(0, 1, 0, 0))
    assert device.pop() == []
    assert channel.read() == ONE
