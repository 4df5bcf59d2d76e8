"""A task that was woken because a descriptor is readable may find nothing in it: somebody else was quicker.

Readiness is a hint (select(2), BUGS). No task ends by it, blocks the event loop, or takes it for news.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from kit.front_end.recording_backend import RecordingBackend
from kit.guest.blk import make_disk

from transports.kvm.vm.vmm import Vm
from transports.vhost_user.requests.rings import SetCall
from transports.vhost_user.serving.inband import InbandNotifications
from transports.vhost_user.state.vring import Vring
from virtio.devices.console.terminal import TerminalEnd
from virtio.devices.gpio.chip import _read_events
from virtio.devices.vsock.host import read_command
from virtio.fd import OwnedFd, take_count


class Wakes:
    """Each descriptor's first wait is over at once, whether or not there is anything."""

    def __init__(self, wait_readable: Callable[[Any], Awaitable[None]]) -> None:
        self._wait = wait_readable
        self.spurious: set[object] = set()

    async def wait_readable(self, fd: object) -> None:
        if fd not in self.spurious:
            self.spurious.add(fd)
            await trio.lowlevel.checkpoint()
            return
        await self._wait(fd)


@pytest.fixture
def wakes(monkeypatch: pytest.MonkeyPatch) -> Wakes:
    made = Wakes(trio.lowlevel.wait_readable)
    monkeypatch.setattr(trio.lowlevel, "wait_readable", made.wait_readable)
    return made


def eventfd() -> OwnedFd:
    return OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def test_an_eventfd_that_nobody_rang_counts_nothing() -> None:
    with eventfd() as fd:
        assert take_count(fd.fileno()) == 0
        os.eventfd_write(fd.fileno(), 3)
        assert (take_count(fd.fileno()), take_count(fd.fileno())) == (3, 0)


async def test_a_queue_that_did_not_call_sends_no_message(wakes: Wakes) -> None:
    posted: list[object] = []
    async with trio.open_nursery() as nursery:
        inband = InbandNotifications(RecordingBackend(), nursery, posted.append)
        operation = await inband.prepare(SetCall(0, None), Vring(0))
        assert isinstance(operation, SetCall)
        assert operation.call_fd is not None
        await trio.testing.wait_all_tasks_blocked()
        assert wakes.spurious
        assert posted == []
        os.eventfd_write(operation.call_fd.fileno(), 1)
        await trio.testing.wait_all_tasks_blocked()
        assert len(posted) == 1
        operation.call_fd.close()
        nursery.cancel_scope.cancel()


async def test_a_disk_without_news_goes_on_waiting_for_some(wakes: Wakes, tmp_path: Path) -> None:
    disk = make_disk("memory", tmp_path / "disk")
    async with trio.open_nursery() as nursery:
        await nursery.start(disk.run)
        await trio.testing.wait_all_tasks_blocked()
        assert wakes.spurious
        nursery.cancel_scope.cancel()
    disk.close()


async def test_a_machine_of_our_own_looks_again(wakes: Wakes) -> None:
    vm = Vm.__new__(Vm)  # what there is without /dev/kvm
    with eventfd() as vm._event_fd:
        await vm._next_event()
        assert wakes.spurious


async def test_a_client_of_vsock_may_still_say_its_port(wakes: Wakes) -> None:
    ours, theirs = socket.socketpair()
    ports: list[int | None] = []

    async def read() -> None:
        ports.append(await read_command(ours))

    with ours, theirs:
        ours.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            assert wakes.spurious
            assert not ports
            theirs.sendall(b"CONNECT 77\n")
    assert ports == [77]


async def test_a_terminal_that_another_program_has_read_has_not_ended(wakes: Wakes) -> None:
    ours, theirs = socket.socketpair()
    end = TerminalEnd.__new__(TerminalEnd)
    end._read_fd = ours.fileno()
    texts: list[bytes] = []

    async def read() -> None:
        texts.append(await end._read_some())

    with ours, theirs:
        ours.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            assert wakes.spurious
            assert not texts
            theirs.sendall(b"key")
    assert texts == [b"key"]


def test_a_line_without_an_edge_is_not_lost() -> None:
    ours, theirs = socket.socketpair()
    with theirs, OwnedFd(ours.detach()) as fd:
        os.set_blocking(fd.fileno(), False)
        assert _read_events(fd) == b""
