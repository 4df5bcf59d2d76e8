"""The input device (section 5.8): a keyboard, mouse or tablet, whose events are those of Linux' evdev.

Queues (5.8.2): 0 carries one event a buffer to the guest, 1 the guest's lights and sounds back.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import ClassVar, Final

import trio

from virtio import spec
from virtio.config_space import VIRTIO_INPUT_ABSINFO, VIRTIO_INPUT_CONFIG, VIRTIO_INPUT_DEVIDS
from virtio.device import Chain, Device, Queue
from virtio.devices.input.codes import EV_LED, EV_SND
from virtio.devices.input.evdev import EvdevSource
from virtio.devices.input.options import InputOptions
from virtio.devices.input.script import ScriptSource
from virtio.devices.input.source import EventQueue, InputEvent, Source
from virtio.devices.input.timed import Player, Script, read_script

VIRTIO_INPUT_CFG_ID_NAME: Final = 0x01
VIRTIO_INPUT_CFG_ID_SERIAL: Final = 0x02
VIRTIO_INPUT_CFG_ID_DEVIDS: Final = 0x03
VIRTIO_INPUT_CFG_PROP_BITS: Final = 0x10
VIRTIO_INPUT_CFG_EV_BITS: Final = 0x11
VIRTIO_INPUT_CFG_ABS_INFO: Final = 0x12

EVENT_QUEUE: Final = 0
STATUS_QUEUE: Final = 1

_EVENT: Final = struct.Struct("<HHi")  # 5.8.6: type, code, value


class Input(Device):
    """An input device of the host, or one whose events a program sends."""

    virtio_id: ClassVar[int] = spec.VIRTIO_ID_INPUT
    type_name = "input"
    files_may_hang = True
    answers_in_order = True
    ops = ("event", "status")
    Options = InputOptions
    queue_counts = (2, 2)
    default_queues = 2

    def __init__(self, name: str, options: InputOptions, queues: int, queue_size: int) -> None:
        super().__init__(name, options, queues, queue_size)
        # Read before the source is opened, so that there is nothing to close where it is wrong.
        script = read_script(options.script, options.reports()) if options.script is not None else Script()
        self._player: Final = Player(script, self._emit)
        self._begun = False  # the script, for the event queue as it runs now
        self.source: Final[Source] = (
            EvdevSource(options.evdev, grab=options.grab) if options.evdev is not None else ScriptSource(options)
        )
        self.source.emit = self._emit
        self.events: Final = EventQueue()
        self._select = self._subsel = 0
        self._runs = False

    def _emit(self, report: Sequence[InputEvent]) -> bool:
        self.events.put(report, keep=self._runs)
        return self._runs

    # ---- the config space (5.8.4): a question and its answer ----

    def config_space(self) -> bytes:
        answer = self._answer()
        return VIRTIO_INPUT_CONFIG.build(
            {"select": self._select, "subsel": self._subsel, "size": len(answer), "u": answer}
        )

    def write_config(self, offset: int, data: bytes) -> None:
        for at, byte in enumerate(data[:2], offset):
            if at == 0:
                self._select = byte
            elif at == 1:
                self._subsel = byte

    def _answer(self) -> bytes:
        """Nothing where the question makes no sense."""
        about = self.source.description
        if self._select == VIRTIO_INPUT_CFG_EV_BITS:
            return about.bits.get(self._subsel, b"")
        if self._select == VIRTIO_INPUT_CFG_ABS_INFO:
            axis = about.axes.get(self._subsel)
            if axis is None:
                return b""
            return VIRTIO_INPUT_ABSINFO.build(dict(zip(("min", "max", "fuzz", "flat", "res"), axis, strict=True)))
        if self._subsel:
            return b""
        if self._select == VIRTIO_INPUT_CFG_ID_DEVIDS:
            names = ("bustype", "vendor", "product", "version")
            return VIRTIO_INPUT_DEVIDS.build(dict(zip(names, about.ids, strict=True)))
        plain = {
            VIRTIO_INPUT_CFG_ID_NAME: about.label,
            VIRTIO_INPUT_CFG_ID_SERIAL: about.serial,
            VIRTIO_INPUT_CFG_PROP_BITS: about.properties,
        }
        return plain.get(self._select, b"")

    # ---- life ----

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self.source.run(task_status=task_status)

    def queue_running(self, queue_index: int, running: bool) -> None:
        if queue_index == EVENT_QUEUE:
            self._runs = running
            if running:  # it may have missed something
                self.events.catch_up()
            else:
                self._begun = False

    def reset(self) -> None:
        self._select = self._subsel = 0
        self.events.forget_guest()

    def close(self) -> None:
        self.source.close()

    # ---- queues ----

    async def run_queue(self, queue: Queue) -> None:
        if queue.index == STATUS_QUEUE:
            await queue.serve(self.handle)
        self._play(queue)
        while True:
            await self.events.wait()
            chain = await queue.next_chain()
            if chain.writable_length < _EVENT.size:  # 5.8.6.1: the driver must not; no event is lost to it
                chain.failed = True
            else:
                event = self.events.take()
                if event is None:  # it was dropped while we waited for the buffer
                    queue.put_back(chain)  # Linux takes it for an event whatever its length, and sends the old one
                    continue
                chain.write(_EVENT.pack(*event))
            chain.complete()
            await trio.lowlevel.checkpoint()

    def _play(self, queue: Queue) -> None:
        """The script, from its beginning for a driver that starts; one that was only paused hears the rest of it."""
        if not self._begun:
            self._begun = True
            if not queue.used_before:
                self._player.rewind()
        queue.spawned.start_soon(self._player.play)

    async def handle(self, queue: Queue, chain: Chain) -> None:
        """The guest's lights and sounds. Whatever else it writes is not for the device."""
        chain.op = 1
        data = chain.read(_EVENT.size)
        if len(data) < _EVENT.size:
            chain.failed = True
            return
        event = InputEvent(*_EVENT.unpack(data))
        if event.type in (EV_LED, EV_SND):
            with trio.CancelScope(shield=True):  # a stop in the middle would do it twice
                chain.failed = not await self.source.status(event)
