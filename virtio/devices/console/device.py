"""The console device (section 5.3): one console, or with MULTIPORT a console and further named ports.

Queues (5.3.2): 0 receive and 1 transmit of port 0, 2 and 3 the control queues, then a pair for each further port.
"Receive" is the driver's word: what the host sends to the guest.
"""

from __future__ import annotations

import struct
from collections import deque
from pathlib import Path
from typing import ClassVar, Final, Literal

import trio
from pydantic import Field, model_validator

from virtio import spec
from virtio.claims import Claims
from virtio.config_space import VIRTIO_CONSOLE_CONFIG
from virtio.device import Chain, Device, DeviceOptions, Queue
from virtio.devices.console.port import LineShare, LogEnd, Pending, PortEnd, PtyEnd, SocketEnd

VIRTIO_CONSOLE_F_SIZE: Final = 0
VIRTIO_CONSOLE_F_MULTIPORT: Final = 1
VIRTIO_CONSOLE_F_EMERG_WRITE: Final = 2

# 5.3.6.2: struct virtio_console_control { le32 id; le16 event; le16 value; }
_CONTROL: Final = struct.Struct("<IHH")
VIRTIO_CONSOLE_DEVICE_READY: Final = 0
VIRTIO_CONSOLE_DEVICE_ADD: Final = 1
VIRTIO_CONSOLE_PORT_READY: Final = 3
VIRTIO_CONSOLE_CONSOLE_PORT: Final = 4
VIRTIO_CONSOLE_RESIZE: Final = 5
VIRTIO_CONSOLE_PORT_OPEN: Final = 6
VIRTIO_CONSOLE_PORT_NAME: Final = 7

CONTROL_RECEIVE: Final = 2
CONTROL_TRANSMIT: Final = 3
EMERG_WR_OFFSET: Final = 8
PORTS_MAX: Final = 31
CONTROL_BACKLOG: Final = 4096


class EndOptions(DeviceOptions):
    """Where a port ends on the host."""

    backend: Literal["socket", "pty", "log"] = Field(
        "log", description='"socket": a Unix socket at path; "pty": a link at path; "log": lines of the daemon\'s log'
    )
    path: Path | None = Field(None, description="The socket, or the link to the pty.")

    @model_validator(mode="after")
    def _path_where_needed(self) -> EndOptions:
        if (self.path is None) != (self.backend == "log"):
            need = "has no path" if self.backend == "log" else "needs a path"
            raise ValueError(f'backend = "{self.backend}" {need}')
        return self


class PortOptions(EndOptions):
    """A further port, /dev/virtio-ports/NAME in a Linux guest."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$", description="The port's name in the guest.")


class ConsoleOptions(EndOptions):
    """Options of ``type = "console"``."""

    columns: int = Field(0, ge=0, le=0xFFFF, description="Width the guest is told; 0: none is told.")
    rows: int = Field(0, ge=0, le=0xFFFF, description="Height the guest is told.")
    ports: tuple[PortOptions, ...] = Field((), max_length=PORTS_MAX - 1, description="Further ports (MULTIPORT).")

    @model_validator(mode="after")
    def _sizes_come_in_pairs(self) -> ConsoleOptions:
        if bool(self.columns) != bool(self.rows):
            raise ValueError("columns and rows go together")
        return self

    def claims(self, name: str) -> Claims:
        ends: dict[tuple[str, ...], EndOptions] = {("path",): self}
        ends |= {("ports", str(number), "path"): port for number, port in enumerate(self.ports)}
        return Claims(
            sockets={key: end.path for key, end in ends.items() if end.path is not None and end.backend == "socket"},
            links={key: end.path for key, end in ends.items() if end.path is not None and end.backend == "pty"},
        )


class _Port:
    """One port: its two queues' worth of state and its host end."""

    def __init__(self, number: int, name: str, pending: Pending, end: PortEnd) -> None:
        self.number = number
        self.name = name
        self.pending = pending
        self.end = end
        self.ready = False


