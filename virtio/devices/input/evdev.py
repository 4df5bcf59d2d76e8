"""An input device of this host, by its character device (linux/input.h)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import structlog
import trio

from virtio.devices.host.device_node import open_node
from virtio.devices.host.ioctl import call, ior, iow
from virtio.devices.input.codes import CODE_COUNTS, EV_ABS, EV_KEY, EV_LED, EV_SND, EV_SYN, SYN_DROPPED, SYN_REPORT
from virtio.devices.input.source import Description, InputEvent
from virtio.errors import HostError

_EVENT: Final = struct.Struct("=qqHHi")  # struct input_event on 64 bits: time, type, code, value
_IDS: Final = struct.Struct("=4H")
_ABSINFO: Final = struct.Struct("=6i")  # value, minimum, maximum, fuzz, flat, resolution
_KIND: Final = ord("E")
_TEXT_SIZE: Final = 128
_EVIOCGID: Final = ior(_KIND, 0x02, _IDS.size)
_EVIOCGNAME: Final = ior(_KIND, 0x06, _TEXT_SIZE)
_EVIOCGUNIQ: Final = ior(_KIND, 0x08, _TEXT_SIZE)
_EVIOCGPROP: Final = ior(_KIND, 0x09, 4)
_EVIOCGKEY: Final = ior(_KIND, 0x18, CODE_COUNTS[EV_KEY] // 8)
_EVIOCGRAB: Final = iow(_KIND, 0x90, 4)
EVENTS_AT_ONCE: Final = 64
REPORT_MAX: Final = 512
"""Events of one report; what comes beyond is cut off into the next one."""

log = structlog.get_logger()


class EvdevSource:
    """The device at ``path``; with ``grab`` the host's own programs no longer see its events. ``HostError``."""

    def __init__(self, path: Path, *, grab: bool) -> None:
        self._path = path
        self._what = f"evdev {path}"
        self.emit: Callable[[Sequence[InputEvent]], bool] = lambda report: False
        self._report: list[InputEvent] = []
        self._lost = False
        self._down: set[int] = set()
        self._fd = open_node(
            path,
            self._what,
            missing="the devices of this host are /dev/input/event*",
            forbidden="let the daemon's user read and write it (usually by the group input)",
            flags=os.O_NONBLOCK,
        )
        try:
            self.description = self._describe()
            if grab:
                self._grab()
        except BaseException:
            self._fd.close()
            raise

    def _grab(self) -> None:
        try:
            fcntl.ioctl(self._fd.fileno(), _EVIOCGRAB, 1)
        except OSError as error:
            advice = "; somebody else has grabbed it" if error.errno == errno.EBUSY else ""
            reason = f"{self._what}: {os.strerror(error.errno or 0)}{advice}"
            raise HostError(reason, errno=error.errno or 0) from error

    def _describe(self) -> Description:
        fd = self._fd.fileno()
        bits: dict[int, bytes] = {}
        for kind, count in CODE_COUNTS.items():
            size = (count + 7) // 8
            found = call(fd, ior(_KIND, 0x20 + kind, size), bytes(size), self._what).rstrip(b"\0")
            if found:
                bits[kind] = found
        axes = {
            axis: self._axis(axis)[1:]
            for axis in range(CODE_COUNTS[EV_ABS])
            if int.from_bytes(bits.get(EV_ABS, b""), "little") >> axis & 1
        }
        ids = _IDS.unpack(call(fd, _EVIOCGID, bytes(_IDS.size), self._what))
        return Description(
            label=call(fd, _EVIOCGNAME, bytes(_TEXT_SIZE), self._what).split(b"\0", 1)[0],
            serial=self._serial(),
            ids=(ids[0], ids[1], ids[2], ids[3]),
            properties=call(fd, _EVIOCGPROP, bytes(4), self._what).rstrip(b"\0"),
            bits=bits,
            axes={axis: (a[0], a[1], a[2], a[3], a[4]) for axis, a in axes.items()},
        )

    def _axis(self, axis: int) -> tuple[int, ...]:
        request = ior(_KIND, 0x40 + axis, _ABSINFO.size)
        return _ABSINFO.unpack(call(self._fd.fileno(), request, bytes(_ABSINFO.size), self._what))

    def _serial(self) -> bytes:
        try:
            return call(self._fd.fileno(), _EVIOCGUNIQ, bytes(_TEXT_SIZE), self._what).split(b"\0", 1)[0]
        except HostError:
            return b""  # most have none

    async def status(self, event: InputEvent) -> bool:
        supported = int.from_bytes(self.description.bits.get(event.type, b""), "little")
        if event.code >= CODE_COUNTS[event.type] or not supported >> event.code & 1:
            return False
        try:
            data = _EVENT.pack(0, 0, *event) + _EVENT.pack(0, 0, EV_SYN, SYN_REPORT, 0)
            return os.write(self._fd.fileno(), data) == len(data)
        except OSError:
            return False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        try:
            while True:
                await trio.lowlevel.wait_readable(self._fd.fileno())
                for _, _, kind, code, value in _EVENT.iter_unpack(self._read()):
                    self._take(InputEvent(kind, code, value))
        except (OSError, HostError) as error:
            log.warning(f"{self._what}: it is gone", error=str(error))
            self.emit([InputEvent(EV_KEY, code, 0) for code in self._down])  # no key stays down for ever

    def _read(self) -> bytes:
        try:
            return os.read(self._fd.fileno(), EVENTS_AT_ONCE * _EVENT.size)
        except BlockingIOError:
            return b""

    def _take(self, event: InputEvent) -> None:
        if event.type == EV_SYN:
            if event.code == SYN_DROPPED:  # what comes up to the next report is not whole
                self._lost = True
            elif event.code == SYN_REPORT:
                report, self._report = self._report, []
                if self._lost:
                    self._lost = False
                    report = self._state()
                if report:
                    self.emit(report)
        elif event.type in (EV_LED, EV_SND):
            pass  # what the guest itself has switched: the kernel tells it to all readers, and the guest would answer
        elif event.type in CODE_COUNTS and not self._lost:
            if event.type == EV_KEY:
                (self._down.add if event.value else self._down.discard)(event.code)
            self._report.append(event)
            if len(self._report) == REPORT_MAX:
                report, self._report = self._report, []
                self.emit(report)

    def _state(self) -> list[InputEvent]:
        """All keys and axes as they are, for we missed how they came to be so."""
        size = CODE_COUNTS[EV_KEY] // 8
        pressed = int.from_bytes(call(self._fd.fileno(), _EVIOCGKEY, bytes(size), self._what), "little")
        down = {code for code in range(CODE_COUNTS[EV_KEY]) if pressed >> code & 1}
        changes = [InputEvent(EV_KEY, code, int(code in down)) for code in sorted(down ^ self._down)]
        self._down = down
        return changes + [InputEvent(EV_ABS, axis, self._axis(axis)[0]) for axis in self.description.axes]

    def close(self) -> None:
        self._fd.close()
