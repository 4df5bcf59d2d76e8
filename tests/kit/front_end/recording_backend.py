"""A back-end for tests of transports: implements the waist by writing down what it is told."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from virtio.fd import OwnedFd
from virtio.native.interrupt import InterruptStatus
from virtio.waist import Doorbell, Event, MemoryRegion, QueueSetup


class RecordingBackend:
    """Records each verb in ``calls`` and owns what it is given as the real back-end does.

    ``failures[verb]`` is raised at the verb's next call; ``stopping[i]`` is waited for by ``stop_queue(i)``;
    ``bases[i]`` is what it answers; ``post`` makes an event.
    """

    def __init__(self, *, queue_count: int = 2, features: int = 0) -> None:
        self.name = "disk0"
        self.device_id = 2
        self.queue_count = queue_count
        self.queue_size_max = 256
        self.status = 0
        self.features = features
        self.calls: list[tuple[object, ...]] = []
        self.failures: dict[str, Exception] = {}
        self.config = bytearray(range(256))
        self.bases: dict[int, int] = {}
        self.regions: tuple[MemoryRegion, ...] = ()
        self.fds: dict[tuple[str, int], OwnedFd] = {}
        self.stopping: dict[int, trio.Event] = {}
        self._post, self._events = trio.open_memory_channel[Event](100)
        self._bell = trio.Event()

    def post(self, event: Event) -> None:
        self._post.send_nowait(event)

    def verbs(self) -> list[object]:
        return [call[0] for call in self.calls]

    async def called(self, verb: str, times: int = 1) -> None:
        """Wait until ``verb`` has been called that often."""
        with trio.fail_after(20):
            while self.verbs().count(verb) < times:
                await self._bell.wait()

    def close(self) -> None:
        for fd in self.fds.values():
            fd.close()
        self._replace_memory(())

    def _record(self, verb: str, *arguments: object) -> None:
        self.calls.append((verb, *arguments))
        self._bell.set()
        self._bell = trio.Event()
        if verb in self.failures:
            raise self.failures.pop(verb)

    def _take(self, kind: str, index: int, fd: OwnedFd | None) -> None:
        old = self.fds.pop((kind, index), None)
        if old is not None:
            old.close()
        if fd is not None:
            self.fds[kind, index] = fd

    def _replace_memory(self, regions: tuple[MemoryRegion, ...]) -> None:
        for old in self.regions:
            if old not in regions:
                old.fd.close()
        self.regions = regions

    def set_status(self, status: int) -> None:
        self._record("set_status", status)
        self.status = status

    has_config_space = True

    def device_features(self) -> int:
        return self.features

    def set_driver_features(self, bits: int) -> None:
        self._record("set_driver_features", bits)

    def read_config(self, offset: int, size: int) -> bytes:
        self._record("read_config", offset, size)
        return bytes(self.config[offset : offset + size])

    def write_config(self, offset: int, data: bytes) -> None:
        self._record("write_config", offset, data)
        self.config[offset : offset + len(data)] = data

    def set_mtu(self, mtu: int) -> None:
        self._record("set_mtu", mtu)

    async def announce(self, address: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._record("announce", address)

    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        await trio.lowlevel.checkpoint()
        try:
            self._record("set_memory", tuple(regions))
        except Exception:
            for one in regions:
                if one not in self.regions:
                    one.fd.close()
            raise
        self._replace_memory(tuple(regions))

    async def iotlb_update(self, iova: int, size: int, uva: int, perm: int) -> None:
        await trio.lowlevel.checkpoint()
        self._record("iotlb_update", iova, size, uva, perm)

    async def iotlb_invalidate(self, iova: int, size: int) -> None:
        await trio.lowlevel.checkpoint()
        self._record("iotlb_invalidate", iova, size)

    async def configure_queue(self, index: int, setup: QueueSetup) -> None:
        await trio.lowlevel.checkpoint()
        self._record("configure_queue", index, setup)

    async def set_kick(self, index: int, fd: OwnedFd | None) -> None:
        self._take("kick", index, fd)
        await trio.lowlevel.checkpoint()
        self._record("set_kick", index, fd is not None)

    async def set_doorbell(self, index: int, kind: Doorbell, fd: OwnedFd | None) -> None:
        self._take(kind.label, index, fd)
        await trio.lowlevel.checkpoint()
        self._record("set_doorbell", index, kind, fd is not None)

    def set_interrupt_status(self, status: InterruptStatus | None) -> None:
        self._record("set_interrupt_status", status is not None)

    async def set_call(self, index: int, fd: OwnedFd | None) -> None:
        self._take("call", index, fd)
        await trio.lowlevel.checkpoint()
        self._record("set_call", index, fd is not None)

    async def set_err(self, index: int, fd: OwnedFd | None) -> None:
        self._take("err", index, fd)
        await trio.lowlevel.checkpoint()
        self._record("set_err", index, fd is not None)

    async def enable_queue(self, index: int, on: bool) -> None:
        await trio.lowlevel.checkpoint()
        self._record("enable_queue", index, on)

    async def stop_queue(self, index: int) -> int:
        await trio.lowlevel.checkpoint()
        self._record("stop_queue", index)
        if index in self.stopping:
            await self.stopping[index].wait()
        self._take("kick", index, None)
        return self.bases.get(index, 0)

    async def suspend_queue(self, index: int) -> int:
        await trio.lowlevel.checkpoint()
        self._record("suspend_queue", index)
        return self.bases.get(index, 0)

    async def reset(self, *, keep_memory: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        self._record("reset")
        self.status = 0
        for index in range(self.queue_count):
            self._take("kick", index, None)
        if not keep_memory:
            self._replace_memory(())

    async def next_event(self) -> Event:
        return await self._events.receive()
