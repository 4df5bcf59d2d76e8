"""A connection between a port in the guest and a Unix socket of the host: credit, shutdown, reset (5.10.6.3 to .6).

Bytes for the host go out at once where the socket takes them; what it does not take yet is kept, and the credit bounds
that. Bytes for the guest stay in the socket until the guest has given both a buffer and credit for them. A message of a
seqpacket that needs several buffers is copied out of the socket piece by piece, and leaves it with the last one.
"""

from __future__ import annotations

import errno
import socket as sockets
from collections.abc import Callable
from enum import Enum
from typing import Final

import structlog
import trio

from virtio.devices.vsock import host
from virtio.devices.vsock.backlog import Backlog
from virtio.devices.vsock.packet import (
    SHUTDOWN_BOTH,
    VIRTIO_VSOCK_OP_CREDIT_REQUEST,
    VIRTIO_VSOCK_OP_CREDIT_UPDATE,
    VIRTIO_VSOCK_OP_REQUEST,
    VIRTIO_VSOCK_OP_RESPONSE,
    VIRTIO_VSOCK_OP_RST,
    VIRTIO_VSOCK_OP_RW,
    VIRTIO_VSOCK_OP_SHUTDOWN,
    VIRTIO_VSOCK_SEQ_EOM,
    VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE,
    VIRTIO_VSOCK_SHUTDOWN_F_SEND,
    VIRTIO_VSOCK_TYPE_SEQPACKET,
    Key,
    Packet,
)

MESSAGE_MAX: Final = 256 * 1024
"""The longest message for the guest, however large its buffer is."""

LINGER_SECONDS: Final = 8
"""How long a connection that has ended both ways waits for the guest to agree (5.10.6.5)."""

LAST_WORDS_SECONDS: Final = 60
"""How long the host may take to read what a guest sent before it closed, once the guest no longer waits for that."""

_MASK: Final = 0xFFFF_FFFF

log = structlog.get_logger()


class State(Enum):
    ASKING = "we asked the guest to accept"
    ASKED = "the guest asked us"
    OPEN = "open"
    CLOSED = "closed"


