"""Lines of a GPIO chip of this host, by its character device.

A line is asked for when the guest first configures it and given back when it lets go of it, so whatever the guest
does not use stays free for others. Chips behind a slow bus may keep an ioctl waiting, so one thread makes them all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import structlog
import trio

from virtio.devices.gpio import uapi as gpio_uapi
from virtio.devices.gpio.lines import (
    VIRTIO_GPIO_DIRECTION_IN,
    VIRTIO_GPIO_DIRECTION_NONE,
    VIRTIO_GPIO_DIRECTION_OUT,
    VIRTIO_GPIO_IRQ_TYPE_EDGE_FALLING,
    VIRTIO_GPIO_IRQ_TYPE_EDGE_RISING,
    VIRTIO_GPIO_IRQ_TYPE_NONE,
    Edge,
)
from virtio.devices.host.device_node import open_node
from virtio.errors import HostError
from virtio.fd import OwnedFd

EVENTS_AT_ONCE: Final = 16

T = TypeVar("T")
log = structlog.get_logger()


class _Line:
    """One line of the chip. ``fd`` while we have it."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.fd: OwnedFd | None = None
        self.output = False
        self.direction = VIRTIO_GPIO_DIRECTION_NONE
        self.interrupt = VIRTIO_GPIO_IRQ_TYPE_NONE

    @property
    def flags(self) -> int:
        """As the kernel must be told; 0: we do not want it."""
        if self.direction == VIRTIO_GPIO_DIRECTION_OUT:
            return gpio_uapi.LINE_FLAG_OUTPUT
        flags = 0
        if self.interrupt != VIRTIO_GPIO_IRQ_TYPE_NONE:
            level = not self.interrupt & (VIRTIO_GPIO_IRQ_TYPE_EDGE_RISING | VIRTIO_GPIO_IRQ_TYPE_EDGE_FALLING)
            flags = gpio_uapi.LINE_FLAG_INPUT
            if level or self.interrupt & VIRTIO_GPIO_IRQ_TYPE_EDGE_RISING:
                flags |= gpio_uapi.LINE_FLAG_EDGE_RISING
            if level or self.interrupt & VIRTIO_GPIO_IRQ_TYPE_EDGE_FALLING:
                flags |= gpio_uapi.LINE_FLAG_EDGE_FALLING
        elif self.direction == VIRTIO_GPIO_DIRECTION_IN:
            flags = gpio_uapi.LINE_FLAG_INPUT
        return flags


