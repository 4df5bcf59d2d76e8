"""The network device (section 5.1): frames between a guest's queues and a tap, a switch, a socket, or nothing at all.

Queues (5.1.2): receive and transmit by turns, a pair for each of ``queues``, and the control queue. "Receive" is the
driver's word. Served by native workers; a pair stays on one worker. A front-end such as QEMU's shows its guest a
control queue of its own, and then ours is not used.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar, Final, Literal
from weakref import WeakValueDictionary

import trio
from pydantic import Field, field_validator, model_validator

from virtio import spec
from virtio.capabilities import NetworkPort
from virtio.claims import Claims, Shared, Unique
from virtio.config_space import VIRTIO_NET_CONFIG
from virtio.device import Device
from virtio.devices.net.address import mac_from_name, parse_mac
from virtio.devices.net.peer import Peer, open_socket
from virtio.devices.net.peer_options import SocketOptions, parse_address
from virtio.devices.net.tap import NAME_MAX as TAP_NAME_MAX
from virtio.devices.net.tap import TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_USO4, TUN_F_USO6, Tap
from virtio.devices.net.user import UserOptions, UserPeer
from virtio.errors import HostError, PeerError
from virtio.native.nic import OPS, PAIRS_MAX, PORTS_MAX, NativeNic, NativeSwitch, NicBackend
from virtio.native.stats import Lost

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
VIRTIO_NET_F_CTRL_VQ: Final = 17
VIRTIO_NET_F_CTRL_RX: Final = 18
VIRTIO_NET_F_GUEST_ANNOUNCE: Final = 21
VIRTIO_NET_F_MQ: Final = 22
VIRTIO_NET_F_CTRL_MAC_ADDR: Final = 23
VIRTIO_NET_F_GUEST_USO4: Final = 54
VIRTIO_NET_F_GUEST_USO6: Final = 55
VIRTIO_NET_F_HOST_USO: Final = 56

VIRTIO_NET_S_LINK_UP: Final = 1
VIRTIO_NET_S_ANNOUNCE: Final = 2

MTU_MIN: Final = 68  # 5.1.4.1
MTU_MAX: Final = 65535

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
_TAP_OFFLOADS: Final = {
    VIRTIO_NET_F_GUEST_CSUM: TUN_F_CSUM,
    VIRTIO_NET_F_GUEST_TSO4: TUN_F_TSO4,
    VIRTIO_NET_F_GUEST_TSO6: TUN_F_TSO6,
    VIRTIO_NET_F_GUEST_ECN: TUN_F_TSO_ECN,
    VIRTIO_NET_F_GUEST_USO4: TUN_F_USO4,
    VIRTIO_NET_F_GUEST_USO6: TUN_F_USO6,
}
_LOST: Final = (
    ("malformed", "transmit", "malformed"),
    ("sent_link_down", "transmit", "link_down"),
    ("sent_disabled", "transmit", "disabled"),
    ("dropped", "transmit", "nobody_there"),
    ("spoofed", "transmit", "another_ports_address"),
    ("no_buffers", "receive", "no_buffers"),
    ("refused", "receive", "too_large"),
    ("received_link_down", "receive", "link_down"),
    ("filtered", "receive", "filtered"),
    ("misreceived", "receive", "malformed"),
)
"""Counters of the data plane, which way such a frame was going, and why it did not get there."""
_UDP_SEGMENTS: Final = 1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6
_OFFLOADS: Final = sum(1 << bit for bit in (*_FROM_GUEST.values(), *_TO_GUEST.values()))


_KEYS_OF: Final = {
    "switch": ("switch", "mac_filter"),
    "tap": ("tap", "tap_fds", "bridge"),
    "socket": tuple(SocketOptions.model_fields),
    "user": tuple(UserOptions.model_fields),
}
"""Options that only one back end has."""


class NetOptions(SocketOptions, UserOptions):
    """Options of ``type = "net"``."""

    backend: Literal["null", "socket", "switch", "tap", "user"] = Field(
        "null",
        description='"null": no network behind it; "switch": the other guests of this daemon on that switch; '
        '"tap": an interface of the host; "socket": a peer at the other end of a socket, '
        "which speaks QEMU's stream or dgram format; "
        '"user": the host\'s own connections, for which nothing need be set up.',
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
    tap: str | None = Field(
        None,
        min_length=1,
        max_length=TAP_NAME_MAX,
        pattern=r"^[^\s/%]+$",
        description='Name of the interface, with backend = "tap"; made where it does not exist. '
        "Default: the kernel chooses one.",
    )
    tap_fds: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        max_length=PAIRS_MAX,
        description="Instead of tap: the numbers of open taps (with vnet_hdr) that the daemon inherits, one a pair.",
    )
    bridge: str | None = Field(
        None,
        min_length=1,
        max_length=TAP_NAME_MAX,
        pattern=r"^[^\s/%]+$",
        description="The bridge that the tap joins. Default: none, and somebody else sets it up.",
    )
    mac: str | None = Field(
        None,
        pattern=r"^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$",
        description="The guest's address. Default: a locally administered one made from the host's machine id and the "
        "device's name.",
    )
    mac_filter: bool | None = Field(
        None,
        description="With a switch: frames that other ports send with this interface's address are lost, so none of "
        "them takes over its traffic. Default: true where mac is set.",
    )
    mtu: int | None = Field(
        None, ge=MTU_MIN, le=MTU_MAX, description="The MTU the guest is told to use. Default: none is told."
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
        for backend, keys in _KEYS_OF.items():
            for key in keys:
                if getattr(self, key) is not None and self.backend != backend:
                    raise ValueError(f'{key} has no meaning with backend = "{self.backend}"')
        if self.tap_fds is not None and (self.tap is not None or self.bridge is not None):
            raise ValueError("tap_fds stands beside tap or bridge: whoever opened the tap sets it up too")
        if self.backend == "socket":
            self.check_socket()
        if self.backend == "user":
            self.user_setup(self.mtu)
        return self

    @property
    def pairs_max(self) -> int:
        """Pairs of queues that this back end can have."""
        return 1 if self.backend in ("socket", "user") else PAIRS_MAX

    def claims(self, name: str) -> Claims:
        """What else stands on the same switch must be driven by the same worker: there is no lock in it.

        An address is one interface's: of its switch, or of whatever networks the host joins.
        """
        shared, unique, where = None, None, ""
        if self.switch is not None:
            shared = Shared(f'the switch "{self.switch}"', "switch", PORTS_MAX)
            where = f' on the switch "{self.switch}"'
        if self.backend != "null":
            unique = Unique(f"the address {self.address(name).hex(':')}{where}", "mac")
        local = parse_address(self.local) if self.local is not None else None
        sockets: dict[tuple[str, ...], Path] = {}
        if local is not None and local.path:
            sockets["local",] = Path(local.path)
        return Claims(shared=shared, unique=unique, sockets=sockets, only_read=frozenset({"tftp"}))

    @property
    def keeps_address(self) -> bool:
        """No other port of the switch may send with its address."""
        return self.switch is not None and (self.mac is not None if self.mac_filter is None else self.mac_filter)

    def address(self, name: str) -> bytes:
        """The address of the device called ``name``."""
        return parse_mac(self.mac) if self.mac else mac_from_name(name)


_SWITCHES: Final[WeakValueDictionary[str, NativeSwitch]] = WeakValueDictionary()
"""The switches of this process by name; each lives as long as a port of it."""
_NAMING: Final = threading.Lock()


def switch_named(name: str) -> NativeSwitch:
    """The switch of that name, which its ports share."""
    with _NAMING:  # devices are opened in threads
        switch = _SWITCHES.get(name)
        if switch is None:
            switch = _SWITCHES[name] = NativeSwitch()
        return switch


class Net(Device, NetworkPort):
    """One network interface."""

    virtio_id: ClassVar[int] = spec.VIRTIO_ID_NET
    type_name = "net"
    files_may_hang = True
    native = True
    answers_in_order = True
    ops = OPS
    Options = NetOptions
    feature_bits = {
        **_FROM_GUEST,
        **_TO_GUEST,
        "VIRTIO_NET_F_MTU": VIRTIO_NET_F_MTU,
        "VIRTIO_NET_F_MAC": VIRTIO_NET_F_MAC,
        "VIRTIO_NET_F_MRG_RXBUF": VIRTIO_NET_F_MRG_RXBUF,
        "VIRTIO_NET_F_STATUS": VIRTIO_NET_F_STATUS,
        "VIRTIO_NET_F_CTRL_VQ": VIRTIO_NET_F_CTRL_VQ,
        "VIRTIO_NET_F_CTRL_RX": VIRTIO_NET_F_CTRL_RX,
        "VIRTIO_NET_F_GUEST_ANNOUNCE": VIRTIO_NET_F_GUEST_ANNOUNCE,
        "VIRTIO_NET_F_MQ": VIRTIO_NET_F_MQ,
        "VIRTIO_NET_F_CTRL_MAC_ADDR": VIRTIO_NET_F_CTRL_MAC_ADDR,
    }
    queue_counts = (1, PAIRS_MAX)

    def __init__(self, name: str, options: NetOptions, queues: int, queue_size: int) -> None:
        super().__init__(name, options, self.virtqueues(options, queues), queue_size)
        self.mac: Final = options.address(name)
        self._options = options
        self._pairs = queues
        self._link_up = True
        self._switch = switch_named(options.switch) if options.switch is not None else None
        self._tap = self._open_tap() if options.backend == "tap" else None
        self._peer = self._open_peer()
        try:
            fds = self._tap.fds if self._tap is not None else (self._peer.fd,) if self._peer is not None else ()
            self._nic = NativeNic(
                self._native_backend(),
                queues,
                mac=self.mac,
                keeps_mac=options.keeps_address,
                fds=fds,
                switch=self._switch,
            )
        except BaseException:
            self._close_outside()
            raise
        self._nic.set_mtu(options.mtu or 0)

    @classmethod
    def virtqueues(cls, options: NetOptions, queues: int) -> int:
        """In the configuration it is pairs that are counted."""
        return 2 * queues + 1

    def _native_backend(self) -> NicBackend:
        if self._tap is not None:
            return NicBackend.TAP
        if self._peer is not None:
            return NicBackend.DATAGRAM
        if self._switch is not None:
            return NicBackend.SWITCH
        return NicBackend.REFLECT if self._options.frames == "reflect" else NicBackend.DROP

    def _open_tap(self) -> Tap:
        options = self._options
        if options.tap_fds is not None:
            if len(options.tap_fds) != self._pairs:
                raise HostError(f"tap_fds has {len(options.tap_fds)} numbers for queues = {self._pairs}")
            return Tap.of_fds(options.tap_fds)
        tap = Tap(options.tap or "", self._pairs)
        try:
            tap.raise_up(options.bridge, options.mtu)
        except BaseException:
            tap.close()
            raise
        return tap

    def _open_peer(self) -> Peer | None:
        options = self._options
        if options.backend not in ("socket", "user"):
            return None
        if self._pairs > options.pairs_max:
            raise HostError(f'queues = {self._pairs}: with backend = "{options.backend}" there is one pair')
        if options.backend == "user":
            return UserPeer(self.name, options.user_setup(options.mtu))
        return open_socket(self.name, options)

    def _close_outside(self) -> None:
        if self._tap is not None:
            self._tap.close()
        if self._peer is not None:
            self._peer.close()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        if self._peer is not None:
            await self._peer.run(task_status=task_status)
        else:
            task_status.started()
            if self._tap is not None:
                await self._tap.watch(self.name)

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
        if self._options.backend == "null":
            # Nobody is there to send segments, and a frame that comes back comes back as it is, whoever it was for.
            bits &= ~(_OFFLOADS | 1 << VIRTIO_NET_F_CTRL_RX)
        if self._peer is not None:
            # No header travels with the frames.
            bits &= ~_OFFLOADS
        if self._tap is not None and not self._tap.segments_udp:
            bits &= ~_UDP_SEGMENTS
        return bits

    def set_driver_features(self, bits: int) -> None:
        super().set_driver_features(bits)
        self._nic.set_features(bits)
        if self._tap is not None:
            self._tap.set_offloads(sum(tun for bit, tun in _TAP_OFFLOADS.items() if bits >> bit & 1))

    def config_space(self) -> bytes:
        status = VIRTIO_NET_S_LINK_UP if self._link_up else 0
        if self._nic.announcing:
            status |= VIRTIO_NET_S_ANNOUNCE
        fields: dict[str, Any] = {
            "mac": self._nic.mac,
            "status": status,
            "max_virtqueue_pairs": self._pairs,
            "mtu": self._options.mtu or 0,
        }
        return bytes(VIRTIO_NET_CONFIG.build(fields))

    def write_config(self, offset: int, data: bytes) -> None:
        """Read-only (5.1.4), but a legacy driver without CTRL_MAC_ADDR chooses its address here (5.1.4.3)."""
        if self.driver_features & (1 << spec.VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR):
            return
        mac = bytearray(self._nic.mac)
        for at, byte in enumerate(data, offset):
            if at < len(mac):
                mac[at] = byte
        self._nic.set_mac(bytes(mac))

    def lost(self) -> tuple[Lost, ...]:
        counts = self._nic.counters()
        return tuple(Lost(direction, reason, getattr(counts, name)) for name, direction, reason in _LOST)

    @property
    def port(self) -> NetworkPort:
        return self

    @property
    def link_up(self) -> bool:
        return self._link_up

    def set_link(self, up: bool) -> bool:
        """5.1.4. A guest that is plugged in again may be somewhere else, so it is asked to announce itself."""
        if up == self._link_up:
            return False
        self._link_up = up
        self._nic.set_link(up)
        if up:
            self._nic.ask_to_announce()
        self.config_changed()
        return True

    def mute(self, queue_index: int, on: bool) -> bool:
        """Of what a guest sends meanwhile nothing stays behind to be sent later."""
        if not queue_index % 2:  # receive queues, and control
            return False
        self._nic.mute(queue_index // 2, on)
        return True

    def set_mtu(self, mtu: int) -> None:
        if not MTU_MIN <= mtu <= (self._options.mtu or MTU_MAX):
            allowed = f"{MTU_MIN} to {self._options.mtu or MTU_MAX}"
            raise PeerError(f"an MTU of {mtu} bytes; this interface has {allowed}")
        self._nic.set_mtu(mtu)

    def reset(self) -> None:
        super().reset()
        self._nic.set_mtu(self._options.mtu or 0)
        self._nic.set_mac(self.mac)

    def prepare_announcement(self, address: bytes) -> None:
        self._nic.prepare_rarp(address)

    def close(self) -> None:
        self._nic.close()
        self._close_outside()
