"""The socket device (section 5.10): a guest's AF_VSOCK sockets, joined to Unix sockets of the host and to other guests.

Queues (5.10.2): 0 receive, 1 transmit, 2 events. "Receive" is the driver's word. A connection between two guests of
this daemon is a pair of connected sockets on the host, one end for each guest, so it is served like any other.
"""

from __future__ import annotations

import itertools
import socket as sockets
from collections import deque
from typing import ClassVar, Final
from weakref import WeakValueDictionary

import structlog
import trio

from virtio import spec
from virtio.clients import Place, Places
from virtio.config_space import VIRTIO_VSOCK_CONFIG
from virtio.device import Chain, Device, Queue
from virtio.devices.vsock.connection import Connection, State
from virtio.devices.vsock.host import CLIENTS_MAX, SOCKET_KINDS, HostListener, connect, read_command
from virtio.devices.vsock.options import LAST_WORDS_MAX, VsockOptions
from virtio.devices.vsock.packet import (
    CID_HOST,
    HEADER_SIZE,
    VIRTIO_VSOCK_OP_REQUEST,
    VIRTIO_VSOCK_OP_RST,
    VIRTIO_VSOCK_OP_RW,
    VIRTIO_VSOCK_TYPE_SEQPACKET,
    VIRTIO_VSOCK_TYPE_STREAM,
    Key,
    Packet,
)
from virtio.devices.vsock.shares import BUFFER, ConnectionShares, Shares
from virtio.errors import HostError

VIRTIO_VSOCK_F_STREAM: Final = 0
VIRTIO_VSOCK_F_SEQPACKET: Final = 1

RECEIVE: Final = 0
TRANSMIT: Final = 1
EVENTS: Final = 2

VIRTIO_VSOCK_EVENT_TRANSPORT_RESET: Final = bytes(4)  # le32 id, 0

PIECE: Final = 64 * 1024
"""Most bytes of one packet to the guest, however large its buffers are."""
RESETS_MAX: Final = 1024
"""Resets for packets of no connection that wait for a buffer; without one the guest's own timeout has to do."""
FIRST_HOST_PORT: Final = 1 << 30
"""Ports that connections from the host come from, upwards."""
ANSWER_SECONDS: Final = 10
"""How long a guest may take to accept a connection."""
BATCH: Final = 64
"""Packets to the guest with one notification."""

log = structlog.get_logger()


_GUESTS: Final[WeakValueDictionary[tuple[str, int], Vsock]] = WeakValueDictionary()
"""The devices of this process that may talk to each other, by group and context id."""


