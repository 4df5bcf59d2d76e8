"""Tap interfaces: made or joined by name, with the virtio header kept and offloads passed on (Linux, tun(4))."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog
import trio

from virtio.errors import HostError
from virtio.fd import OwnedFd

NAME_MAX: Final = 15
HEADER_SIZE: Final = 12

LOOK_INTERVAL: Final = 1.0
"""Seconds between two looks at whether the interface is still there."""

TUN_F_CSUM: Final = 1
TUN_F_TSO4: Final = 2
TUN_F_TSO6: Final = 4
TUN_F_TSO_ECN: Final = 8
TUN_F_USO4: Final = 0x20
TUN_F_USO6: Final = 0x40

_USO: Final = TUN_F_USO4 | TUN_F_USO6
_TUN: Final = Path("/dev/net/tun")
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNGETIFF: Final = 0x800454D2
_TUNSETVNETHDRSZ: Final = 0x400454D8
_IFF_TAP: Final = 0x0002
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFMTU: Final = 0x8922
_SIOCBRADDIF: Final = 0x89A2
_IFF_UP: Final = 1

# struct ifreq: a name of 16 bytes, then a union of 24.
_IFREQ_FLAGS: Final = struct.Struct("=16sH22x")
_IFREQ_INT: Final = struct.Struct("=16si20x")


class Tap:
    """One tap interface with a queue (an fd) for each pair of the device. An interface made here ends with it."""

    def __init__(self, name: str, queues: int) -> None:
        """Open or make ``name`` ("" lets the kernel choose). ``HostError`` says what is in the way."""
        self.fds: list[OwnedFd] = []
        self.segments_udp = False
        try:
            for _ in range(queues):
                fd = _open_tun()
                self.fds.append(fd)
                name = _attach(fd, name, queues > 1)
            self._prepare()
        except BaseException:
            self.close()
            raise
        self.name = name

    @classmethod
    def of_fds(cls, numbers: Sequence[int]) -> Tap:
        """A tap that somebody else opened and passed on, with one fd a queue."""
        tap = cls.__new__(cls)
        tap.fds = [OwnedFd(number) for number in numbers]
        tap.segments_udp = False
        try:
            request = bytearray(_IFREQ_FLAGS.size)
            for fd in tap.fds:
                _call(fd, _TUNGETIFF, request, f"fd {fd.fileno()} is not a tap")
                name, flags = _IFREQ_FLAGS.unpack(request)
                if not flags & _IFF_TAP or not flags & _IFF_VNET_HDR:
                    raise HostError(f"fd {fd.fileno()} is not a tap with IFF_VNET_HDR")
                os.set_blocking(fd.fileno(), False)
            tap._prepare()
        except BaseException:
            tap.close()
            raise
        tap.name = name.rstrip(b"\0").decode(errors="replace")
        return tap

    def _prepare(self) -> None:
        for fd in self.fds:
            _call(fd, _TUNSETVNETHDRSZ, struct.pack("=i", HEADER_SIZE), "the tap takes no virtio header of 12 bytes")
        # Segments of UDP came with Linux 6.2: whether this kernel knows them, only trying tells.
        self.segments_udp = self._try_offloads(TUN_F_CSUM | TUN_F_TSO4 | TUN_F_USO4 | TUN_F_USO6)
        self.set_offloads(0)

    def _try_offloads(self, bits: int) -> bool:
        try:
            fcntl.ioctl(self.fds[0].fileno(), _TUNSETOFFLOAD, bits)
        except OSError:
            return False
        return True

    def set_offloads(self, bits: int) -> None:
        """What the guest takes (``TUN_F_*``): unfinished checksums, large segments. Of the interface, not a queue."""
        # Bits that say nothing without others (5.1.3.1), which the kernel would refuse altogether.
        if not bits & TUN_F_CSUM:
            bits = 0
        if not bits & (TUN_F_TSO4 | TUN_F_TSO6):
            bits &= ~TUN_F_TSO_ECN
        if bits & _USO != _USO:
            bits &= ~_USO
        if not self._try_offloads(bits) and self._is_there():
            raise HostError(f"the tap refuses the offloads {bits:#x}")

    def raise_up(self, bridge: str | None, mtu: int | None) -> None:
        """Set the interface up, with that MTU, as a port of ``bridge``. ``HostError`` names what failed."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            name = self.name.encode()
            if mtu is not None:
                _net(control, _SIOCSIFMTU, _IFREQ_INT.pack(name, mtu), f"{self.name}: setting the MTU to {mtu}")
            if bridge is not None:
                index = socket.if_nametoindex(self.name)
                try:
                    _net(control, _SIOCBRADDIF, _IFREQ_INT.pack(bridge.encode(), index), f"joining {bridge}")
                except HostError as error:
                    if error.errno != errno.EBUSY:  # a port of it already, when the tap outlived an earlier daemon
                        raise
            request = bytearray(_IFREQ_FLAGS.pack(name, 0))
            _net(control, _SIOCGIFFLAGS, request, f"{self.name}: reading its flags")
            flags = _IFREQ_FLAGS.unpack(request)[1] | _IFF_UP
            _net(control, _SIOCSIFFLAGS, _IFREQ_FLAGS.pack(name, flags), f"{self.name}: setting it up")

    async def watch(self, device: str) -> None:
        """Says once that the interface was deleted beneath its device, which nothing tells a tap's owner."""
        while True:
            await trio.sleep(LOOK_INTERVAL)
            if not self._is_there():
                break
        structlog.get_logger().warning(
            "tap is gone: somebody deleted it; nothing is sent or received until the daemon starts anew",
            device=device,
            tap=self.name,
        )

    def _is_there(self) -> bool:
        try:
            # The first queue's: one that is detached because its pair is not used has no interface either.
            fcntl.ioctl(self.fds[0].fileno(), _TUNGETIFF, bytearray(_IFREQ_FLAGS.size))
        except OSError as error:
            return error.errno != errno.EBADFD
        return True

    def close(self) -> None:
        for fd in self.fds:
            fd.close()


