"""The GPIO device (section 5.18): lines that the guest reads, drives, and takes interrupts from.

Queues (5.18.2): 0 carries requests; on 1 the driver unmasks the interrupt of a line by queueing a pair of buffers
for it, which comes back with the interrupt, and so masks it again.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import ClassVar, Final

import structlog
import trio

from virtio import spec
from virtio.config_space import VIRTIO_GPIO_CONFIG
from virtio.device import Chain, Device, Queue
from virtio.devices.gpio.chip import ChipLines
from virtio.devices.gpio.lines import (
    VIRTIO_GPIO_DIRECTION_IN,
    VIRTIO_GPIO_DIRECTION_NONE,
    VIRTIO_GPIO_DIRECTION_OUT,
    VIRTIO_GPIO_IRQ_TYPE_EDGE_BOTH,
    VIRTIO_GPIO_IRQ_TYPE_EDGE_FALLING,
    VIRTIO_GPIO_IRQ_TYPE_EDGE_RISING,
    VIRTIO_GPIO_IRQ_TYPE_LEVEL_HIGH,
    VIRTIO_GPIO_IRQ_TYPE_LEVEL_LOW,
    VIRTIO_GPIO_IRQ_TYPE_NONE,
    Lines,
)
from virtio.devices.gpio.options import GpioOptions
from virtio.devices.gpio.simulated import SimulatedLines
from virtio.errors import HostError

VIRTIO_GPIO_F_IRQ: Final = 0

VIRTIO_GPIO_MSG_GET_LINE_NAMES: Final = 1
VIRTIO_GPIO_MSG_GET_DIRECTION: Final = 2
VIRTIO_GPIO_MSG_SET_DIRECTION: Final = 3
VIRTIO_GPIO_MSG_GET_VALUE: Final = 4
VIRTIO_GPIO_MSG_SET_VALUE: Final = 5
VIRTIO_GPIO_MSG_SET_IRQ_TYPE: Final = 6

VIRTIO_GPIO_STATUS_OK: Final = 0
VIRTIO_GPIO_STATUS_ERR: Final = 1
VIRTIO_GPIO_IRQ_STATUS_INVALID: Final = 0
VIRTIO_GPIO_IRQ_STATUS_VALID: Final = 1

REQUEST_QUEUE: Final = 0
EVENT_QUEUE: Final = 1

_REQUEST: Final = struct.Struct("<HHI")  # 5.18.6: type, gpio, value
_IRQ_REQUEST: Final = struct.Struct("<H")  # 5.18.7: gpio
_LEVELS: Final = {VIRTIO_GPIO_IRQ_TYPE_LEVEL_HIGH: True, VIRTIO_GPIO_IRQ_TYPE_LEVEL_LOW: False}
_IRQ_TYPES: Final = (
    VIRTIO_GPIO_IRQ_TYPE_NONE,
    VIRTIO_GPIO_IRQ_TYPE_EDGE_RISING,
    VIRTIO_GPIO_IRQ_TYPE_EDGE_FALLING,
    VIRTIO_GPIO_IRQ_TYPE_EDGE_BOTH,
    *_LEVELS,
)

log = structlog.get_logger()


class _RefusedError(Exception):
    """The request makes no sense; the driver gets VIRTIO_GPIO_STATUS_ERR."""


class _Interrupt:
    """The interrupt of one line."""

    def __init__(self) -> None:
        self.type = VIRTIO_GPIO_IRQ_TYPE_NONE
        self.latched = False
        self.pair: Chain | None = None
        """The driver's buffers: while they are here the interrupt is unmasked."""

    def give_back(self, status: int) -> None:
        pair, self.pair = self.pair, None
        if pair is not None and not pair.returned:
            pair.write(bytes([status]))
            pair.complete()


