"""The network device (section 5.1): frames between a guest's queues and a tap, a switch, a socket, or nothing at all.

Queues (5.1.2): receive and transmit by turns, a pair for each of ``queues``. "Receive" is the driver's word. Served
by native workers; a pair stays on one worker.
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar, Final, Literal
from weakref import WeakValueDictionary

from pydantic import Field, field_validator, model_validator

from virtio import spec
from virtio.config_space import VIRTIO_NET_CONFIG
from virtio.device import Device, DeviceOptions
from virtio.nic import OPS, PAIRS_MAX, NativeNic, NativeSwitch, NicBackend

VIRTIO_NET_F_CSUM: Final = 0
VIRTIO_NET_F_GUEST_CSUM: Final = 1
VIRTIO_NET_F_MTU: Final = 3
VIRTIO_NET_F_MAC: Final = 5
VIRTIO_NET_F_GUEST_TSO4: Final = 7
VIRTIO_NET_F_GUEST_TSO6: Final = 8
VIRTIO_NET_F_GUEST_ECN: Final = 9
VIRTIO_NET_F_HOST_TSO4: Final = 11
VIRTIO_NET_F_HOST_TSO6: Final = 12
VIRTIO_NET_F_HOST_ECN: Final = 13
VIRTIO_NET_F_MRG_RXBUF: Final = 15
VIRTIO_NET_F_STATUS: Final = 16
VIRTIO_NET_F_MQ: Final = 22
VIRTIO_NET_F_GUEST_USO4: Final = 54
VIRTIO_NET_F_GUEST_USO6: Final = 55
VIRTIO_NET_F_HOST_USO: Final = 56

VIRTIO_NET_S_LINK_UP: Final = 1

_FROM_GUEST: Final = {
    "VIRTIO_NET_F_CSUM": VIRTIO_NET_F_CSUM,
    "VIRTIO_NET_F_HOST_TSO4": VIRTIO_NET_F_HOST_TSO4,
    "VIRTIO_NET_F_HOST_TSO6": VIRTIO_NET_F_HOST_TSO6,
    "VIRTIO_NET_F_HOST_ECN": VIRTIO_NET_F_HOST_ECN,
    "VIRTIO_NET_F_HOST_USO": VIRTIO_NET_F_HOST_USO,
}
_TO_GUEST: Final = {
    "VIRTIO_NET_F_GUEST_CSUM": VIRTIO_NET_F_GUEST_CSUM,
    "VIRTIO_NET_F_GUEST_TSO4": VIRTIO_NET_F_GUEST_TSO4,
    "VIRTIO_NET_F_GUEST_TSO6": VIRTIO_NET_F_GUEST_TSO6,
    "VIRTIO_NET_F_GUEST_ECN": VIRTIO_NET_F_GUEST_ECN,
    "VIRTIO_NET_F_GUEST_USO4": VIRTIO_NET_F_GUEST_USO4,
    "VIRTIO_NET_F_GUEST_USO6": VIRTIO_NET_F_GUEST_USO6,
}
_OFFLOADS: Final = sum(1 << bit for bit in (*_FROM_GUEST.values(), *_TO_GUEST.values()))


class NetOptions(DeviceOptions):
    """Options of ``type = "net"``."""

    backend: Literal["null", "switch"] = Field(
        "null", description='"null": no network behind it; "switch": the other guests of this daemon on that switch.'
    )
    frames: Literal["drop", "reflect"] = Field(
        "drop",
        description='With "null": "drop": nothing comes back; "reflect": each frame returns to the guest that sent it.',
    )
    switch: str | None = Field(
        None,
        min_length=1,
        max_length=63,
        description='Name of the switch, with backend = "switch"; devices that name the same one are joined.',
    )
    mac: str | None = Field(
        None,
        pattern=r"^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$",
        description="The guest's address. Default: a locally administered one made from the device's name.",
    )
    mtu: int | None = Field(
        None, ge=68, le=65535, description="The MTU the guest is told to use. Default: none is told."
    )

    @field_validator("mac")
    @classmethod
    def _of_one_station(cls, mac: str | None) -> str | None:
        if mac is not None and (int(mac[:2], 16) & 1 or not any(parse_mac(mac))):
            raise ValueError(f"{mac} is not the address of a single station")
        return mac

    @model_validator(mode="after")
    def _what_goes_together(self) -> NetOptions:
        if self.backend == "switch" and self.switch is None:
            raise ValueError('switch is missing: name it, for instance switch = "lan"')
        if self.backend != "switch" and self.switch is not None:
            raise ValueError(f'switch has no meaning with backend = "{self.backend}"')
        return self

    def address(self, name: str) -> bytes:
        """The address of the device called ``name``."""
        return parse_mac(self.mac) if self.mac else mac_from_name(name)


def parse_mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def mac_from_name(name: str) -> bytes:
    """Always the same for one name; bit 1 of the first byte: locally administered, bit 0 clear: of one station."""
    digest = hashlib.sha256(b"hyperbell mac " + name.encode()).digest()
    return bytes([digest[0] & 0xFC | 2]) + digest[1:6]


_SWITCHES: Final[WeakValueDictionary[str, NativeSwitch]] = WeakValueDictionary()
"""The switches of this process by name; each lives as long as a port of it."""


def switch_named(name: str) -> NativeSwitch:
    """The switch of that name, which its ports share."""
    switch = _SWITCHES.get(name)
    if switch is None:
        switch = _SWITCHES[name] = NativeSwitch()
    return switch


class Net(Device):
    """One network interface."""

    virtio_id: ClassVar[int] = spec.VIRTIO_ID_NET
    type_name = "net"
    native = True
    ops = OPS
    Options = NetOptions
    feature_bits = {
        **_FROM_GUEST,
        **_TO_GUEST,
        "VIRTIO_NET_F_MTU": VIRTIO_NET_F_MTU,
        "VIRTIO_NET_F_MAC": VIRTIO_NET_F_MAC,
        "VIRTIO_NET_F_MRG_RXBUF": VIRTIO_NET_F_MRG_RXBUF,
        "VIRTIO_NET_F_STATUS": VIRTIO_NET_F_STATUS,
        "VIRTIO_NET_F_MQ": VIRTIO_NET_F_MQ,
    }
    queue_counts = (1, PAIRS_MAX)

    def __init__(self, name: str, options: NetOptions, queues: int, queue_size: int) -> None:
        # In the configuration it is pairs that are counted.
        super().__init__(name, options, 2 * queues, queue_size)
        self.mac: Final = options.address(name)
        self._options = options
        self._pairs = queues
        self._link_up = True
        self._switch = switch_named(options.switch) if options.switch is not None else None
        self._nic = NativeNic(self._native_backend(), queues, switch=self._switch)

    def _native_backend(self) -> NicBackend:
        if self._switch is not None:
            return NicBackend.SWITCH
        return NicBackend.REFLECT if self._options.frames == "reflect" else NicBackend.DROP

    @property
    def native_device(self) -> NativeNic:
        return self._nic

    def worker_of(self, queue_index: int, workers: int) -> int:
        """Both queues of a pair are one worker's."""
        return queue_index // 2 % workers

    def features(self) -> int:
        bits = super().features()
        if self._options.mtu is None:
            bits &= ~(1 << VIRTIO_NET_F_MTU)
        if self._pairs == 1:
            bits &= ~(1 << VIRTIO_NET_F_MQ)
        if self._switch is None:
            # Nobody is there to send segments, and a frame that comes back comes back as it is.
            bits &= ~_OFFLOADS
        return bits

    def set_driver_features(self, bits: int) -> None:
        super().set_driver_features(bits)
        self._nic.set_features(bits)
        # vhost-user: which pairs are in use shows in which queues are enabled, and the front-end spreads over all.
        self._nic.set_active_pairs(self._pairs if bits >> VIRTIO_NET_F_MQ & 1 else 1)

    def config_space(self) -> bytes:
        fields: dict[str, Any] = {
            "mac": self.mac,
            "status": VIRTIO_NET_S_LINK_UP if self._link_up else 0,
            "max_virtqueue_pairs": self._pairs,
            "mtu": self._options.mtu or 0,
        }
        return bytes(VIRTIO_NET_CONFIG.build(fields))

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out; the driver is told (5.1.4)."""
        if up != self._link_up:
            self._link_up = up
            self._nic.set_link(up)
            self.config_changed()

    def close(self) -> None:
        self._nic.close()
