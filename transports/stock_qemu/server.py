"""The socket where the preloaded libraries report: a thin trio loop around ``QemuDoorbells``."""

from __future__ import annotations

import array
import resource
import select
import socket
import struct
from functools import partial
from typing import Final

import structlog
import trio

from transports.stock_qemu.descriptors import VcpuStatistics, doorbell_id
from transports.stock_qemu.messages import WIRE_SIZE, Message, Type, parse_message
from transports.stock_qemu.vms import QemuDoorbells, Vm
from virtio.clients import Door, Place, Places, Shortage, receive_with_descriptors, received_descriptors
from virtio.errors import HostError, PeerError
from virtio.fd import OwnedFd

VMS_MAX: Final = 256
HELLO_SECONDS: Final = 10.0  # a connection must tell of its VM within this
DESCRIPTORS_SHARE: Final = 4  # statistics of vCPUs may take one in so many of the descriptors the process may have

# Room for more descriptors than a message may have: too many is then seen as such, not as a truncation.
_ANCILLARY_SIZE: Final = socket.CMSG_SPACE(4 * array.array("i").itemsize)


async def serve(
    listener: socket.socket, doorbells: QemuDoorbells, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve libraries that connect to ``listener`` (SOCK_SEQPACKET, the caller's) until cancelled."""
    log = structlog.get_logger()
    door, places = Door(trio.socket.from_stdlib_socket(listener), "a QEMU that reports its doorbells"), Places(VMS_MAX)

    async def serve_one(sock: trio.socket.SocketType, place: Place) -> None:
        try:
            with place.scope:
                await _Connection(sock, doorbells, place).run()
        finally:
            places.leave(place)
            sock.close()

    async with trio.open_nursery() as nursery:
        task_status.started()
        while True:
            sock = await door.accept()
            place = places.take()  # of one that has told of no VM, where all are taken
            if place is None:
                sock.close()
                log.warning("a QEMU was turned away: too many are connected", limit=VMS_MAX)
                continue
            nursery.start_soon(serve_one, sock, place)


class _Connection:
    """One library, from its first message to its end."""

    def __init__(self, sock: trio.socket.SocketType, doorbells: QemuDoorbells, place: Place) -> None:
        self._socket = sock
        self._place = place
        self._doorbells = doorbells
        self._wake = trio.Event()
        self._vm: Vm = doorbells.connect(_peer_pid(sock), lambda: self._wake.set(), partial(_has_left, sock))
        self._log = structlog.get_logger()
        self._shortage = Shortage("a message of a QEMU", self._log)
        self._warned = False

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                await self._read()
                nursery.cancel_scope.cancel()
        except* PeerError as group:
            error = group.exceptions[0]
            self._log.warning("a QEMU's connection ended: it broke the protocol", vm=self._vm.name, error=str(error))
        except* HostError as group:
            self._log.error("a QEMU's connection ended", vm=self._vm.name, error=str(group.exceptions[0]))
        except* OSError as group:
            self._log.info("a QEMU's connection ended", vm=self._vm.name, error=str(group.exceptions[0]))
        except* Exception as group:
            # A fault of ours must not take the daemon along.
            self._log.error("a QEMU's connection ended: internal error", vm=self._vm.name, exc_info=group)
        else:
            if self._vm.known:
                self._log.info("a VM's QEMU left", vm=self._vm.name)
        finally:
            self._doorbells.disconnect(self._vm)

    async def _read(self) -> None:
        with trio.move_on_after(HELLO_SECONDS) as hello:
            while await self._receive():
                if self._vm.known:
                    hello.deadline = float("inf")
                    self._place.rank = None  # it does not give way
            return
        raise PeerError(f"told of no VM within {HELLO_SECONDS:g} seconds")

    async def _receive(self) -> bool:
        """Take one message; False at the end."""
        data, ancillary, _ = await receive_with_descriptors(
            self._socket, WIRE_SIZE + 1, _ANCILLARY_SIZE, self._shortage
        )
        fds = received_descriptors(ancillary)
        try:
            if not data:
                return False
            message = parse_message(data, len(fds))
            if message.type == Type.VCPU:
                self._add_vcpu(message, fds[0])
            else:
                self._doorbells.receive(self._vm, message, doorbell_id(fds[0]) if fds else None)
            return True
        finally:
            for fd in fds:
                fd.close()

    def _add_vcpu(self, message: Message, fd: OwnedFd) -> None:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // DESCRIPTORS_SHARE
        if self._doorbells.vcpu_count < most:
            self._doorbells.add_vcpu(self._vm, message.vcpu, VcpuStatistics(OwnedFd(fd.detach())))
        elif not self._warned:
            self._warned = True
            self._log.warning("too many vCPUs to read the statistics of all", vm=self._vm.name, limit=most)

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            for message in self._vm.commands():
                await self._socket.send(message.build())


def _peer_pid(sock: trio.socket.SocketType) -> int:
    """Who connected, as the kernel says."""
    size = struct.calcsize("3i")
    pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0]
    return pid


def _has_left(sock: trio.socket.SocketType) -> bool:
    """Whether the other end is closed, whatever it said before that is still to be read."""
    poll = select.poll()
    poll.register(sock.fileno(), 0)
    return bool(poll.poll(0))
