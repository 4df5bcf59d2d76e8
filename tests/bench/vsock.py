"""How fast bytes go through the socket device: ``python -m tests.bench.vsock``.

The driver is the tests' own, on the same thread as the device, so what arrives in a second says little of the device.
Hence the second figure: what the device would move if the processor did nothing but what it does for the packets. The
program on the host is another process.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from tests.kit.guest.vsock import CID, CREDIT_UPDATE, RECEIVE_QUEUE, RW, TRANSMIT_QUEUE, GuestSocket, VsockGuest
from virtio.device import Chain, Queue
from virtio.devices.vsock.device import Vsock
from virtio.devices.vsock.options import VsockOptions
from virtio.testing import TestDriver, attach

MIB: Final = 1 << 20
TOTAL: Final = 128 * MIB
PORT: Final = 1024
SIZES: Final = (65536, 4096)
"""Bytes of a packet: the largest that Linux sends, and the buffers that Linux receives into."""

HOST_PROGRAM: Final = """
import socket, sys
path, what, total = sys.argv[1], sys.argv[2], int(sys.argv[3])
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
print("ready", flush=True)
stream, _ = listener.accept()
room = bytearray(1 << 20)
while total > 0:
    total -= stream.recv_into(room) if what == "read" else stream.send(memoryview(room)[:total])
stream.recv(1)
"""


class TimedVsock(Vsock):
    """Counts the processor time that its packets take."""

    seconds = 0.0

    async def handle(self, queue: Queue, chain: Chain) -> None:
        start = time.thread_time()
        await super().handle(queue, chain)
        self.seconds += time.thread_time() - start

    def _fill_one(self, chain: Chain) -> bool:
        start = time.thread_time()
        filled = super()._fill_one(chain)
        self.seconds += time.thread_time() - start
        return filled


async def to_host(driver: TestDriver, inside: GuestSocket, size: int) -> None:
    queue = driver.queues[TRANSMIT_QUEUE]
    packet = inside.guest.packet(RW, inside.port, PORT, bytes(size))
    at_once = 131072 // size  # the credit that there is once all was delivered
    while inside.sent < TOTAL:
        while inside.credit < at_once * size:
            assert (await inside.hear()).op == CREDIT_UPDATE
        for _ in range(min(at_once, 48)):
            queue.driver.add([packet], [])
            inside.sent += size
        queue.kick()
        await queue.used(min(at_once, 48))


async def to_guest(inside: GuestSocket, size: int) -> None:
    queue = inside.guest.driver.queues[RECEIVE_QUEUE]
    told = 0
    while inside.received < TOTAL:
        used = await queue.used()
        inside.received += sum(each.written - 44 for each in used)
        inside.guest.post(len(used))
        if inside.received - told >= 131072:
            told = inside.received
            await inside.say(CREDIT_UPDATE)


async def measure(direction: str, size: int) -> tuple[float, float]:
    """MiB a second, and MiB for each second of the device's processor time."""
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as name:
        folder = Path(name)
        device = TimedVsock("vsock", VsockOptions(cid=CID, path=folder / "vsock"), 1, 64)
        async with attach(device, memory_size=32 * MIB) as driver:
            what = "read" if direction == "guest to host" else "write"
            command = [sys.executable, "-c", HOST_PROGRAM, str(folder / f"vsock_{PORT}"), what, str(TOTAL)]
            async with trio.open_nursery() as nursery:
                program = await nursery.start(partial(trio.run_process, command, stdout=subprocess.PIPE, check=False))
                said = bytes(await program.stdout.receive_some())
                assert said.startswith(b"ready"), said
                guest = VsockGuest(driver, room=size, buffers=60)
                inside = await guest.connect(5000, PORT)
                start = time.perf_counter()
                if what == "read":
                    await to_host(driver, inside, size)
                else:
                    await to_guest(inside, size)
                seconds = time.perf_counter() - start
                program.kill()
    return TOTAL / MIB / seconds, TOTAL / MIB / device.seconds


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    for direction in ("guest to host", "host to guest"):
        for size in SIZES:
            whole, device = trio.run(measure, direction, size)
            print(f"{direction}, {size} bytes a packet: {whole:.0f} MiB/s, device alone {device:.0f}", flush=True)


if __name__ == "__main__":
    main()
