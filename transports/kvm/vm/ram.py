"""Guest memory of a VM of ours: a memory file that devices can map too, sealed so that nobody shrinks it."""

from __future__ import annotations

import fcntl
import os
from types import TracebackType
from typing import Final

from virtio.errors import HostError
from virtio.fd import OwnedFd

RAM_MAX: Final = 0xC000_0000
"""Above lie the device windows and the interrupt controllers: guest memory is one piece below 4 GiB."""
PAGE: Final = 4096


class GuestRam:
    """``size`` bytes from guest physical address 0 on. A context manager."""

    def __init__(self, size: int) -> None:
        if not 0 < size <= RAM_MAX or size % PAGE:
            raise ValueError(f"guest memory of {size:#x} bytes: up to {RAM_MAX:#x}, in whole pages")
        self.size = size
        try:
            self.fd = OwnedFd(os.memfd_create("hyperbell-guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(self.fd.fileno(), size)
            fcntl.fcntl(self.fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except OSError as error:
            raise HostError(f"{size:#x} bytes of guest memory: {error.strerror}", errno=error.errno or 0) from error

    def write(self, gpa: int, data: bytes) -> None:
        """Copy ``data`` to ``gpa``. ``ValueError``: it lies outside; ``HostError``: the host has no memory left."""
        view = memoryview(data).cast("B")
        self._check(gpa, len(view))
        while view:
            try:
                done = os.pwrite(self.fd.fileno(), view, gpa)
            except OSError as error:
                raise HostError(f"guest memory at {gpa:#x}: {error.strerror}", errno=error.errno or 0) from error
            view, gpa = view[done:], gpa + done

    def read(self, gpa: int, length: int) -> bytes:
        self._check(gpa, length)
        parts = []
        while length:
            part = os.pread(self.fd.fileno(), length, gpa)
            parts.append(part)
            gpa, length = gpa + len(part), length - len(part)
        return b"".join(parts)

    def _check(self, gpa: int, length: int) -> None:
        if gpa < 0 or length < 0 or gpa + length > self.size:
            raise ValueError(f"{length:#x} bytes at {gpa:#x} are not in guest memory of {self.size:#x} bytes")

    def close(self) -> None:
        """The memory itself lives on for as long as a VM or a device has it mapped."""
        self.fd.close()

    def __enter__(self) -> GuestRam:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
