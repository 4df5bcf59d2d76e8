"""A station on an Ethernet: the driver of a network device, without a guest."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import trio

from virtio.devices.net.device import Net, NetOptions
from virtio.testing import TestDriver, attach
from virtio.testing.queue import GUARD

RECEIVE, TRANSMIT = 0, 1
BROADCAST = b"\xff" * 6
ETHERTYPE = 0x88B5  # for local experiments
HEADER = bytes(12)
BUFFERS = 48
BUFFER_SIZE = 2048


class Station:
    """Frames to and from ``device``."""

    def __init__(self, device: Net, driver: TestDriver) -> None:
        self.device = device
        self.driver = driver
        self.mac = device.mac
        self._pieces: list[bytes] = []
        self._arrived: list[bytes] = []

    def listen(self, count: int = BUFFERS) -> None:
        for _ in range(count):
            self.driver.post(RECEIVE, writable=BUFFER_SIZE)

    async def send(self, payload: bytes, to: bytes = BROADCAST, ethertype: int = ETHERTYPE) -> bytes:
        """Returns once the device has taken the frame, which it returns."""
        frame = to + self.mac + struct.pack(">H", ethertype) + payload
        await self.driver.request(TRANSMIT, HEADER + frame)
        return frame

    async def next_frame(self) -> bytes:
        """The next frame that comes; its buffers are given to the device again."""
        with trio.fail_after(GUARD):
            while not self._arrived:
                for _, data in await self.driver.answers(RECEIVE):
                    self._pieces.append(data)
                    self.driver.post(RECEIVE, writable=BUFFER_SIZE)
                    if len(self._pieces) == struct.unpack_from("<H", self._pieces[0], 10)[0]:
                        self._arrived.append(b"".join(self._pieces)[len(HEADER) :])
                        self._pieces.clear()
            return self._arrived.pop(0)

    async def wait_for(self, wanted: Callable[[bytes], bool]) -> bytes:
        """The next frame that is ``wanted``; others are passed over."""
        with trio.fail_after(GUARD):
            while True:
                frame = await self.next_frame()
                if wanted(frame):
                    return frame


@contextlib.asynccontextmanager
async def station(name: str, *, listening: bool = True, **options: Any) -> AsyncIterator[Station]:
    """A network device called ``name`` with these options, served and driven."""
    device = Net(name, NetOptions(**options), 1, 256)
    async with attach(device, queue_size=128) as driver:
        found = Station(device, driver)
        if listening:
            found.listen()
        yield found


async def joined(*stations: Station) -> None:
    """Returns once a frame of each reaches the other; what is sent to nobody is lost, as on a wire."""
    one, other = stations
    for sender, receiver in ((one, other), (other, one)):
        with trio.fail_after(GUARD):
            while True:
                await sender.send(b"are you there?")
                with trio.move_on_after(0.05):
                    await receiver.next_frame()
                    break
    # What was sent while only one of them knew the other is on its way, or gone.
    for sender, receiver in ((one, other), (other, one)):
        last = await sender.send(os.urandom(20))
        assert await receiver.wait_for(last.__eq__)


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port of this machine that nobody has, a moment ago."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
