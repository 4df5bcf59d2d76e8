"""A guest with its virtual machine monitor, for tests: drives a device through the waist or over a vhost-user socket.

``plugged`` puts a device together with a back-end (and workers, and a server), and a ``Guest`` on the other side of
it. The guest is the same whichever way it is connected, so each device test runs both ways, in both ring formats, and
native devices with both reactors: see ``every_native_setting`` and ``every_python_setting``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import trio
import vhost_user_wire as wire
from driver import GuestMemory, PackedDriver, SplitDriver, Used, VirtqueueDriver

from transports.vhost_user.endpoint import Listen
from transports.vhost_user.server import VhostUserServer
from virtio.backend import Backend
from virtio.device import Device
from virtio.fd import OwnedFd
from virtio.waist import AddressSpace, ConfigChanged, MemoryRegion, QueueBroken, QueueSetup
from virtio.worker import Worker

GUARD: Final = 20.0
"""Seconds after which a wait has failed. Nothing ever takes that long."""

F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
F_ACCESS_PLATFORM: Final = 1 << 33
F_RING_PACKED: Final = 1 << 34
F_RING_RESET: Final = 1 << 40
NEEDS_RESET: Final = 64
PACKED_START: Final = 0x8000_8000  # both positions 0, both wrap counters 1


# --- the two ways to a device ---


class Link(ABC):
    """What a virtual machine monitor does to a device. Descriptors given stay the caller's."""

    @abstractmethod
    async def device_features(self) -> int: ...
    @abstractmethod
    async def queue_count(self) -> int: ...
    @abstractmethod
    async def negotiate(self, features: int) -> None: ...
    @abstractmethod
    async def share(self, *memories: GuestMemory) -> None:
        """These are the guest's memory now."""

    @abstractmethod
    async def set_up(self, index: int, size: int, areas: tuple[int, int, int], base: int) -> None:
        """``areas``: descriptor table, avail and used ring, as user virtual addresses (or I/O virtual ones)."""

    @abstractmethod
    async def set_kick(self, index: int, fd: int | None) -> None: ...
    @abstractmethod
    async def set_call(self, index: int, fd: int | None) -> None: ...
    @abstractmethod
    async def set_err(self, index: int, fd: int | None) -> None: ...
    @abstractmethod
    async def enable(self, index: int, on: bool) -> None: ...
    @abstractmethod
    async def stop(self, index: int) -> int:
        """Stop a queue; its base."""

    @abstractmethod
    async def reset(self) -> None: ...
    @abstractmethod
    async def status(self) -> int: ...
    @abstractmethod
    async def read_config(self, offset: int, size: int) -> bytes: ...
    @abstractmethod
    async def write_config(self, offset: int, data: bytes) -> None: ...
    @abstractmethod
    async def config_change(self) -> None:
        """Wait until the device says that its config space changed."""

    @abstractmethod
    def close(self) -> None: ...


def _given(fd: int | None) -> OwnedFd | None:
    return None if fd is None else OwnedFd(os.dup(fd))