def _open_tun() -> OwnedFd:
    try:
        return OwnedFd(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        advice = {
            errno.ENOENT: "; load the module: modprobe tun",
            errno.EACCES: "; give the daemon's user access to it, or make the tap beforehand and pass tap_fds",
        }.get(error.errno or 0, "")
        raise HostError(f"{_TUN}: {error.strerror}{advice}", errno=error.errno or 0) from error


def _attach(fd: OwnedFd, name: str, multi_queue: bool) -> str:
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if multi_queue else 0)
    request = bytearray(_IFREQ_FLAGS.pack(name.encode(), flags))
    advice = {
        errno.EPERM: "; it needs CAP_NET_ADMIN, or a tap made beforehand for this user: "
        f"ip tuntap add {name or 'tap0'} mode tap user USER vnet_hdr{' multi_queue' if multi_queue else ''}",
        errno.EBUSY: "; somebody else uses it",
        errno.EINVAL: "; it was made with other flags (one queue or several, tun or tap)",
    }
    try:
        fcntl.ioctl(fd.fileno(), _TUNSETIFF, request, True)
    except OSError as error:
        text = f"tap {name!r}: {error.strerror}{advice.get(error.errno or 0, '')}"
        raise HostError(text, errno=error.errno or 0) from error
    made: bytes = _IFREQ_FLAGS.unpack(request)[0]
    return made.rstrip(b"\0").decode(errors="replace")


def _call(fd: OwnedFd, request: int, argument: bytes | bytearray, what: str) -> None:
    try:
        fcntl.ioctl(fd.fileno(), request, argument, isinstance(argument, bytearray))
    except OSError as error:
        raise HostError(f"{what}: {error.strerror}", errno=error.errno or 0) from error


def _net(control: socket.socket, request: int, argument: bytes | bytearray, what: str) -> None:
    try:
        fcntl.ioctl(control.fileno(), request, argument, isinstance(argument, bytearray))
    except OSError as error:
        raise HostError(f"{what}: {error.strerror}", errno=error.errno or 0) from error
