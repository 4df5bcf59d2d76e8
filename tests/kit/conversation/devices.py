"""A device of every type in one daemon, with default keys, and for each a proof that its rings serve a guest."""

from __future__ import annotations

import os
import socket
import struct
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final

import trio
from kit.guest.blk import BlkDriver, pattern
from kit.guest.i2c import header as i2c_header
from kit.guest.vsock import VsockGuest, pair
from kit.host.line_client import talking

from virtio.devices.net.address import mac_from_name
from virtio.testing.driver import GuestMemory
from virtio.testing.queue import GUARD, GuestQueue

DISK_SIZE: Final = 1 << 20
BUFFERS: Final = 8
NET_HEADER: Final = bytes(12)
CONFIGURATION: Final = """
[daemon]
metrics = "off"

[devices.blk]
type = "blk"
backend = "memory"
size = 1048576
socket = "blk.sock"

[devices.console]
type = "console"
backend = "socket"
path = "terminal"
socket = "console.sock"

[devices.gpio]
type = "gpio"
lines = ["button", "led"]
socket = "gpio.sock"

[devices.i2c]
type = "i2c"
socket = "i2c.sock"

[[devices.i2c.chips]]
kind = "eeprom"
address = 0x50

[devices.input]
type = "input"
control = "keys"
socket = "input.sock"

[devices.net]
type = "net"
backend = "socket"
local = "unixgram:FOLDER/net.local"
remote = "unixgram:FOLDER/net.remote"
socket = "net.sock"

[devices.net-config]
type = "net"
backend = "socket"
local = "unixgram:FOLDER/net-config.local"
remote = "unixgram:FOLDER/net-config.remote"
offer_config = true
socket = "net-config.sock"

[devices.net-connects]
type = "net"
backend = "socket"
local = "unixgram:FOLDER/net-connects.local"
remote = "unixgram:FOLDER/net-connects.remote"
mode = "connect"
socket = "net-connects.sock"

[devices.own]
type = "./echo.py:Echo"
socket = "own.sock"

[devices.rng]
type = "rng"
socket = "rng.sock"

[devices.vsock]
type = "vsock"
cid = 7
path = "vsock"
socket = "vsock.sock"
"""
ECHO: Final = '''
from typing import ClassVar

from virtio import Chain, Device, Queue


class Echo(Device):
    """Writes back what it reads."""

    virtio_id: ClassVar[int] = 42
    type_name = "echo"

    def config_space(self) -> bytes:
        return bytes([7, 0, 0, 0])

    async def handle(self, queue: Queue, chain: Chain) -> None:
        chain.write(chain.read())
'''


class Machine:
    """The guest's rings as one driver has laid them."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.features = 0
        self.queues: list[GuestQueue] = []
        self.driver: object = None  # what a proof keeps as long as these rings live

    def forget(self) -> None:
        for queue in self.queues:
            ring = queue.driver
            for area, size in zip((ring.desc, ring.avail, ring.used_area), ring.area_sizes, strict=True):
                self.memory.release(area, size)
            queue.close()
        self.queues.clear()
        self.driver = None

    def first_time(self) -> bool:
        """Whether this driver has not been here before."""
        is_first = self.driver is None
        self.driver = self.driver or True
        return is_first

    def post(self, queue: int, size: int, count: int = BUFFERS) -> None:
        for _ in range(count):
            self.queues[queue].driver.add([], [size])
        self.queues[queue].kick()


class Proof(ABC):
    """That a device serves: requests of its type, there and back. ``config`` is how its config space begins."""

    queues = 1
    config = b""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.turn = 0

    def close(self) -> None:  # noqa: B027  # most have nothing to close
        """Give up what the host's side has."""

    async def use(self, machine: Machine) -> None:
        self.turn += 1
        with trio.fail_after(GUARD):
            await self._serves(machine)

    @abstractmethod
    async def _serves(self, machine: Machine) -> None: ...

    def check_config(self, offset: int, data: bytes) -> None:
        expected = self.config[offset:][: len(data)]
        assert data[: len(expected)] == expected, f"the config space holds {data.hex()} at {offset}"