class WaistLink(Link):
    """Straight to the back-end's verbs."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.space = AddressSpace.UVA

    async def device_features(self) -> int:
        return self.backend.device_features()

    async def queue_count(self) -> int:
        return self.backend.queue_count

    async def negotiate(self, features: int) -> None:
        self.backend.set_driver_features(features)
        self.space = AddressSpace.IOVA if features & F_ACCESS_PLATFORM else AddressSpace.UVA

    async def share(self, *memories: GuestMemory) -> None:
        await self.backend.set_memory([MemoryRegion(m.gpa, m.size, m.uva, 0, OwnedFd(os.dup(m.fd))) for m in memories])

    async def set_up(self, index: int, size: int, areas: tuple[int, int, int], base: int) -> None:
        await self.backend.configure_queue(index, QueueSetup(size, *areas, base, self.space))

    async def set_kick(self, index: int, fd: int | None) -> None:
        await self.backend.set_kick(index, _given(fd))

    async def set_call(self, index: int, fd: int | None) -> None:
        await self.backend.set_call(index, _given(fd))

    async def set_err(self, index: int, fd: int | None) -> None:
        await self.backend.set_err(index, _given(fd))

    async def enable(self, index: int, on: bool) -> None:
        await self.backend.enable_queue(index, on)

    async def stop(self, index: int) -> int:
        return await self.backend.stop_queue(index)

    async def reset(self) -> None:
        await self.backend.reset()

    async def status(self) -> int:
        return self.backend.status

    async def read_config(self, offset: int, size: int) -> bytes:
        return self.backend.read_config(offset, size)

    async def write_config(self, offset: int, data: bytes) -> None:
        self.backend.write_config(offset, data)

    async def config_change(self) -> None:
        while not isinstance(await self.backend.next_event(), ConfigChanged):
            pass

    def close(self) -> None:
        """The back-end is not ours."""


class SocketLink(Link):
    """Over a vhost-user socket, message by message."""

    def __init__(self, front_end: wire.FrontEnd) -> None:
        self.front_end = front_end
        self.channel: wire.FrontEnd | None = None

    @classmethod
    async def connect(cls, path: Path) -> SocketLink:
        return cls(await wire.FrontEnd.connect(path))

    async def _do(self, request: int, payload: bytes = b"", fd: int | None = None) -> None:
        status = await self.front_end.do(request, payload, [] if fd is None else [os.dup(fd)])
        assert status == 0, f"{wire.MESSAGE_NAMES[request]} was refused"

    async def device_features(self) -> int:
        (features,) = struct.unpack("=Q", await self.front_end.ask(1))
        return int(features) & ~wire.F_PROTOCOL_FEATURES

    async def queue_count(self) -> int:
        await self.front_end.send(wire.message(16, wire.u64(wire.ALL_PROTOCOL_FEATURES)))
        (count,) = struct.unpack("=Q", await self.front_end.ask(17))
        return int(count)

    async def negotiate(self, features: int) -> None:
        await self.front_end.negotiate(features | wire.F_PROTOCOL_FEATURES)

    async def share(self, *memories: GuestMemory) -> None:
        table = wire.mem_table(*(wire.region(m.gpa, m.size, m.uva) for m in memories))
        assert await self.front_end.do(5, table, [os.dup(m.fd) for m in memories]) == 0

    async def set_up(self, index: int, size: int, areas: tuple[int, int, int], base: int) -> None:
        await self._do(8, wire.vring_state(index, size))
        await self._do(10, wire.vring_state(index, base))
        await self._do(9, wire.vring_addr(index, *areas))

    async def _set_fd(self, request: int, index: int, fd: int | None) -> None:
        await self._do(request, wire.u64(index | (0x100 if fd is None else 0)), fd)

    async def set_kick(self, index: int, fd: int | None) -> None:
        await self._set_fd(12, index, fd)

    async def set_call(self, index: int, fd: int | None) -> None:
        await self._set_fd(13, index, fd)

    async def set_err(self, index: int, fd: int | None) -> None:
        await self._set_fd(14, index, fd)

    async def enable(self, index: int, on: bool) -> None:
        await self._do(18, wire.vring_state(index, int(on)))

    async def stop(self, index: int) -> int:
        _, base = struct.unpack("=II", await self.front_end.ask(11, wire.vring_state(index, 0)))
        return int(base)

    async def reset(self) -> None:
        await self._do(34)

    async def status(self) -> int:
        return int.from_bytes(await self.front_end.ask(40), "little")

    async def read_config(self, offset: int, size: int) -> bytes:
        answer = await self.front_end.ask(24, wire.config(offset, bytes(size)))
        assert len(answer) == 12 + size, "GET_CONFIG was refused"
        return answer[12:]

    async def write_config(self, offset: int, data: bytes) -> None:
        await self._do(25, wire.config(offset, data))

    async def open_channel(self) -> wire.FrontEnd:
        """The back-end channel: what the device asks of its own accord comes in there."""
        if self.channel is None:
            ours, theirs = socket.socketpair()
            with theirs:
                await self._do(21, fd=theirs.fileno())
            self.channel = wire.FrontEnd(trio.socket.from_stdlib_socket(ours))
        return self.channel

    async def config_change(self) -> None:
        channel = await self.open_channel()
        assert await channel.receive() == (2, b"")
        await channel.send(wire.reply_to(2, wire.u64(0)))

    def close(self) -> None:
        self.front_end.close()
        if self.channel is not None:
            self.channel.close()


# --- the guest ---


class GuestQueue:
    """One queue of the guest: the driver's side of the ring, and its three eventfds."""

    def __init__(self, index: int, driver: VirtqueueDriver) -> None:
        self.index = index
        self.driver = driver
        self.kick_fd, self.call_fd, self.err_fd = wire.eventfds(3)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    @property
    def areas(self) -> tuple[int, int, int]:
        to_uva = self.driver.memory.to_uva
        return to_uva(self.driver.desc), to_uva(self.driver.avail), to_uva(self.driver.used_area)

    def kick(self) -> None:
        """As a guest kernel kicks: only where the device wants it."""
        self.driver.kick_if_needed(self.kick_fd)

    def ring(self) -> None:
        """Kick whether the device wants it or not."""
        os.eventfd_write(self.kick_fd, 1)

    async def used(self, count: int = 1) -> list[Used]:
        """Wait until ``count`` buffers (or more) came back."""
        back: list[Used] = []
        with trio.fail_after(GUARD):
            while True:
                back += self.driver.used()
                if len(back) >= count:
                    return back
                if self.driver.want_interrupts(True):
                    continue
                await self.interrupt()

    async def interrupt(self) -> None:
        """Wait until the call eventfd was signalled."""
        with trio.fail_after(GUARD):
            await trio.lowlevel.wait_readable(self.call_fd)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.call_fd)

    async def request(self, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False) -> Used:
        """One buffer there and back, with nothing else under way."""
        self.driver.add(readable, writable, indirect=indirect)
        self.kick()
        (used,) = await self.used()
        return used

    async def broken(self) -> None:
        """Wait until the device says that it gave the queue up."""
        with trio.fail_after(GUARD):
            await trio.lowlevel.wait_readable(self.err_fd)
        assert os.eventfd_read(self.err_fd) == 1