class Console(Device):
    """A console with its ports."""

    virtio_id: ClassVar[int] = spec.VIRTIO_ID_CONSOLE
    type_name = "console"
    files_may_hang = True
    answers_in_order = True
    ops = ("receive", "transmit", "control")
    request_max = spec.CHAIN_LENGTH_MAX  # what is written is taken in pieces
    Options = ConsoleOptions
    feature_bits = {
        "VIRTIO_CONSOLE_F_SIZE": VIRTIO_CONSOLE_F_SIZE,
        "VIRTIO_CONSOLE_F_MULTIPORT": VIRTIO_CONSOLE_F_MULTIPORT,
        "VIRTIO_CONSOLE_F_EMERG_WRITE": VIRTIO_CONSOLE_F_EMERG_WRITE,
    }
    queue_counts = (1, 1)

    def __init__(self, name: str, options: ConsoleOptions, queues: int, queue_size: int) -> None:
        super().__init__(name, options, self.virtqueues(options, queues), queue_size)
        self._options = options
        self._control: deque[bytes] = deque(maxlen=CONTROL_BACKLOG)
        self._control_news = trio.Event()
        self._columns, self._rows = options.columns, options.rows
        self._line_share = LineShare()  # of the log, for all its ports
        self._ports: list[_Port] = []
        try:
            self._add_port("console", options)
            for port in options.ports:
                self._add_port(port.name, port)
        except BaseException:
            self.close()
            raise

    @classmethod
    def virtqueues(cls, options: ConsoleOptions, queues: int) -> int:
        """The number follows from the ports (5.3.2), not from the configuration."""
        return 2 if not options.ports else 4 + 2 * len(options.ports)

    def _add_port(self, name: str, options: EndOptions) -> None:
        number = len(self._ports)
        pending = Pending()
        self._ports.append(_Port(number, name, pending, self.make_end(number, name, options, pending)))

    def make_end(self, number: int, name: str, options: EndOptions, pending: Pending) -> PortEnd:
        """Where port ``number`` ends on the host; what comes from there goes to ``pending``."""
        if options.path is None:
            return LogEnd(self.name, name, self._line_share)
        if options.backend == "pty":
            return PtyEnd(options.path, pending, self._columns, self._rows)
        return SocketEnd(options.path, pending, lambda: self._announce_open(number))

    def resize(self, columns: int, rows: int) -> None:
        """The terminal has another size now. Only a console that began with a size offers to tell it."""
        if (columns, rows) != (self._columns, self._rows):
            self._columns, self._rows = columns, rows
            self.config_changed()

    # ---- features and config space ----

    def features(self) -> int:
        bits = super().features()
        if not self._options.columns:  # fixed for the device's life, whatever the size is now
            bits &= ~(1 << VIRTIO_CONSOLE_F_SIZE)
        if not self._options.ports:
            bits &= ~(1 << VIRTIO_CONSOLE_F_MULTIPORT)
        return bits

    def config_space(self) -> bytes:
        return bytes(
            VIRTIO_CONSOLE_CONFIG.build(
                {
                    "cols": self._columns,
                    "rows": self._rows,
                    "max_nr_ports": len(self._ports),
                    "emerg_wr": 0,
                }
            )
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """5.3.4: a write to emerg_wr is one character for the console, even before the driver is set up."""
        if offset <= EMERG_WR_OFFSET < offset + len(data):
            self._ports[0].end.send(data[EMERG_WR_OFFSET - offset :][:1])

    @property
    def _multiport(self) -> bool:
        return bool(self.driver_features >> VIRTIO_CONSOLE_F_MULTIPORT & 1)

    # ---- life ----

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            for port in self._ports:
                await nursery.start(port.end.run)
            task_status.started()

    def reset(self) -> None:
        self._control.clear()
        for port in self._ports:
            port.ready = False

    def close(self) -> None:
        for port in self._ports:
            port.end.close()

    # ---- queues ----

    def _port_of(self, index: int) -> _Port:
        return self._ports[0 if index < CONTROL_RECEIVE else index // 2 - 1]

    async def run_queue(self, queue: Queue) -> None:
        if queue.index == CONTROL_RECEIVE:
            await self._send_control(queue)
        elif queue.index % 2 == 0:
            await self._send_input(queue, self._port_of(queue.index).pending)
        else:
            await queue.serve(self.handle)

    async def _send_input(self, queue: Queue, pending: Pending) -> None:
        """Host to guest: a buffer is only taken when there are bytes for it, so a stop loses neither."""
        while True:
            await pending.wait()
            chain = await queue.next_chain()
            chain.write(pending.take(chain.writable_length))
            chain.complete()

    async def handle(self, queue: Queue, chain: Chain) -> None:
        """Guest to host: bytes of a port, or a control message."""
        if queue.index == CONTROL_TRANSMIT:
            chain.op = 2
            self._control_message(chain.read(_CONTROL.size))
            return
        chain.op = 1
        end = self._port_of(queue.index).end
        # A buffer may claim 4 GiB (the same page again and again): in pieces, and others have their turn between them.
        end.send(chain.read(end.piece))
        with trio.CancelScope(shield=True):  # a stop in the middle would send the first pieces twice
            while piece := chain.read(end.piece):
                await trio.lowlevel.checkpoint()
                end.send(piece)

    # ---- control (5.3.6.2) ----

    def _control_message(self, message: bytes) -> None:
        if len(message) < _CONTROL.size or not self._multiport:
            return
        number, event, value = _CONTROL.unpack_from(message)
        if event == VIRTIO_CONSOLE_DEVICE_READY and value:
            for port in self._ports:
                self._tell(port.number, VIRTIO_CONSOLE_DEVICE_ADD, 1)
        elif event == VIRTIO_CONSOLE_PORT_READY and number < len(self._ports):
            port = self._ports[number]
            port.ready = bool(value)
            if port.ready:
                self._introduce(port)

    def _introduce(self, port: _Port) -> None:
        if port.number == 0:
            self._tell(0, VIRTIO_CONSOLE_CONSOLE_PORT, 1)
            if self.driver_features >> VIRTIO_CONSOLE_F_SIZE & 1:
                size = struct.pack("<HH", self._columns, self._rows)
                self._tell(0, VIRTIO_CONSOLE_RESIZE, 0, size)
        else:
            self._tell(port.number, VIRTIO_CONSOLE_PORT_NAME, 1, port.name.encode())
        self._tell(port.number, VIRTIO_CONSOLE_PORT_OPEN, int(port.end.connected))

    def _announce_open(self, number: int) -> None:
        if self._multiport and number < len(self._ports) and self._ports[number].ready:
            self._tell(number, VIRTIO_CONSOLE_PORT_OPEN, int(self._ports[number].end.connected))

    def _tell(self, number: int, event: int, value: int, data: bytes = b"") -> None:
        self._control.append(_CONTROL.pack(number, event, value) + data)
        self._control_news.set()

    async def _send_control(self, queue: Queue) -> None:
        while True:
            while not self._control:
                self._control_news = trio.Event()
                await self._control_news.wait()
            chain = await queue.next_chain()
            chain.op = 2
            if self._control:  # a reset may have come while we waited for the buffer
                chain.write(self._control.popleft())
            chain.complete()