class Disk(Proof):
    config = struct.pack("<Q", DISK_SIZE // 512)

    async def _serves(self, machine: Machine) -> None:
        disk = BlkDriver(machine.queues[0])
        await disk.write(8, pattern(8192, self.turn))
        assert await disk.read(8, 8192) == pattern(8192, self.turn)
        if machine.features >> 9 & 1:
            await disk.flush()


class Console(Proof):
    queues = 2

    async def _serves(self, machine: Machine) -> None:
        if machine.first_time():
            machine.post(0, 64)
        async with await trio.open_unix_socket(self.folder / "terminal") as host:
            await machine.queues[1].request([b"login: "], [])
            assert await host.receive_some() == b"login: "
            await host.send_all(b"root\n")
            (used,) = await machine.queues[0].used()
            assert used.buffers[0][: used.written] == b"root\n"
            machine.post(0, 64, 1)


class Gpio(Proof):
    queues = 2
    config = struct.pack("<HHI", 2, 0, len(b"button\0led\0"))

    async def _serves(self, machine: Machine) -> None:
        for kind, value, answer in ((3, 1, b"\0\0"), (5, 1, b"\0\0"), (4, 0, b"\0\1"), (5, 0, b"\0\0")):
            used = await machine.queues[0].request([struct.pack("<HHI", kind, 1, value)], [2])
            assert used.buffers[0] == answer


class I2c(Proof):
    async def _serves(self, machine: Machine) -> None:
        queue = machine.queues[0]
        # Three requests of up to three descriptors: a ring of four holds them where they are indirect.
        indirect = bool(machine.features >> 28 & 1)
        queue.driver.add([i2c_header(0x50, 0), bytes([0, self.turn])], [1], indirect=indirect)
        queue.driver.add([i2c_header(0x50, 1), b"\0"], [1], indirect=indirect)
        queue.driver.add([i2c_header(0x50, 2)], [1, 1], indirect=indirect)
        queue.kick()
        used = await queue.used(3)
        assert [b"".join(each.buffers)[-1] for each in used] == [0, 0, 0]
        assert used[2].buffers[0] == bytes([self.turn])


class Keyboard(Proof):
    queues = 2

    async def _serves(self, machine: Machine) -> None:
        if machine.first_time():
            machine.post(0, 8, 4)
        async with talking(self.folder / "keys") as keys:
            assert await keys.command("key KEY_A tap") == ["ok"]
        used = await machine.queues[0].used(4)
        events = [struct.unpack("<HHi", each.buffers[0]) for each in used]
        assert events == [(1, 30, 1), (0, 0, 0), (1, 30, 0), (0, 0, 0)]
        machine.post(0, 8, 4)


class Network(Proof):
    queues = 3

    def __init__(self, folder: Path, name: str = "net") -> None:
        super().__init__(folder)
        self.name = name
        self.config = mac_from_name(name)
        self._peer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._peer.bind(str(folder / f"{name}.remote"))
        self._peer.setblocking(False)

    def close(self) -> None:
        self._peer.close()

    async def _serves(self, machine: Machine) -> None:
        if machine.first_time():
            machine.post(0, 2048)
        sent = b"\xff" * 6 + self.config + b"\x88\xb5" + pattern(100, self.turn)
        assert (await machine.queues[1].request([NET_HEADER, sent], [])).written == 0
        await trio.lowlevel.wait_readable(self._peer)
        assert self._peer.recv(2048) == sent
        answer = self.config + sent[6:]
        self._peer.sendto(answer, str(self.folder / f"{self.name}.local"))
        (used,) = await machine.queues[0].used()
        assert used.buffers[0][12 : used.written] == answer
        machine.post(0, 2048, 1)


class Own(Proof):
    config = b"\x07"

    async def _serves(self, machine: Machine) -> None:
        text = os.urandom(100)
        assert (await machine.queues[0].request([text], [100])).buffers == [text]


class Entropy(Proof):
    async def _serves(self, machine: Machine) -> None:
        used = await machine.queues[0].request([], [64])
        assert used.written == 64
        assert len(set(used.buffers[0])) > 16


class Socket(Proof):
    queues = 3
    config = struct.pack("<Q", 7)

    async def _serves(self, machine: Machine) -> None:
        if not isinstance(machine.driver, VsockGuest):
            machine.driver = VsockGuest(machine, cid=7, buffers=BUFFERS)
        port = 1024 + self.turn
        inside, outside = await pair(machine.driver, self.folder, port)
        await inside.send(b"well?")
        assert await outside.receive(5) == b"well?"
        await outside.send(b"well!")
        assert await inside.receive(5) == b"well!"
        await inside.say(3)  # a reset
        await outside.at_end()
        outside.close()


PROOFS: Final[dict[str, type[Proof]]] = {
    "blk": Disk,
    "console": Console,
    "gpio": Gpio,
    "i2c": I2c,
    "input": Keyboard,
    "net": Network,
    "own": Own,
    "rng": Entropy,
    "vsock": Socket,
}


def write_configuration(folder: Path) -> Path:
    """The file that a daemon is started with."""
    (folder / "echo.py").write_text(ECHO)
    file = folder / "all.toml"
    file.write_text(CONFIGURATION.replace("FOLDER", str(folder)))
    return file