class Gpio(Device):
    """Lines of a chip of the host, or simulated ones."""

    virtio_id: ClassVar[int] = spec.VIRTIO_ID_GPIO
    type_name = "gpio"
    ops = ("request", "interrupt")
    Options = GpioOptions
    feature_bits = {"VIRTIO_GPIO_F_IRQ": VIRTIO_GPIO_F_IRQ}
    queue_counts = (2, 2)
    default_queues = 2

    def __init__(self, name: str, options: GpioOptions, queues: int, queue_size: int) -> None:
        super().__init__(name, options, queues, queue_size)
        self.lines: Final = self.make_lines(options)
        self.lines.on_edge = self._edge
        self._interrupts: Final = [_Interrupt() for _ in self.lines.names]
        self._looks = trio.Event()  # a level is to be looked at
        self._to_look: set[int] = set()
        self._names: Final = _names_block(self.lines.names)

    def make_lines(self, options: GpioOptions) -> Lines:
        """What is behind the device. ``HostError``: it cannot be had."""
        if options.chip is not None:
            return ChipLines(options.chip, options.lines)
        return SimulatedLines([str(name) for name in options.lines], options.control)

    def config_space(self) -> bytes:
        return VIRTIO_GPIO_CONFIG.build({"ngpio": len(self.lines.names), "gpio_names_size": len(self._names)})

    # ---- life ----

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.lines.run)
            task_status.started()
            while True:
                await self._looks.wait()
                self._looks = trio.Event()
                to_look, self._to_look = self._to_look, set()
                for line in to_look:
                    await self._look(line)

    async def run_queue(self, queue: Queue) -> None:
        await queue.serve(self.handle if queue.index == REQUEST_QUEUE else self._unmask)

    async def queue_stopping(self, queue: Queue) -> None:
        """5.18.7: a pair comes back INVALID; a driver that still wants its interrupt queues it again."""
        if queue.index == EVENT_QUEUE:
            for interrupt in self._interrupts:
                interrupt.give_back(VIRTIO_GPIO_IRQ_STATUS_INVALID)

    def reset(self) -> None:
        for interrupt in self._interrupts:
            interrupt.give_back(VIRTIO_GPIO_IRQ_STATUS_INVALID)
            interrupt.type = VIRTIO_GPIO_IRQ_TYPE_NONE
            interrupt.latched = False
        self.lines.reset()

    def close(self) -> None:
        self.lines.close()

    # ---- requests (5.18.6) ----

    async def handle(self, queue: Queue, chain: Chain) -> None:
        request = chain.read(_REQUEST.size)
        try:
            if len(request) < _REQUEST.size:
                raise _RefusedError("it is too short")
            # A stop must not come between what a request does to the line and its answer: it would be done twice.
            with trio.CancelScope(shield=True):
                answer = await self._carry_out(*_REQUEST.unpack(request))
            response = bytes([VIRTIO_GPIO_STATUS_OK]) + answer
        except _RefusedError as error:
            log.debug("a request is refused", device=self.name, reason=str(error))
            response = bytes([VIRTIO_GPIO_STATUS_ERR, 0])
            chain.failed = True
        except HostError as error:
            log.warning("the host refuses a request", device=self.name, error=str(error))
            response = bytes([VIRTIO_GPIO_STATUS_ERR, 0])
            chain.failed = True
        if chain.write(response) < len(response):
            chain.failed = True

    async def _carry_out(self, kind: int, line: int, value: int) -> bytes:
        """The response after its status byte."""
        if kind == VIRTIO_GPIO_MSG_GET_LINE_NAMES:
            if not self._names:
                raise _RefusedError("no line has a name")
            return self._names
        if line >= len(self._interrupts):
            raise _RefusedError(f"there is no line {line}")
        if kind == VIRTIO_GPIO_MSG_GET_DIRECTION:
            return bytes([await self.lines.direction(line)])
        if kind == VIRTIO_GPIO_MSG_GET_VALUE:
            return bytes([await self.lines.value(line)])
        if kind == VIRTIO_GPIO_MSG_SET_VALUE:
            if value > 1:
                raise _RefusedError(f"a line has no value {value}")
            await self.lines.set_value(line, bool(value))
        elif kind == VIRTIO_GPIO_MSG_SET_DIRECTION:
            await self._set_direction(line, value)
        elif kind == VIRTIO_GPIO_MSG_SET_IRQ_TYPE:
            await self._set_irq_type(line, value)
        else:
            raise _RefusedError(f"there is no message type {kind}")
        return b"\0"

    async def _set_direction(self, line: int, direction: int) -> None:
        if direction not in (VIRTIO_GPIO_DIRECTION_NONE, VIRTIO_GPIO_DIRECTION_OUT, VIRTIO_GPIO_DIRECTION_IN):
            raise _RefusedError(f"there is no direction {direction}")
        if self._interrupts[line].type and direction == VIRTIO_GPIO_DIRECTION_OUT:
            raise _RefusedError(f"line {line} has an interrupt and cannot be an output")
        if direction == VIRTIO_GPIO_DIRECTION_NONE:  # all state of the line goes with it
            await self._disable(line)
        await self.lines.set_direction(line, direction)

    async def _set_irq_type(self, line: int, irq_type: int) -> None:
        if not self.driver_features >> VIRTIO_GPIO_F_IRQ & 1:
            raise _RefusedError("interrupts were not negotiated")
        if irq_type not in _IRQ_TYPES:
            raise _RefusedError(f"there is no interrupt type {irq_type}")
        if irq_type == VIRTIO_GPIO_IRQ_TYPE_NONE:
            await self._disable(line)
            return
        if await self.lines.direction(line) == VIRTIO_GPIO_DIRECTION_OUT:
            raise _RefusedError(f"line {line} is an output and has no interrupt")
        # Linux changes a type without disabling it first (5.18.6.8 asks for that): what was latched belongs to the old.
        interrupt = self._interrupts[line]
        interrupt.latched = False
        interrupt.type = irq_type
        try:
            await self.lines.watch(line, irq_type)
        except HostError:
            interrupt.type = VIRTIO_GPIO_IRQ_TYPE_NONE
            interrupt.give_back(VIRTIO_GPIO_IRQ_STATUS_INVALID)
            raise
        self._look_soon(line)

    async def _disable(self, line: int) -> None:
        interrupt = self._interrupts[line]
        was, interrupt.type = interrupt.type, VIRTIO_GPIO_IRQ_TYPE_NONE
        interrupt.latched = False
        interrupt.give_back(VIRTIO_GPIO_IRQ_STATUS_INVALID)
        if was != VIRTIO_GPIO_IRQ_TYPE_NONE:
            await self.lines.watch(line, VIRTIO_GPIO_IRQ_TYPE_NONE)

    # ---- interrupts (5.18.7) ----

    async def _unmask(self, queue: Queue, chain: Chain) -> None:
        """A pair of buffers for a line. One at a time: there is never more to keep than there are lines."""
        chain.op = 1
        request = chain.read(_IRQ_REQUEST.size)
        line = _IRQ_REQUEST.unpack(request)[0] if len(request) == _IRQ_REQUEST.size else len(self._interrupts)
        if line >= len(self._interrupts) or self._interrupts[line].pair is not None or chain.writable_length == 0:
            chain.write(bytes([VIRTIO_GPIO_IRQ_STATUS_INVALID]))
            chain.failed = True
            return
        interrupt = self._interrupts[line]
        if interrupt.type == VIRTIO_GPIO_IRQ_TYPE_NONE:
            chain.write(bytes([VIRTIO_GPIO_IRQ_STATUS_INVALID]))
            return
        interrupt.pair = chain.take()
        if interrupt.latched:
            interrupt.latched = False
            interrupt.give_back(VIRTIO_GPIO_IRQ_STATUS_VALID)
        else:
            self._look_soon(line)

    def _edge(self, line: int, rising: bool) -> None:
        interrupt = self._interrupts[line]
        if interrupt.type in _LEVELS:
            self._look_soon(line)
            return
        wanted = VIRTIO_GPIO_IRQ_TYPE_EDGE_RISING if rising else VIRTIO_GPIO_IRQ_TYPE_EDGE_FALLING
        if not interrupt.type & wanted:
            return
        if interrupt.pair is None:
            interrupt.latched = True
        else:
            interrupt.give_back(VIRTIO_GPIO_IRQ_STATUS_VALID)

    def _look_soon(self, line: int) -> None:
        if self._interrupts[line].type in _LEVELS:
            self._to_look.add(line)
            self._looks.set()

    async def _look(self, line: int) -> None:
        """An unmasked level interrupt goes out while the line has that level; a masked one is not latched."""
        interrupt = self._interrupts[line]
        if interrupt.pair is None or interrupt.type not in _LEVELS:
            return
        try:
            value = await self.lines.value(line)
        except HostError as error:
            log.warning("the host does not tell a line's value", device=self.name, line=line, error=str(error))
            return
        if _LEVELS.get(interrupt.type) == value:  # it may be another one by now
            interrupt.give_back(VIRTIO_GPIO_IRQ_STATUS_VALID)


def _names_block(names: Sequence[str]) -> bytes:
    """5.18.6.1: zero-terminated strings one after the other; nothing at all where no line has a name."""
    return b"".join(name.encode("ascii") + b"\0" for name in names) if any(names) else b""