class Vsock(Device):
    """One guest's sockets."""

    virtio_id: ClassVar[int] = spec.VIRTIO_ID_VSOCK
    type_name = "vsock"
    files_may_hang = True
    answers_in_order = True
    ops = ("receive", "transmit", "event")
    request_max = spec.CHAIN_LENGTH_MAX  # no more is read than a connection has credit for
    Options = VsockOptions
    feature_bits = {
        "VIRTIO_VSOCK_F_STREAM": VIRTIO_VSOCK_F_STREAM,
        "VIRTIO_VSOCK_F_SEQPACKET": VIRTIO_VSOCK_F_SEQPACKET,
    }

    def __init__(self, name: str, options: VsockOptions, queues: int, queue_size: int) -> None:
        super().__init__(name, options, self.virtqueues(options, queues), queue_size)
        self.cid: Final = options.cid
        self._options = options
        self._connections: dict[Key, Connection] = {}
        self._waiting: deque[Connection] = deque()  # those with something for the guest, in turn
        self._shares = ConnectionShares(name, options.connections, self.cid)
        self._last_words: set[Connection] = set()  # those that are over for the guest, and not yet for the host
        self._last_words_shares = Shares(LAST_WORDS_MAX, self.cid)
        self._resets: deque[Packet] = deque()
        self._something = trio.Event()
        self._events = trio.Event()
        self._ran: set[int] = set()  # the queues that ran since the last reset
        self._ports = itertools.cycle(range(FIRST_HOST_PORT, 2 * FIRST_HOST_PORT))
        self._scratch = memoryview(bytearray(BUFFER))
        self._nursery: trio.Nursery | None = None
        if options.group is not None:
            if (options.group, self.cid) in _GUESTS:
                raise HostError(f"cid {self.cid} is another guest's of group {options.group!r}; give each its own")
            _GUESTS[options.group, self.cid] = self
        self._listeners: list[HostListener] = []
        try:
            self._listeners.append(HostListener(options.path, VIRTIO_VSOCK_TYPE_STREAM))
            self._listeners.append(HostListener(options.seqpacket_path, VIRTIO_VSOCK_TYPE_SEQPACKET))
        except BaseException:
            self.close()
            raise

    @classmethod
    def virtqueues(cls, options: VsockOptions, queues: int) -> int:
        """Receive, transmit and event (5.10.2)."""
        return 3

    def config_space(self) -> bytes:
        return bytes(VIRTIO_VSOCK_CONFIG.build({"guest_cid": self.cid}))

    def reset(self) -> None:
        for connection in self._connections.values():
            self._end(connection)
        self._connections.clear()
        self._shares.clear()
        self._waiting.clear()
        self._resets.clear()
        self._events = trio.Event()
        self._ran.clear()

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()
        group = self._options.group
        if group is not None and _GUESTS.get((group, self.cid)) is self:
            del _GUESTS[group, self.cid]

    def limit_descriptors(self, count: int) -> None:
        self._shares.lower(self._options.connections_of(count))

    # ---- connections from the host ----

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            async with trio.open_nursery() as self._nursery:
                for listener in self._listeners:
                    self._nursery.start_soon(self._accept, listener)
                task_status.started()
        finally:
            self._nursery = None

    async def _accept(self, listener: HostListener) -> None:
        undecided = Places(CLIENTS_MAX)
        while True:
            client = await listener.accept()
            assert self._nursery is not None
            self._nursery.start_soon(self._serve_client, client, listener.type, undecided, undecided.take())

    async def _serve_client(self, client: sockets.socket, kind: int, undecided: Places, place: Place | None) -> None:
        assert place is not None  # one that has not said its port gives way
        port = None
        with client:
            client.setblocking(False)
            try:
                with place.scope:
                    port = await read_command(client)
            finally:
                undecided.leave(place)
            if port is None:
                return
            host_port = next(self._ports)
            connection = self._add(Key(port, CID_HOST, host_port, kind), State.ASKING, CID_HOST)
            if connection is None or not await self._accepted(connection):
                return
            try:
                client.send(b"OK %d\n" % host_port)
            except OSError:
                connection.reset()  # it has gone
            connection.join(client)
            await self._run(connection)

    async def _accepted(self, connection: Connection) -> bool:
        """Wait for the guest to accept; one that does not answer is told that it is too late."""
        try:
            with trio.move_on_after(ANSWER_SECONDS):
                await connection.settled()
        finally:
            if connection.state is State.ASKING:
                connection.reset()
        return connection.state is State.OPEN

    def _add(self, key: Key, state: State, by: int) -> Connection | None:
        """A new connection, opened by the cid ``by``.

        None: there are too many, or ``by`` has its share of them; this one exists; the driver does not know its type.
        """
        is_known = key.type == VIRTIO_VSOCK_TYPE_STREAM or (
            key.type == VIRTIO_VSOCK_TYPE_SEQPACKET and self.driver_features >> VIRTIO_VSOCK_F_SEQPACKET & 1
        )
        if not is_known or key in self._connections:
            return None
        buffer_size = self._shares.take(by)
        if buffer_size is None:
            return None
        connection = Connection(key, self.cid, buffer_size, state, self._send, opened_by=by)
        self._connections[key] = connection
        return connection

    # ---- connections from the guest ----

    def _requested(self, key: Key, packet: Packet) -> None:
        connection = self._connections.get(key)
        if connection is not None:
            connection.reset()  # 5.10.6.4: what is connected cannot connect
            return
        connection = self._add(key, State.ASKED, self.cid)
        if connection is None:
            self._refuse(packet)
            return
        connection.take_credit(packet)
        if key.peer_cid == CID_HOST:
            self._answer(connection, connect(self._options.path_of_port(key.peer_port), key.type))
        elif self._nursery is not None:
            self._nursery.start_soon(self._connect_guest, connection)

    def _answer(self, connection: Connection, socket: sockets.socket | None) -> None:
        if socket is None:
            connection.reset()
        else:
            connection.accept()
            self._serve(connection, socket)

    def _serve(self, connection: Connection, socket: sockets.socket) -> None:
        if self._nursery is None:
            socket.close()
            connection.drop()
        else:
            connection.join(socket)
            self._nursery.start_soon(self._run, connection)

    async def _run(self, connection: Connection) -> None:
        try:
            await connection.run()
        finally:
            if connection in self._last_words:
                self._last_words.remove(connection)
                self._last_words_shares.give_back(connection.key.peer_cid)

    async def _connect_guest(self, connection: Connection) -> None:
        """To another guest of the group: it is asked, and its answer is ours."""
        key, group = connection.key, self._options.group
        other = _GUESTS.get((group, key.peer_cid)) if group is not None else None
        mirrored = Key(key.peer_port, self.cid, key.guest_port, key.type)
        asked = other._add(mirrored, State.ASKING, self.cid) if other is not None else None
        if other is None or asked is None:
            connection.reset()
            return
        async with trio.open_nursery() as nursery:

            async def until_given_up() -> None:
                await connection.settled()  # closed by the one who asked
                asked.reset()

            nursery.start_soon(until_given_up)
            is_accepted = await self._accepted(asked)
            nursery.cancel_scope.cancel()
        if connection.state is State.CLOSED:
            return
        if not is_accepted:
            connection.reset()
            return
        try:
            ours, theirs = sockets.socketpair(sockets.AF_UNIX, SOCKET_KINDS[key.type])
        except OSError as error:
            log.warning("guests cannot be connected", device=self.name, error=str(error))
            connection.reset()
            asked.reset()
            return
        other._serve(asked, theirs)
        self._answer(connection, ours)

    # ---- the driver's queues ----

    async def run_queue(self, queue: Queue) -> None:
        if queue.index not in self._ran and queue.used_before:
            # A driver that we know nothing of is in the middle of things: we died, or it has moved (5.10.6.9).
            self._events.set()
        self._ran.add(queue.index)
        if queue.index == TRANSMIT:
            await queue.serve(self.handle)
        elif queue.index == RECEIVE:
            await self._fill(queue)
        else:
            await self._tell_events(queue)

    async def handle(self, queue: Queue, chain: Chain) -> None:
        """One packet of the driver's (5.10.6.4)."""
        chain.op = TRANSMIT
        packet = Packet.parse(chain.read(HEADER_SIZE))
        # With another source than its own a packet is not the driver's to send: there is nobody to answer.
        if packet is None or packet.src_cid != self.cid:
            chain.failed = True
            return
        key = Key(packet.src_port, packet.dst_cid, packet.dst_port, packet.type)
        connection = self._connections.get(key)
        if packet.op == VIRTIO_VSOCK_OP_REQUEST:
            self._requested(key, packet)
        elif connection is None:
            if packet.op != VIRTIO_VSOCK_OP_RST:
                self._refuse(packet)
        elif packet.op == VIRTIO_VSOCK_OP_RST:
            self._end(connection)
            self._forget(connection)
        elif connection.state is not State.CLOSED:
            self._take(connection, packet, chain)

    def _end(self, connection: Connection) -> None:
        """The guest has done with it. Linux resets what it closed after 8 s, though the host may read more slowly.

        What the guest sent before it shut its side is the host's to read, so such a connection goes on without the
        guest, which may use its ports again. It ends by itself (``LAST_WORDS_SECONDS``), even if the device is reset.
        """
        goes_on = connection.has_last_words and self._last_words_shares.take(connection.key.peer_cid)
        connection.drop(last_words=goes_on)
        if goes_on:
            self._last_words.add(connection)

    def _take(self, connection: Connection, packet: Packet, chain: Chain) -> None:
        length = packet.len if packet.op == VIRTIO_VSOCK_OP_RW else 0
        if length > chain.readable_length - HEADER_SIZE or (length and not connection.wants(length)):
            chain.failed = True
            connection.reset()
            return
        data = self._scratch[:length]
        chain.read_into(data)
        connection.take(packet, data)

    def _refuse(self, packet: Packet) -> None:
        """What belongs to no connection is answered with a reset (5.10.6.4)."""
        if len(self._resets) < RESETS_MAX:
            self._resets.append(
                Packet(
                    *(packet.dst_cid, packet.src_cid, packet.dst_port, packet.src_port),
                    *(0, packet.type, VIRTIO_VSOCK_OP_RST, 0, 0, 0),
                )
            )
            self._something.set()

    async def _fill(self, queue: Queue) -> None:
        """Packets for the guest, each in a buffer of its own, as long as there are both."""
        while True:
            while not self._resets and not self._waiting:
                self._something = trio.Event()
                await self._something.wait()
            chain: Chain | None = await queue.next_chain()
            filled: list[Chain] = []
            try:
                while chain is not None:
                    if not self._fill_one(chain):
                        queue.put_back(chain)
                        break
                    filled.append(chain)
                    over = len(filled) == BATCH or queue.turn_is_over
                    chain = None if over else queue.chain_at_hand()
            finally:
                if filled:
                    queue.push(filled)
            await trio.lowlevel.checkpoint()

    def _fill_one(self, chain: Chain) -> bool:
        """Write the next packet; False: there is none."""
        chain.op = RECEIVE
        room = min(chain.writable_length - HEADER_SIZE, PIECE)
        if room <= 0:
            chain.failed = True  # nothing would ever fit: it goes back empty
            return True
        if self._resets:
            chain.write(self._resets.popleft().pack())
            return True
        while self._waiting:
            connection = self._waiting[0]
            found = connection.next_packet(self._scratch[:room])
            self._waiting.popleft()
            connection.queued = False
            if found is None:
                continue
            packet, data = found
            chain.write(packet.pack())
            chain.write(data)
            if packet.op == VIRTIO_VSOCK_OP_RST:
                self._forget(connection)
            else:
                self._send(connection)  # it may have more, and the others come first
            return True
        return False

    async def _tell_events(self, queue: Queue) -> None:
        await self._events.wait()
        chain = await queue.next_chain()
        chain.op = EVENTS
        chain.write(VIRTIO_VSOCK_EVENT_TRANSPORT_RESET)
        chain.complete()
        self._events = trio.Event()
        await trio.sleep_forever()

    def _send(self, connection: Connection) -> None:
        if not connection.queued:
            connection.queued = True
            self._waiting.append(connection)
            self._something.set()

    def _forget(self, connection: Connection) -> None:
        if self._connections.get(connection.key) is connection:
            del self._connections[connection.key]
            self._shares.give_back(connection.opened_by, connection.buffer_size)
