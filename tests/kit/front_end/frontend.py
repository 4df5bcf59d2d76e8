"""A guest with its virtual machine monitor, for tests: drives a device through the waist or over a vhost-user socket.

``plugged`` puts a device together with a back-end (and workers, and a server), and a ``Guest`` on the other side of
it. The guest is the same whichever way it is connected, so each device test runs both ways, in both ring formats, and
native devices with both reactors: see ``every_native_setting`` and ``every_python_setting``.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import trio
from kit.front_end.links import F_ACCESS_PLATFORM, Link, SocketLink, WaistLink

from transports.vhost_user.serving.server import VhostUserServer
from virtio.backend.backend import Backend
from virtio.device import Device
from virtio.native.worker import Worker
from virtio.socket_file import Listen
from virtio.testing.driver import GuestMemory, PackedDriver, SplitDriver
from virtio.testing.queue import GUARD, GuestQueue
from virtio.waist import QueueBroken

F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
F_RING_PACKED: Final = 1 << 34
F_RING_RESET: Final = 1 << 40
NEEDS_RESET: Final = 64
PACKED_START: Final = 0x8000_8000  # both positions 0, both wrap counters 1


# --- the guest ---


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
    inband_notifications: bool = False,
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
            result.server = VhostUserServer(backend, Listen(result.path), inband_notifications=inband_notifications)
            await nursery.start(result.server.run)
        guest = await result.connect()
        try:
            if start:
                await guest.start(without=without, queue_size=queue_size)
            yield result
        finally:
            result.guest.close()
            nursery.cancel_scope.cancel()
