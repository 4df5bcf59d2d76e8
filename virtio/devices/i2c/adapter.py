"""An I2C adapter of this host, by its character device (linux/i2c-dev.h)."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

import trio
from construct import Int16un, Int32un, Int64un, Padding, Struct

from virtio.devices.host.device_node import open_node
from virtio.devices.host.ioctl import call, call_with_result
from virtio.devices.i2c.bus import Segment
from virtio.errors import HostError

_I2C_FUNCS: Final = 0x0705
_I2C_RDWR: Final = 0x0707
_FUNC_I2C: Final = 0x1
_FUNC_10BIT_ADDR: Final = 0x2
_M_RD: Final = 0x0001
_M_TEN: Final = 0x0010

_EVERYDAY: Final = (errno.ENXIO, errno.EREMOTEIO, errno.EIO, errno.EOPNOTSUPP, errno.ETIMEDOUT, errno.EAGAIN)
"""A chip that does not answer, an adapter that cannot do that, a bus that somebody else took: none of our failures."""

_MESSAGE = Struct("addr" / Int16un, "flags" / Int16un, "len" / Int16un, Padding(2), "buf" / Int64un)
_TRANSFER = Struct("msgs" / Int64un, "nmsgs" / Int32un, Padding(4))


class AdapterBus:
    """The chips at ``addresses`` behind the adapter at ``path``. ``HostError``: it cannot be had."""

    def __init__(self, path: Path, addresses: Collection[int]) -> None:
        self._path = path
        self._addresses = frozenset(addresses)
        # A transaction takes as long as the chips want it to, up to the adapter's own timeout.
        self._thread = trio.CapacityLimiter(1)
        self._fd = open_node(
            path,
            f"adapter {path}",
            missing="load i2c-dev, then this host's adapters are /dev/i2c-*",
            forbidden="let the daemon's user read and write it (usually by the group i2c)",
        )
        try:
            self._check_functions()
        except BaseException:
            self._fd.close()
            raise

    def _check_functions(self) -> None:
        answer = call(self._fd.fileno(), _I2C_FUNCS, bytes(8), f"adapter {self._path} is not an I2C adapter")
        (functions,) = struct.unpack("=Q", answer)
        if not functions & _FUNC_I2C:
            raise HostError(f"adapter {self._path} knows SMBus commands only, and a guest's adapter is more than that")
        if not functions & _FUNC_10BIT_ADDR and any(address > 0x7F for address in self._addresses):
            raise HostError(f"adapter {self._path} has no addresses of ten bits")

    async def transfer(self, segments: Sequence[Segment]) -> list[bytes]:
        if any(segment.address not in self._addresses for segment in segments):
            return []  # no part of a transaction is carried out that cannot be carried out whole
        return await trio.to_thread.run_sync(self._transfer, segments, limiter=self._thread)

    def _transfer(self, segments: Sequence[Segment]) -> list[bytes]:
        buffers = [ctypes.create_string_buffer(s.data, max(1, s.length, len(s.data))) for s in segments]
        messages = ctypes.create_string_buffer(
            b"".join(
                _MESSAGE.build(
                    {
                        "addr": segment.address,
                        "flags": (_M_RD if segment.read else 0) | (_M_TEN if segment.ten_bit else 0),
                        "len": segment.length if segment.read else len(segment.data),
                        "buf": ctypes.addressof(buffer),
                    }
                )
                for segment, buffer in zip(segments, buffers, strict=True)
            )
        )
        request = _TRANSFER.build({"msgs": ctypes.addressof(messages), "nmsgs": len(segments)})
        try:
            done, _ = call_with_result(self._fd.fileno(), _I2C_RDWR, request, f"adapter {self._path}")
        except HostError as error:
            if error.errno in _EVERYDAY:
                return []
            raise
        # Some adapters answer a chip that does not with an error, others with how many messages went well before it.
        return [
            buffer.raw[: segment.length] if segment.read else b""
            for segment, buffer in zip(segments[:done], buffers[:done], strict=True)
        ]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()

    def close(self) -> None:
        self._fd.close()