class Guest:
    """A guest's memory and queues over a ``link``. ``ring`` is "split" or "packed"."""

    def __init__(self, link: Link, ring: str = "split", memory_size: int = 4 << 20) -> None:
        self.link = link
        self.ring = ring
        self.memory = GuestMemory(memory_size)
        self.queues: list[GuestQueue] = []
        self.features = 0

    def close(self) -> None:
        """Leave, as when the virtual machine is killed."""
        self.link.close()
        self.forget_queues()
        self.memory.close()

    def forget_queues(self) -> None:
        for queue in self.queues:
            queue.close()
        self.queues.clear()

    async def start(self, *, queue_size: int = 64, without: int = 0, queues: int | None = None) -> None:
        """Negotiate what is offered less the bits of ``without``, share the memory, and start the queues."""
        await self.negotiate(without)
        await self.link.share(self.memory)
        count = await self.link.queue_count() if queues is None else queues
        for index in range(count):
            self.add_queue(queue_size)
            await self.start_queue(index)

    async def negotiate(self, without: int = 0) -> None:
        features = await self.link.device_features() & ~without & ~F_ACCESS_PLATFORM
        self.features = features if self.ring == "packed" else features & ~F_RING_PACKED
        await self.link.negotiate(self.features)

    def add_queue(self, size: int) -> GuestQueue:
        format_class = PackedDriver if self.ring == "packed" else SplitDriver
        driver = format_class(self.memory, size, event_idx=bool(self.features & F_EVENT_IDX))
        queue = GuestQueue(len(self.queues), driver)
        self.queues.append(queue)
        return queue

    async def start_queue(self, index: int, base: int | None = None) -> None:
        queue = self.queues[index]
        if base is None:
            base = PACKED_START if self.ring == "packed" else 0
        await self.link.set_up(index, queue.driver.size, queue.areas, base)
        await self.link.set_err(index, queue.err_fd)
        await self.link.set_call(index, queue.call_fd)
        await self.link.set_kick(index, queue.kick_fd)
        await self.link.enable(index, True)

    async def needs_reset(self) -> None:
        """Wait until the device's status says so."""
        with trio.fail_after(GUARD):
            while not await self.link.status() & NEEDS_RESET:
                if isinstance(self.link, WaistLink):
                    assert isinstance(await self.link.backend.next_event(), QueueBroken)