class ChipLines:
    """The ``wanted`` lines of the chip at ``path``, by name or offset. ``HostError``: one cannot be had."""

    def __init__(self, path: Path, wanted: Sequence[str | int]) -> None:
        self.on_edge: Edge = lambda line, rising: None
        self._path = path
        self._thread = trio.CapacityLimiter(1)
        self._nursery: trio.Nursery | None = None
        self.names: Sequence[str]
        self._chip = open_node(
            path,
            f"chip {path}",
            missing="the chips of this host are /dev/gpiochip*",
            forbidden="let the daemon's user read and write it (a udev rule, or the group that owns it)",
        )
        try:
            offsets, self.names = self._find(wanted)
        except BaseException:
            self._chip.close()
            raise
        self._lines = [_Line(offset) for offset in offsets]

    def _find(self, wanted: Sequence[str | int]) -> tuple[list[int], list[str]]:
        chip, what = self._chip.fileno(), f"chip {self._path}"
        count = gpio_uapi.line_count(chip, what)
        names = [gpio_uapi.line_info(chip, offset, what).name for offset in range(count)]
        offsets: list[int] = []
        for line in wanted:
            if isinstance(line, int) and line >= count:
                raise HostError(f"chip {self._path} has lines 0 to {count - 1}, and no line {line}")
            if isinstance(line, str) and names.count(line) != 1:
                which = "no line" if line not in names else "more than one line"
                known = ", ".join(f'"{name}"' for name in names if name)
                raise HostError(f'chip {self._path} has {which} named "{line}"; by name it has: {known or "none"}')
            offset = line if isinstance(line, int) else names.index(line)
            if offset in offsets:
                raise HostError(f'chip {self._path}: line {offset} ("{names[offset]}") is listed twice')
            offsets.append(offset)
        # 5.18.6.1 wants ASCII, each name once; a chip's own names need not be so.
        mine = [names[offset] if names[offset].isascii() else "" for offset in offsets]
        return offsets, [name if mine.count(name) == 1 else "" for name in mine]

    # ---- the guest's side ----

    async def direction(self, line: int) -> int:
        return self._lines[line].direction

    async def set_direction(self, line: int, direction: int) -> None:
        mine = self._lines[line]
        before, mine.direction = mine.direction, direction
        if direction == VIRTIO_GPIO_DIRECTION_NONE:
            mine.output = False
        await self._apply(line, mine, lambda: setattr(mine, "direction", before))

    async def value(self, line: int) -> bool:
        mine = self._lines[line]
        if mine.fd is not None:
            with mine.fd.duplicate() as fd:  # a reset may close ours meanwhile
                return await self._in_thread(lambda: gpio_uapi.read_value(fd.fileno(), self._place(mine)))

        def look() -> bool:
            place = self._place(mine)
            with OwnedFd(gpio_uapi.request_line(self._chip.fileno(), mine.offset, 0, False, place)) as fd:
                return gpio_uapi.read_value(fd.fileno(), place)

        return await self._in_thread(look)

    async def set_value(self, line: int, value: bool) -> None:
        mine = self._lines[line]
        mine.output = value
        if mine.fd is not None and mine.direction == VIRTIO_GPIO_DIRECTION_OUT:
            with mine.fd.duplicate() as fd:
                await self._in_thread(lambda: gpio_uapi.write_value(fd.fileno(), value, self._place(mine)))

    async def watch(self, line: int, interrupt_type: int) -> None:
        mine = self._lines[line]
        before, mine.interrupt = mine.interrupt, interrupt_type
        await self._apply(line, mine, lambda: setattr(mine, "interrupt", before))

    def reset(self) -> None:
        for line in self._lines:
            line.output = False
            line.direction = VIRTIO_GPIO_DIRECTION_NONE
            line.interrupt = VIRTIO_GPIO_IRQ_TYPE_NONE
            self._release(line)

    # ---- the host's side ----

    async def _apply(self, number: int, line: _Line, undo: Callable[[], None]) -> None:
        """Let the kernel have the line as it is to be now."""
        flags, place = line.flags, self._place(line)
        if flags == 0:
            self._release(line)
            return
        try:
            if line.fd is not None:
                with line.fd.duplicate() as fd:
                    await self._in_thread(lambda: gpio_uapi.configure_line(fd.fileno(), flags, line.output, place))
                return
            chip = self._chip.fileno()
            made = await self._in_thread(lambda: gpio_uapi.request_line(chip, line.offset, flags, line.output, place))
        except HostError:
            undo()
            raise
        line.fd = OwnedFd(made)
        os.set_blocking(made, False)
        if self._nursery is not None:
            self._nursery.start_soon(self._read_edges, number, line.fd)

    def _release(self, line: _Line) -> None:
        if line.fd is not None:
            with contextlib.suppress(RuntimeError):  # outside of the event loop nobody waits for it
                trio.lowlevel.notify_closing(line.fd.fileno())
            line.fd.close()
            line.fd = None

    async def _read_edges(self, number: int, fd: OwnedFd) -> None:
        """For as long as we have the line."""
        try:
            while not fd.closed:
                await trio.lowlevel.wait_readable(fd.fileno())
                for rising in gpio_uapi.edges(_read_events(fd)):
                    self.on_edge(number, rising)
        except trio.ClosedResourceError:
            pass  # given back
        except OSError as error:
            log.warning(f"{self._place(self._lines[number])}: no more edges", error=os.strerror(error.errno or 0))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        # Not abandoned when cancelled: a line that was asked for would be nobody's.
        return await trio.to_thread.run_sync(work, limiter=self._thread)

    def _place(self, line: _Line) -> str:
        return f"chip {self._path}, line {line.offset}"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def close(self) -> None:
        for line in self._lines:
            self._release(line)
        self._chip.close()


def _read_events(fd: OwnedFd) -> bytes:
    """None of a line that was given back between the news and our turn."""
    try:
        return b"" if fd.closed else os.read(fd.fileno(), EVENTS_AT_ONCE * gpio_uapi.EVENT_SIZE)
    except BlockingIOError:
        return b""
