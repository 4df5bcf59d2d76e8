"""The Python face of the native network device and of the switch between several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Final

from virtio.dataplane import check, ffi, lib
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.native.disk import NativeDevice

PAIRS_MAX: Final[int] = lib.NET_PAIRS_MAX
PORTS_MAX: Final[int] = lib.NET_SWITCH_PORTS_MAX
OPS: Final = ("receive", "transmit", "control")


class NicBackend(IntEnum):
    """Where frames go."""

    DROP = lib.NET_BACKEND_DROP
    REFLECT = lib.NET_BACKEND_REFLECT
    SWITCH = lib.NET_BACKEND_SWITCH
    TAP = lib.NET_BACKEND_TAP
    DATAGRAM = lib.NET_BACKEND_DATAGRAM


@dataclass(frozen=True, slots=True)
class NicCounters:
    """Frames by what became of them, since the device was made: ``flooded`` ones went to all ports of a switch, the
    others were lost."""

    malformed: int = 0
    """From the guest: with a header that lies, or no frame at all."""
    sent_link_down: int = 0
    sent_disabled: int = 0
    """From the guest: on a transmit queue that the front-end had disabled."""
    dropped: int = 0
    """From the guest: nobody was there to take it."""
    spoofed: int = 0
    """From the guest: with the address of another port of the switch, which keeps it."""
    no_buffers: int = 0
    """For the guest, which had no receive buffers."""
    refused: int = 0
    """For the guest: larger than its buffers, or than its MTU."""
    received_link_down: int = 0
    filtered: int = 0
    """For the guest: to an address that it does not listen to."""
    misreceived: int = 0
    """For the guest: no frame, or one with a header that makes no sense."""
    flooded: int = 0


class NativeSwitch:
    """A learning switch. All its ports must be driven by one worker."""

    def __init__(self) -> None:
        pointer = lib.net_switch_new()
        if pointer == ffi.NULL:
            raise HostError("no memory for a switch")
        self.pointer: Any = ffi.gc(pointer, lib.net_switch_unref)


class NativeNic(NativeDevice):
    """A network device in the data plane. It keeps duplicates of ``fds``: a queue each of a tap, or one socket."""

    def __init__(
        self,
        backend: NicBackend,
        pairs: int,
        *,
        mac: bytes,
        keeps_mac: bool = False,
        fds: Sequence[OwnedFd] = (),
        switch: NativeSwitch | None = None,
    ) -> None:
        raw = ffi.new("struct net_setup *")
        raw.backend, raw.pairs, raw.mac, raw.keeps_mac = int(backend), pairs, mac, keeps_mac
        for index, fd in enumerate(fds):
            raw.fds[index] = fd.fileno()
        error = ffi.new("int *")
        pointer = lib.net_new(raw, switch.pointer if switch is not None else ffi.NULL, error)
        if pointer == ffi.NULL:
            check(error[0], "making a network device")
            raise HostError("making a network device failed")
        self.pointer = ffi.gc(pointer, lib.native_device_unref)

    def _alive(self) -> Any:
        if self.pointer == ffi.NULL:
            raise ValueError("the network device is closed")
        return self.pointer

    def set_features(self, bits: int) -> None:
        """What the driver accepted: it decides what a header may say, and what is done in software."""
        lib.net_set_features(self._alive(), bits)

    def set_link(self, up: bool) -> None:
        """Down: whatever is sent either way is lost."""
        lib.net_set_link(self._alive(), up)

    def set_mtu(self, mtu: int) -> None:
        """What a driver that asked (VIRTIO_NET_F_MTU) was told: nothing longer is passed to it. 0: nothing."""
        lib.net_set_mtu(self._alive(), mtu)

    def mute(self, pair: int, on: bool) -> None:
        """Whatever is sent on that pair is taken and lost. Its worker knows once it has been nudged."""
        lib.net_mute(self._alive(), pair, on)

    def ask_to_announce(self) -> None:
        """Ask a driver that can (5.1.4) to tell its network where it is; ``announcing`` until it has done so."""
        lib.net_ask_to_announce(self._alive())

    @property
    def announcing(self) -> bool:
        return bool(lib.net_announcing(self._alive()))

    @property
    def mac(self) -> bytes:
        """The address the driver goes by: what it was told, or has chosen itself (5.1.6.5.2)."""
        mac = ffi.new("uint8_t[6]")
        lib.net_mac(self._alive(), mac)
        return bytes(mac)

    def set_mac(self, mac: bytes) -> None:
        """The driver has chosen another address, and not by the control queue."""
        lib.net_set_mac(self._alive(), mac)

    @property
    def active_pairs(self) -> int:
        """How many receive queues frames are spread over."""
        return int(lib.net_active_pairs(self._alive()))

    def prepare_rarp(self, mac: bytes) -> None:
        """What the worker of the first pair sends to the other side when it is nudged: where ``mac`` is now."""
        lib.net_prepare_rarp(self._alive(), mac)

    def counters(self) -> NicCounters:
        raw = ffi.new("struct net_counters *")
        lib.net_counters_sum(self._alive(), raw)
        return NicCounters(**{field.name: getattr(raw, field.name) for field in fields(NicCounters)})

    def close(self) -> None:
        """Let go of the device; a worker in the middle of a turn does so later."""
        self.pointer = ffi.NULL