class Connection:
    """``send`` is told whenever there may be something for the guest: see ``next_packet``.

    ``buffer_size``: bytes that the guest may send before they are taken (``buf_alloc``), and so the longest message.
    """

    def __init__(
        self,
        key: Key,
        guest_cid: int,
        buffer_size: int,
        state: State,
        send: Callable[[Connection], None],
        *,
        opened_by: int,
    ) -> None:
        self.key: Final = key
        self.opened_by: Final = opened_by  # the cid of the one who asked for it
        self.buffer_size: Final = buffer_size
        self.state = state
        self.queued = False  # the device's: it stands in line for the guest's buffers
        self._guest_cid = guest_cid
        self._send = send
        self._socket: sockets.socket | None = None
        self._changed = trio.Event()
        self._life, self._watch, self._hang_up = (trio.CancelScope() for _ in range(3))
        self._is_seqpacket = key.type == VIRTIO_VSOCK_TYPE_SEQPACKET
        # For the guest.
        self._due: set[int] = set()  # operations that wait for a buffer of the guest's
        self._told = 0  # bytes that the guest has of the message that stands first in the socket
        self._shut = self._told_shut = 0
        # Of the guest.
        self._backlog = Backlog(messages=self._is_seqpacket)
        self._message = bytearray()  # the parts of a message that is not whole yet
        self._peer_shut = 0
        # Credit (5.10.6.3).
        self._tx_cnt = self._peer_buf_alloc = self._peer_fwd_cnt = 0
        self._rx_cnt = self._fwd_cnt = self._told_fwd_cnt = 0
        self._readable = self._asked_for_credit = False
        if state is State.ASKING:
            self._tell(VIRTIO_VSOCK_OP_REQUEST)

    # ---- opening and closing ----

    def accept(self) -> None:
        """Answer the guest's request."""
        self.state = State.OPEN
        self._tell(VIRTIO_VSOCK_OP_RESPONSE)

    async def settled(self) -> bool:
        """Wait until the connection is open or will never be; whether it is open."""
        while self.state in (State.ASKING, State.ASKED):
            await self._changed.wait()
        return self.state is State.OPEN

    def reset(self) -> None:
        """It is over at once, and the guest is told."""
        self.drop()
        self._tell(VIRTIO_VSOCK_OP_RST)

    @property
    def has_last_words(self) -> bool:
        """The guest has sent all that it wants to send, and the host has yet to read some of it."""
        is_whole = self.state is State.OPEN and bool(self._peer_shut & VIRTIO_VSOCK_SHUTDOWN_F_SEND)
        return is_whole and bool(self._backlog) and self._socket is not None

    def drop(self, *, last_words: bool = False) -> None:
        """It is over, and there is nobody to tell; with ``last_words`` the host still gets what the guest sent."""
        self.state = State.CLOSED
        self._due.clear()
        if not last_words:
            self._forget_backlog()
        self._readable = False
        self._life.cancel()
        self._change()

    def _forget_backlog(self) -> None:
        self._backlog.clear()
        self._message = bytearray()

    def _tell(self, op: int) -> None:
        self._due.add(op)
        self._send(self)

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ---- from the guest ----

    def take_credit(self, packet: Packet) -> None:
        """Every packet says how much the guest has room for (5.10.6.3)."""
        self._peer_buf_alloc, self._peer_fwd_cnt = packet.buf_alloc, packet.fwd_cnt
        if self._credit > 0:
            self._asked_for_credit = False
            if self._readable:
                self._send(self)

    @property
    def _credit(self) -> int:
        """How much the guest has room for; not above 0 whatever nonsense it says."""
        return self._peer_buf_alloc - ((self._tx_cnt - self._peer_fwd_cnt) & _MASK)

    def wants(self, length: int) -> bool:
        """Whether the guest may send so many bytes now; one that sends more breaks the protocol (5.10.6.3.1)."""
        return self.state is State.OPEN and self._rx_cnt - self._fwd_cnt + length <= self.buffer_size

    def take(self, packet: Packet, data: memoryview) -> None:
        """A packet of the guest's for this connection, and its data. One that breaks the protocol resets it."""
        self.take_credit(packet)
        if packet.op == VIRTIO_VSOCK_OP_RW and self.wants(len(data)):
            self._take_data(packet, data)
        elif packet.op == VIRTIO_VSOCK_OP_RESPONSE and self.state is State.ASKING:
            self.state = State.OPEN
            self._change()
        elif packet.op == VIRTIO_VSOCK_OP_SHUTDOWN:
            self._peer_shut |= packet.flags & SHUTDOWN_BOTH  # what was shut stays so (5.10.6.5)
            if self._peer_shut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE:
                self._readable = False
                self._watch.cancel()
            self._change()
        elif packet.op == VIRTIO_VSOCK_OP_CREDIT_REQUEST:
            self._tell(VIRTIO_VSOCK_OP_CREDIT_UPDATE)
        elif packet.op != VIRTIO_VSOCK_OP_CREDIT_UPDATE:
            self.reset()

    def _take_data(self, packet: Packet, data: memoryview) -> None:
        self._rx_cnt += len(data)
        if (self._peer_shut & VIRTIO_VSOCK_SHUTDOWN_F_SEND) or (self._shut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE):
            self._forward(len(data))  # nobody takes it any more
            return
        if self._is_seqpacket:
            is_end = packet.flags & VIRTIO_VSOCK_SEQ_EOM
            if self._message or not is_end:
                self._message += data
                if not is_end:
                    self._update_credit()
                    return
                data, self._message = memoryview(self._message), bytearray()
        waits = bool(self._backlog)
        if not waits and self._socket is not None:
            sent = self._write(data)
            if sent == len(data):
                return
            data = data[max(sent, 0) :]
        self._backlog.add(data)
        if self._backlog.has_too_many:
            self.reset()
        elif not waits:
            self._change()

    def _forward(self, count: int) -> None:
        """So many bytes of the guest's have left us: it may send as many more."""
        self._fwd_cnt += count
        self._update_credit()

    def _update_credit(self) -> None:
        """Tell the guest of room that it does not know of, once it thinks that there is less than half."""
        if self._rx_cnt - self._told_fwd_cnt >= self.buffer_size // 2 and self._fwd_cnt != self._told_fwd_cnt:
            self._tell(VIRTIO_VSOCK_OP_CREDIT_UPDATE)

    # ---- to the guest ----

    def next_packet(self, room: memoryview) -> tuple[Packet, memoryview] | None:
        """What to tell the guest next; data lies in ``room``. ``None``: nothing now."""
        nothing = room[:0]
        for op in (VIRTIO_VSOCK_OP_RST, VIRTIO_VSOCK_OP_REQUEST, VIRTIO_VSOCK_OP_RESPONSE):
            if op in self._due:
                self._due.remove(op)
                return self._packet(op), nothing
        if self.state is not State.OPEN:
            return None
        if self._readable and not self._peer_shut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE:
            packet = self._next_data(room)
            if packet is not None:
                return packet
            if VIRTIO_VSOCK_OP_RST in self._due:
                return self.next_packet(room)
        if self._told_shut != self._shut:
            self._told_shut = self._shut
            return self._packet(VIRTIO_VSOCK_OP_SHUTDOWN, self._shut), nothing
        for op in (VIRTIO_VSOCK_OP_CREDIT_UPDATE, VIRTIO_VSOCK_OP_CREDIT_REQUEST):
            if op in self._due:
                self._due.remove(op)
                return self._packet(op), nothing
        return None

    def _next_data(self, room: memoryview) -> tuple[Packet, memoryview] | None:
        room = room[: max(self._credit, 0)]
        part = self._next_part(room) if self._is_seqpacket else self._next_bytes(room)
        if part is None:
            return None
        count, flags = part
        self._tx_cnt = (self._tx_cnt + count) & _MASK
        return self._packet(VIRTIO_VSOCK_OP_RW, flags, count), room[:count]

    def _ask_for_credit(self) -> None:
        if not self._asked_for_credit:  # 5.10.6.3: the answer says when there is room
            self._asked_for_credit = True
            self._due.add(VIRTIO_VSOCK_OP_CREDIT_REQUEST)

    def _packet(self, op: int, flags: int = 0, length: int = 0) -> Packet:
        key = self.key
        self._told_fwd_cnt = self._fwd_cnt  # every packet tells it
        self._due.discard(VIRTIO_VSOCK_OP_CREDIT_UPDATE)
        return Packet(
            *(key.peer_cid, self._guest_cid, key.peer_port, key.guest_port),
            *(length, key.type, op, flags, self.buffer_size, self._fwd_cnt & _MASK),
        )

    # ---- the host's socket ----

    def join(self, socket: sockets.socket) -> None:
        """The host's end, which ``run`` serves and closes."""
        socket.setblocking(False)
        if self._is_seqpacket:
            host.prepare_for_messages(socket, self.buffer_size)
        self._socket = socket

    async def run(self) -> None:
        """Move data until both sides have had enough; the socket is closed then."""
        socket = self._socket
        assert socket is not None
        with socket:
            with self._life:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch_host, socket)
                    await self._deliver(socket)
                    self._hang_up.cancel()
                # Both directions have ended: the guest confirms, or after a while is not asked (5.10.6.5).
                with trio.move_on_after(LINGER_SECONDS):
                    while self._peer_shut != SHUTDOWN_BOTH:
                        await self._changed.wait()
                self.reset()
            if self._backlog:
                await self._deliver_last_words(socket)
            self._socket = None

    async def _deliver_last_words(self, socket: sockets.socket) -> None:
        """The guest has closed, and for it the connection is no more (``drop``)."""
        host.shut_down(socket, sockets.SHUT_RD)
        with trio.move_on_after(LAST_WORDS_SECONDS):
            while self._backlog:
                await self._backlog.flush_when_possible(socket, self._write)
        if self._backlog:
            lost, port = len(self._backlog), self.key.peer_port
            log.warning("the host has not read all that a guest sent before it closed", port=port, lost=lost)
            self._forget_backlog()

    async def _watch_host(self, socket: sockets.socket) -> None:
        with self._watch:
            while not self._shut & VIRTIO_VSOCK_SHUTDOWN_F_SEND:
                await trio.lowlevel.wait_readable(socket)
                self._readable = True
                self._send(self)
                while self._readable:
                    await self._changed.wait()
        host.shut_down(socket, sockets.SHUT_RD)
        with self._hang_up:
            await host.gone(socket)
            self._stop_receiving()

    async def _deliver(self, socket: sockets.socket) -> None:
        while not self._shut & VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE:
            if self._backlog:
                await self._backlog.flush_when_possible(socket, self._write)
            elif self._peer_shut & VIRTIO_VSOCK_SHUTDOWN_F_SEND:
                host.shut_down(socket, sockets.SHUT_WR)
                self._shut_down(VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE)
            else:
                await self._changed.wait()

    def _write(self, data: memoryview) -> int:
        """How many bytes of the guest's went to the host; -1: they must wait. All of them go where nobody reads."""
        assert self._socket is not None
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            return -1
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                log.warning("the host allows no message so long (net.core.wmem_max)", bytes=len(data))
            self._stop_receiving()
            return len(data)
        self._forward(sent)
        return sent

    def _next_bytes(self, room: memoryview) -> tuple[int, int] | None:
        """Read bytes of the host's: how many, and flags; ``None``: there are none now, or there never will be."""
        if not room:
            self._ask_for_credit()
            return None
        count = self._from_host(host.receive_bytes, room)
        return (count, 0) if count is not None else None

    def _next_part(self, room: memoryview) -> tuple[int, int] | None:
        """The same of the first message, from where the guest has it to. An empty one needs no credit."""
        left = self._from_host(host.peek_message, room)
        if left is None:
            return None
        if self._told + left > (limit := min(self._peer_buf_alloc, MESSAGE_MAX)):
            log.warning("a message is longer than the guest's buffer", guest_port=self.key.guest_port, limit=limit)
            self.reset()
        elif left and not room:
            self._ask_for_credit()
        elif left > len(room):
            self._told += len(room)
            return len(room), 0
        else:
            assert self._socket is not None
            host.take_message(self._socket)
            self._told = 0
            return left, VIRTIO_VSOCK_SEQ_EOM
        return None

    def _from_host(self, read: Callable[[sockets.socket, memoryview], int | None], room: memoryview) -> int | None:
        assert self._socket is not None
        try:
            count = read(self._socket, room)
        except BlockingIOError:
            self._wait_for_host()
            return None
        except OSError:  # it left without reading everything
            count = None
        if count is None:
            self._end_of_host()
        return count

    def _wait_for_host(self) -> None:
        self._readable = False
        self._change()

    def _end_of_host(self) -> None:
        assert self._socket is not None
        self._wait_for_host()
        self._shut_down(VIRTIO_VSOCK_SHUTDOWN_F_SEND)
        if host.has_gone(self._socket):
            self._stop_receiving()

    def _stop_receiving(self) -> None:
        """Nobody on the host takes what the guest sends."""
        self._forget_backlog()
        self._fwd_cnt = self._rx_cnt
        self._shut_down(VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE)

    def _shut_down(self, direction: int) -> None:
        if not self._shut & direction:
            self._shut |= direction
            self._send(self)
            self._change()
