"""The network device (section 5.1) with nothing behind it: frames are dropped, or come back to whoever sent them.

One pair of queues (5.1.2): 0 receive, 1 transmit; "receive" is the driver's word. No offloads: a frame is what follows
the header, and the header of what comes back is our own.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from typing import ClassVar, Final, Literal

import structlog
import trio
from pydantic import Field, field_validator

from virtio import spec
from virtio.config_space import VIRTIO_NET_CONFIG
from virtio.device import Chain, Device, DeviceOptions, Queue

VIRTIO_NET_F_MAC: Final = 5
VIRTIO_NET_F_STATUS: Final = 16
VIRTIO_NET_S_LINK_UP: Final = 1

RECEIVE: Final = 0
TRANSMIT: Final = 1

_HEADER: Final = struct.Struct("<BBHHHHH")
"""5.1.6: struct virtio_net_hdr; flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers."""
LEGACY_HEADER_SIZE: Final = 10
"""5.1.6.1: without VIRTIO_F_VERSION_1 there is no num_buffers (a legacy driver behind a front-end that allows it)."""

FRAME_MIN: Final = 14
"""Two addresses and a type: less is no Ethernet frame."""
FRAME_MAX: Final = 14 + 0xFFFF
"""Whatever the driver claims, no more than this is read of one frame."""
BACKLOG: Final = 64
"""Frames kept for a receive queue that does not run at the moment."""

log = structlog.get_logger()


class NetOptions(DeviceOptions):
    """Options of ``type = "net"``."""

    backend: Literal["null"] = Field("null", description='"null": no network behind it.')
    frames: Literal["drop", "reflect"] = Field(
        "drop", description='"drop": nothing comes back; "reflect": each frame comes back to the guest that sent it.'
    )
    mac: str | None = Field(
        None,
        pattern=r"^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$",
        description="The guest's address. Default: a locally administered one made from the device's name.",
    )

    @field_validator("mac")
    @classmethod
    def _of_one_station(cls, mac: str | None) -> str | None:
        if mac is not None and (int(mac[:2], 16) & 1 or not any(parse_mac(mac))):
            raise ValueError(f"{mac} is not the address of a single station")
        return mac

    def address(self, name: str) -> bytes:
        """The address of the device called ``name``."""
        return parse_mac(self.mac) if self.mac else mac_from_name(name)


def parse_mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def mac_from_name(name: str) -> bytes:
    """Always the same for one name; bit 1 of the first byte: locally administered, bit 0 clear: of one station."""
    digest = hashlib.sha256(b"hyperbell mac " + name.encode()).digest()
    return bytes([digest[0] & 0xFC | 2]) + digest[1:6]


class Net(Device):
    """A network interface whose other end is itself, or nobody."""

    virtio_id: ClassVar[int] = spec.VIRTIO_ID_NET
    type_name = "net"
    ops = ("receive", "transmit")
    Options = NetOptions
    feature_bits = {"VIRTIO_NET_F_MAC": VIRTIO_NET_F_MAC, "VIRTIO_NET_F_STATUS": VIRTIO_NET_F_STATUS}
    queue_counts = (1, 1)

    def __init__(self, name: str, options: NetOptions, queues: int, queue_size: int) -> None:
        # In the configuration it is pairs that are counted.
        super().__init__(name, options, 2, queue_size)
        self.mac: Final = options.address(name)
        self._reflects = options.frames == "reflect"
        self._receive: Queue | None = None  # while the receive queue runs
        self._waiting: deque[bytes] = deque()
        self._told: set[str] = set()

    def config_space(self) -> bytes:
        return bytes(VIRTIO_NET_CONFIG.build({"mac": self.mac, "status": VIRTIO_NET_S_LINK_UP}))

    def reset(self) -> None:
        self._waiting.clear()

    # ---- queues ----

    @property
    def _header_size(self) -> int:
        return _HEADER.size if self.driver_features >> spec.VIRTIO_F_VERSION_1 & 1 else LEGACY_HEADER_SIZE

    async def run_queue(self, queue: Queue) -> None:
        if queue.index == TRANSMIT:
            await queue.serve(self.handle)
            return
        # Its buffers are taken when there is a frame for them, so its doorbells say nothing.
        self._receive = queue
        try:
            while self._waiting:
                self._deliver(queue, self._waiting.popleft())
            await trio.sleep_forever()
        finally:
            self._receive = None

    async def handle(self, queue: Queue, chain: Chain) -> None:
        """One frame from the driver; ``failed`` when it got no further though it should have."""
        chain.op = TRANSMIT
        header = chain.read(self._header_size)
        frame = chain.read(FRAME_MAX + 1)
        if len(header) < self._header_size or len(frame) < FRAME_MIN:
            chain.failed = self._lost("it is shorter than a header and an Ethernet header")
        elif len(frame) > FRAME_MAX:
            chain.failed = self._lost("it is too long")
        elif self._reflects:
            chain.failed = self._reflect(frame)

    # What follows answers whether the frame was lost.

    def _reflect(self, frame: bytes) -> bool:
        if self._receive is not None:
            return self._deliver(self._receive, frame)
        if len(self._waiting) == BACKLOG:
            return self._lost("the receive queue does not run")
        self._waiting.append(frame)
        return False

    def _deliver(self, queue: Queue, frame: bytes) -> bool:
        chain = queue.chain_at_hand()
        if chain is None:
            return self._lost("the driver gave no buffer for it")
        chain.op = RECEIVE
        if chain.writable_length >= self._header_size + len(frame):
            # 5.1.6.4.1: no offloads were negotiated, so all else is 0; one buffer, as there are no mergeable ones.
            chain.write(_HEADER.pack(0, 0, 0, 0, 0, 0, 1)[: self._header_size])
            chain.write(frame)
        else:  # it goes back empty
            chain.failed = self._lost("the driver's buffer for it is too small")
        lost = chain.failed
        chain.complete()
        return lost

    def _lost(self, why: str) -> bool:
        """Every lost frame is an error in the metrics; each cause is told once."""
        if why not in self._told:
            self._told.add(why)
            log.warning(f"a frame was dropped: {why}", device=self.name)
        return True
