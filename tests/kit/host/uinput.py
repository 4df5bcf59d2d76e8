"""Input devices that the kernel makes of what a test writes to /dev/uinput (linux/uinput.h)."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from virtio.devices.host.ioctl import ior, iow

NODE: Final = Path("/dev/uinput")
EVENT: Final = struct.Struct("=qqHHi")
EV_SYN, EV_KEY, EV_ABS, EV_LED = 0, 1, 3, 0x11
REPORT: Final = (EV_SYN, 0, 0)

_KIND: Final = ord("U")
_CREATE, _DESTROY = _KIND << 8 | 1, _KIND << 8 | 2
_SETUP: Final = struct.Struct("=4H80sI")  # bus type, vendor, product, version, name, effects
_ABS_SETUP: Final = struct.Struct("=H2x6i")  # axis, value, minimum, maximum, fuzz, flat, resolution
_SET_EVBIT: Final = iow(_KIND, 100, 4)
_SET_CODE: Final = {EV_KEY: iow(_KIND, 101, 4), EV_ABS: iow(_KIND, 103, 4), EV_LED: iow(_KIND, 105, 4)}
_SYSNAME_SIZE: Final = 32

Event = tuple[int, int, int]


class InputDevice:
    """A device with these ``codes`` for as long as the block lasts, or until it is unplugged; ``path`` is its node."""

    def __init__(self, name: str, codes: Mapping[int, Sequence[int]], ids: tuple[int, int, int, int]) -> None:
        self._fd = os.open(NODE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        for kind, numbers in codes.items():
            fcntl.ioctl(self._fd, _SET_EVBIT, kind)
            for code in numbers:
                fcntl.ioctl(self._fd, _SET_CODE[kind], code)
                if kind == EV_ABS:
                    setup = _ABS_SETUP.pack(code, 0, -100, 100, 1, 2, 3)
                    fcntl.ioctl(self._fd, iow(_KIND, 4, _ABS_SETUP.size), setup)
        fcntl.ioctl(self._fd, iow(_KIND, 3, _SETUP.size), _SETUP.pack(*ids, name.encode(), 0))
        fcntl.ioctl(self._fd, _CREATE)
        sysname = fcntl.ioctl(self._fd, ior(_KIND, 44, _SYSNAME_SIZE), bytes(_SYSNAME_SIZE)).rstrip(b"\0").decode()
        (entry,) = Path("/sys/devices/virtual/input", sysname).glob("event*")
        self.path = Path("/dev/input", entry.name)

    def __enter__(self) -> InputDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def send(self, *events: Event) -> None:
        os.write(self._fd, b"".join(EVENT.pack(0, 0, *event) for event in events))

    def lights(self) -> list[Event]:
        """What was asked of it since the last time."""
        return read_events(self._fd)

    def unplug(self) -> None:
        fcntl.ioctl(self._fd, _DESTROY)


def read_events(fd: int) -> list[Event]:
    """All that wait there."""
    try:
        return [event[2:] for event in EVENT.iter_unpack(os.read(fd, 64 * EVENT.size))]
    except BlockingIOError:
        return []
