"""The back ends on real hardware, with the kernel's answers played by the test: this host need not have any."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from kit.front_end.vhost_user_wire import no_fd_leaks

from virtio.devices.gpio import uapi as gpio_uapi
from virtio.devices.gpio.device import Gpio
from virtio.devices.gpio.options import GpioOptions
from virtio.devices.host import ioctl
from virtio.devices.i2c import adapter as i2c_adapter
from virtio.devices.i2c.device import I2c
from virtio.devices.i2c.options import I2cOptions
from virtio.devices.input import evdev as input_evdev
from virtio.devices.input.codes import CODE_COUNTS
from virtio.devices.input.device import Input
from virtio.devices.input.options import InputOptions
from virtio.errors import HostError
from virtio.testing import attach

FUNC_I2C = 1
KEY_A = 30


class Kernel:
    """Answers to ioctls by number: each gets the buffer and changes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: dict[int, Callable[[int, ctypes.Array[ctypes.c_char]], int | None]] = {}
        monkeypatch.setattr(fcntl, "ioctl", self.ioctl)

    def ioctl(self, fd: int, request: int, argument: object = 0) -> object:
        if request not in self.answers:
            raise OSError(errno.ENOTTY, "as asked")
        buffer = argument if isinstance(argument, ctypes.Array) else ctypes.create_string_buffer(_bytes(argument))
        result = self.answers[request](fd, buffer) or 0
        return buffer.raw[: len(_bytes(argument))] if isinstance(argument, bytes) else result

    def says(self, request: int, content: bytes) -> None:
        def answer(fd: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
            ctypes.memmove(buffer, content, min(len(content), len(buffer)))

        self.answers[request] = answer


def _bytes(argument: object) -> bytes:
    return argument if isinstance(argument, bytes) else struct.pack("=i", argument)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


# --- /dev/i2c-N ---


def adapter(path: Path) -> I2c:
    path.touch()
    return I2c("bus", I2cOptions(backend="adapter", adapter=path, addresses=(0x48,)), 1, 64)


async def test_a_group_is_one_transfer_of_the_adapter(kernel: Kernel, tmp_path: Path) -> None:
    seen: list[tuple[int, int, int, bytes]] = []

    def transfer(fd: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
        messages, count = struct.unpack_from("=QI", buffer.raw)
        for n in range(count):
            address, flags, length, place = struct.unpack("=HHH2xQ", ctypes.string_at(messages + 16 * n, 16))
            seen.append((address, flags, length, ctypes.string_at(place, length)))
            if flags & 1:
                ctypes.memmove(place, b"\x19\x80", length)
        return int(count)

    kernel.says(i2c_adapter._I2C_FUNCS, struct.pack("=Q", FUNC_I2C))
    kernel.answers[i2c_adapter._I2C_RDWR] = transfer
    async with attach(adapter(tmp_path / "i2c-0")) as driver:
        first = driver.queues[0].driver.add([struct.pack("<HHI", 0x90, 0, 1), b"\x05"], [1])
        driver.queues[0].driver.add([struct.pack("<HHI", 0x90, 0, 2)], [2, 1])
        driver.queues[0].kick()
        assert await driver.answers(0, 2) == [(first, b"\0"), (first + 1, b"\x19\x80\0")]
        assert seen == [(0x48, 0, 1, b"\x05"), (0x48, 1, 2, b"\0\0")]
        assert await driver.request(0, struct.pack("<HHI", 0x92, 0, 0), 1) == b"\1", "not one of its addresses"
        assert len(seen) == 2

        def absent(fd: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
            raise OSError(errno.ENXIO, "nobody there")

        kernel.answers[i2c_adapter._I2C_RDWR] = lambda fd, buffer: 1  # of two messages: the chip fell silent
        driver.queues[0].driver.add([struct.pack("<HHI", 0x90, 0, 1), b"\x05"], [1])
        driver.queues[0].driver.add([struct.pack("<HHI", 0x90, 0, 2)], [2, 1])
        driver.queues[0].kick()
        assert [answer for _, answer in await driver.answers(0, 2)] == [b"\0", b"\0\0\1"]
        kernel.answers[i2c_adapter._I2C_RDWR] = absent
        assert await driver.request(0, struct.pack("<HHI", 0x90, 0, 0), 1) == b"\1"
        del kernel.answers[i2c_adapter._I2C_RDWR]
        assert await driver.request(0, struct.pack("<HHI", 0x90, 0, 0), 1) == b"\1"


def test_what_is_no_adapter_or_a_lesser_one_is_refused(kernel: Kernel, tmp_path: Path) -> None:
    with no_fd_leaks():
        with pytest.raises(HostError, match="is not an I2C adapter"):
            adapter(tmp_path / "file")
        kernel.says(i2c_adapter._I2C_FUNCS, bytes(8))
        with pytest.raises(HostError, match="SMBus commands only"):
            adapter(tmp_path / "smbus")


# --- /dev/input/eventN ---


def keyboard_of_the_host(kernel: Kernel, path: Path) -> Input:
    os.mkfifo(path)
    kernel.says(input_evdev._EVIOCGID, struct.pack("=4H", 3, 0x46D, 0xC31C, 0x110))
    kernel.says(input_evdev._EVIOCGNAME, b"A keyboard\0")
    kernel.says(input_evdev._EVIOCGPROP, bytes(4))
    kernel.says(input_evdev._EVIOCGRAB, b"")
    for kind, count in CODE_COUNTS.items():
        bits = {1: 1 << KEY_A | 1 << 48, 3: 1}.get(kind, 0)
        size = (count + 7) // 8
        kernel.says(ioctl.ior(ord("E"), 0x20 + kind, size), bits.to_bytes(size, "little"))
    kernel.says(ioctl.ior(ord("E"), 0x40, 24), struct.pack("=6i", 7, 0, 255, 1, 2, 3))
    kernel.says(input_evdev._EVIOCGKEY, (1 << 48).to_bytes(96, "little"))
    return Input("keys", InputOptions(backend="evdev", evdev=path), 2, 64)


async def test_events_and_facts_of_the_hosts_device_reach_the_guest(kernel: Kernel, tmp_path: Path) -> None:
    path = tmp_path / "event0"
    async with attach(keyboard_of_the_host(kernel, path)) as driver:
        driver.write_config(0, b"\x01\0")
        assert driver.read_config(8, 10) == b"A keyboard"
        driver.write_config(0, b"\x03\0")
        assert driver.read_config(8, 8) == struct.pack("<4H", 3, 0x46D, 0xC31C, 0x110)
        driver.write_config(0, b"\x12\0")
        assert driver.read_config(8, 20) == struct.pack("<5i", 0, 255, 1, 2, 3)
        pressed, report, lost = (1, KEY_A, 1), (0, 0, 0), (0, 3, 0)
        # A light, which is the guest's own; a key; then the kernel's queue overflowed, and by now another key is down.
        light = (0x11, 1, 1)
        order = (light, report, pressed, report, lost, pressed, report)
        sent = b"".join(struct.pack("=qqHHi", 0, 0, *event) for event in order)
        with path.open("wb", buffering=0) as device:
            device.write(sent)
        come = [struct.unpack("<HHi", await driver.request(0, writable=8)) for _ in range(6)]
        assert come == [pressed, report, (1, KEY_A, 0), (1, 48, 1), (3, 0, 7), report]


# --- /dev/gpiochipN ---


class Chip:
    """Two lines, of which the test plays the second."""

    def __init__(self, kernel: Kernel) -> None:
        self.requests: list[tuple[int, int]] = []
        self.value = 0
        self.events: int = -1  # where edges are written
        kernel.answers[gpio_uapi._GET_CHIPINFO] = lambda fd, b: struct.pack_into("=64xI", b, 0, 2)
        kernel.answers[gpio_uapi._GET_LINEINFO] = self.info
        kernel.answers[gpio_uapi._GET_LINE] = self.request
        kernel.answers[gpio_uapi._SET_CONFIG] = self.configure
        kernel.answers[gpio_uapi._GET_VALUES] = lambda fd, b: struct.pack_into("=Q", b, 0, self.value)
        kernel.answers[gpio_uapi._SET_VALUES] = self.set

    def info(self, fd: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        (offset,) = struct.unpack_from("=I", buffer.raw, 64)
        struct.pack_into("=32s", buffer, 0, f"LINE{offset}".encode())

    def request(self, fd: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        (offset,) = struct.unpack_from("=I", buffer.raw)
        (flags,) = struct.unpack_from("=Q", buffer.raw, 288)
        self.requests.append((offset, flags))
        ours, theirs = os.pipe()
        if self.events >= 0:
            os.close(self.events)
        self.events = theirs
        struct.pack_into("=i", buffer, len(buffer) - 4, ours)

    def configure(self, fd: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        self.requests.append((-1, struct.unpack_from("=Q", buffer.raw)[0]))

    def set(self, fd: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        self.value = struct.unpack_from("=Q", buffer.raw)[0]


def pins_of_the_host(path: Path, *lines: str | int) -> Gpio:
    path.touch()
    return Gpio("pins", GpioOptions(backend="chip", chip=path, lines=lines), 2, 64)


async def test_a_line_of_a_chip_is_taken_driven_watched_and_given_back(kernel: Kernel, tmp_path: Path) -> None:
    chip = Chip(kernel)
    async with attach(pins_of_the_host(tmp_path / "gpiochip0", "LINE1")) as driver:

        async def ask(kind: int, value: int = 0) -> bytes:
            return await driver.request(0, struct.pack("<HHI", kind, 0, value), 2)

        assert await driver.request(0, struct.pack("<HHI", 1, 0, 0), 7) == b"\0LINE1\0"
        assert await ask(5, 1) == b"\0\0"
        assert chip.requests == [], "nothing is taken before the guest wants it"
        assert await ask(3, 1) == b"\0\0"
        assert chip.requests.pop() == (1, gpio_uapi.LINE_FLAG_OUTPUT)
        assert await ask(5, 1) == b"\0\0"
        assert await ask(4) == b"\0\1"
        assert await ask(3, 0) == b"\0\0"
        assert await ask(6, 1) == b"\0\0"
        assert chip.requests.pop() == (1, gpio_uapi.LINE_FLAG_INPUT | gpio_uapi.LINE_FLAG_EDGE_RISING)
        driver.post(1, b"\0\0", 1)
        os.write(chip.events, struct.pack("=QIIII24x", 1, gpio_uapi.EDGE_RISING, 1, 1, 1))
        assert [answer for _, answer in await driver.answers(1)] == [b"\1"]
        assert await ask(6, 0) == b"\0\0"
    os.close(chip.events)


async def test_a_line_that_somebody_else_has_is_an_error_of_the_request(kernel: Kernel, tmp_path: Path) -> None:
    def busy(fd: int, buffer: ctypes.Array[ctypes.c_char]) -> None:
        raise OSError(errno.EBUSY, "taken")

    Chip(kernel)
    kernel.answers[gpio_uapi._GET_LINE] = busy
    async with attach(pins_of_the_host(tmp_path / "gpiochip0", 0)) as driver:
        assert await driver.request(0, struct.pack("<HHI", 3, 0, 2), 2) == b"\1\0"
        assert await driver.request(0, struct.pack("<HHI", 2, 0, 0), 2) == b"\0\0"


def test_lines_that_a_chip_has_not_are_named(kernel: Kernel, tmp_path: Path) -> None:
    Chip(kernel)
    with no_fd_leaks():
        with pytest.raises(HostError, match="lines 0 to 1, and no line 2"):
            pins_of_the_host(tmp_path / "c", 2)
        with pytest.raises(HostError, match='no line named "LED"; by name it has: "LINE0", "LINE1"'):
            pins_of_the_host(tmp_path / "c", "LED")
        with pytest.raises(HostError, match="listed twice"):
            pins_of_the_host(tmp_path / "c", "LINE0", 0)
