"""The two ways to a device: straight to the back-end's verbs, or message by message over a vhost-user socket."""

from __future__ import annotations

import os
import socket
import struct
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final

import kit.front_end.vhost_user_wire as wire
import trio

from virtio.backend.backend import Backend
from virtio.fd import OwnedFd
from virtio.testing.driver import GuestMemory
from virtio.waist import AddressSpace, ConfigChanged, MemoryRegion, QueueSetup

F_ACCESS_PLATFORM: Final = 1 << 33


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
        await self._agree_on_protocol()
        (count,) = struct.unpack("=Q", await self.front_end.ask(17))
        return int(count)

    async def negotiate(self, features: int) -> None:
        await self.front_end.negotiate(features | wire.F_PROTOCOL_FEATURES, await self._agree_on_protocol())

    async def _agree_on_protocol(self) -> int:
        """Accept every protocol feature that is offered; as owner, as front-ends do that are not QEMU."""
        await self.front_end.send(wire.message(3))
        offered = int.from_bytes(await self.front_end.ask(15), "little")
        await self.front_end.send(wire.message(16, wire.u64(offered)))
        return offered

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
