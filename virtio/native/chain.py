"""A descriptor chain as a Python device sees it: bytes to read, room to write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtio.dataplane import ffi, lib

if TYPE_CHECKING:
    from virtio.native.pump import Queue


class Chain:
    """One buffer the driver made available (section 2.6).

    ``readable_length`` bytes came from the driver, ``writable_length`` bytes may be written back. Reads and writes
    go on where the last one ended. ``op`` (an index into the device's ``ops``) and ``failed`` are for the metrics.
    After the chain went back to the driver its memory is not touched any more: using it raises ``ValueError``. One that
    was kept for too long when its queue stopped went back without the device: writing to it and completing it have no
    effect then.
    """

    __slots__ = (
        "_pointer", "_queue", "_read", "failed", "head", "op", "readable_length", "taken", "withdrawn",
        "writable_length", "written",
    )  # fmt: skip

    def __init__(self, queue: Queue, pointer: Any) -> None:
        info = ffi.new("struct chain_info *")
        lib.chain_info(pointer, info)
        self._queue = queue
        self._pointer = pointer
        self._read = 0
        self.head: int = info.head
        self.readable_length: int = info.readable_len
        self.writable_length: int = info.writable_len
        self.written = 0
        self.op = 0
        self.failed = False
        self.taken = False
        self.withdrawn = False  # the queue could not wait for it any longer

    def _alive(self) -> Any:
        if self._pointer is None:
            raise ValueError("the chain went back to the driver already")
        return self._pointer

    def read(self, length: int = -1) -> bytes:
        """Up to ``length`` of the device-readable bytes that were not read yet (all of them by default)."""
        pointer = self._alive()
        left = self.readable_length - self._read
        length = left if length < 0 else min(length, left)
        if length == 0:
            return b""
        buffer = bytearray(length)
        done = lib.chain_read(pointer, self._read, ffi.from_buffer(buffer), length)
        self._read += done
        return bytes(buffer)

    def read_into(self, room: memoryview) -> int:
        """Like ``read``, but into ``room``, as far as it goes: without a copy in between. Returns how many bytes."""
        length = min(room.nbytes, self.readable_length - self._read)
        if length == 0:
            return 0
        done: int = lib.chain_read(self._alive(), self._read, ffi.from_buffer(room, require_writable=True), length)
        self._read += done
        return done

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append ``data`` to the device-writable bytes; returns how many bytes fitted."""
        if self.withdrawn:
            return 0
        buffer = ffi.from_buffer(data)  # counts bytes, however wide the items of a view are
        done: int = lib.chain_write(self._alive(), self.written, buffer, len(buffer)) if len(buffer) else 0
        self.written += done
        return done

    def take(self) -> Chain:
        """Keep the chain beyond ``handle``; it must be given back with ``complete``, soon when the queue stops."""
        self._alive()
        self.taken = True
        return self

    def complete(self) -> None:
        """Return a taken chain to the driver with what was written to it, and notify."""
        if not self.taken:
            raise ValueError("only a chain that was taken is completed by hand")
        self._queue.push([self])

    @property
    def returned(self) -> bool:
        """It went back to the driver."""
        return self._pointer is None

    def account(self) -> None:
        """For the pump: tell the metrics which operation this was and whether it failed."""
        lib.chain_time(self._alive(), self.op, self.failed)

    def release(self) -> Any:
        """For the pump: the handle, which the caller now owns."""
        pointer, self._pointer = self._alive(), None
        return pointer