# --- putting it together ---


@dataclass(frozen=True)
class Setting:
    """How one run of a test connects and drives a device. ``reactor`` is "" for Python devices."""

    way: str
    ring: str
    reactor: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.way, self.ring, self.reactor)))


WAYS: Final = ("waist", "socket")
RINGS: Final = ("split", "packed")
REACTORS: Final = ("io_uring", "epoll")
NATIVE_SETTINGS: Final = [Setting(*each) for each in itertools.product(WAYS, RINGS, REACTORS)]
PYTHON_SETTINGS: Final = [Setting(*each) for each in itertools.product(WAYS, RINGS)]
every_native_setting = pytest.mark.parametrize("setting", NATIVE_SETTINGS, ids=str)
every_python_setting = pytest.mark.parametrize("setting", PYTHON_SETTINGS, ids=str)
every_reactor = pytest.mark.parametrize("setting", [Setting("waist", "split", r) for r in REACTORS], ids=str)
every_ring = pytest.mark.parametrize("ring", RINGS)


class Plugged:
    """A device in service with a guest on it."""

    def __init__(self, device: Device, backend: Backend, server: VhostUserServer | None, setting: Setting) -> None:
        self.device = device
        self.backend = backend
        self.server = server
        self.setting = setting
        self.path: Path | None = None
        self.guest: Guest

    async def connect(self) -> Guest:
        """A guest that has not started yet; the one before must have been closed."""
        link: Link
        if self.path is None:
            link = WaistLink(self.backend)
        else:
            link = await SocketLink.connect(self.path)
        self.guest = Guest(link, self.setting.ring)
        return self.guest

    def op(self, name: str, queue: int = 0) -> tuple[int, int]:
        """(requests, errors) of one operation as the metrics have them."""
        stats = self.backend.stats().queues[queue].ops[name]
        return stats.requests, stats.errors


@contextlib.asynccontextmanager
async def plugged(
    device: Device,
    setting: Setting,
    *,
    workers: int = 1,
    queue_size_max: int = 1024,
    features_off: Collection[int] = (),
    start: bool = True,
    without: int = 0,
    queue_size: int = 64,
) -> AsyncIterator[Plugged]:
    """``device`` (closed at the end) served as ``setting`` says, and a guest on it, started unless told otherwise."""
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(device.close)
        threads = [
            await stack.enter_async_context(Worker(f"test{number}", reactor=setting.reactor))
            for number in range(workers if device.native else 0)
        ]
        backend = await stack.enter_async_context(
            Backend(device, workers=threads, queue_size_max=queue_size_max, features_off=features_off)
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        result = Plugged(device, backend, None, setting)
        if setting.way == "socket":
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hyperbell-"))
            result.path = Path(folder, "s")
            result.server = VhostUserServer(backend, Listen(result.path))
            await nursery.start(result.server.run)
        guest = await result.connect()
        try:
            if start:
                await guest.start(without=without, queue_size=queue_size)
            yield result
        finally:
            result.guest.close()
            nursery.cancel_scope.cancel()
