"""What a valid request asks of the back-end: plain values, decided by the session, carried out by ``perform``.

The session changes its own state only when an operation is reported as done (``Session.accept``).
"""

from __future__ import annotations

from dataclasses import dataclass

from transports.vhost_user.messages import Message
from virtio.fd import OwnedFd
from virtio.waist import MemoryRegion, QueueSetup


@dataclass(frozen=True, slots=True)
class Answer:
    """Nothing to do: the session knows the answer (0 where the request has none)."""

    value: int = 0


@dataclass(frozen=True, slots=True)
class Refuse:
    """A well-formed request that cannot be granted; refused without ending the connection, if the wire can say so.

    ``missing_queue``: it is about a queue that the device does not have. That ends no connection where the wire cannot
    say so either: front-ends prepare every queue of their machine (DPDK's virtio-user does not ask how many there are),
    and as long as the guest uses none of these nothing is missed. qemu-storage-daemon ends there, DPDK's back-end makes
    the queue; here it is just not served.
    """

    reason: str
    missing_queue: int | None = None


@dataclass(frozen=True, slots=True)
class SetOwner:
    """The session begins; once more changes nothing."""


@dataclass(frozen=True, slots=True)
class SetProtocolFeatures:
    bits: int


@dataclass(frozen=True, slots=True)
class SetFeatures:
    """``bits`` as received; ``enable_all``: the rings are enabled at once, F_PROTOCOL_FEATURES was not set.

    The rings in ``suspend`` are drained and let go of first: they run by other bits. Done with their bases as value.
    """

    bits: int
    enable_all: bool
    suspend: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SetMemory:
    """The whole new memory table; regions that stay are the same objects as before."""

    regions: tuple[MemoryRegion, ...]


@dataclass(frozen=True, slots=True)
class SetRingSize:
    """``suspend``, here and below: the back-end drains the ring and lets go of it first; its base is the value."""

    index: int
    size: int
    suspend: bool = False


@dataclass(frozen=True, slots=True)
class SetRingAddresses:
    index: int
    desc: int
    avail: int
    used: int
    suspend: bool = False


@dataclass(frozen=True, slots=True)
class SetRingBase:
    index: int
    base: int
    suspend: bool = False


@dataclass(frozen=True, slots=True)
class SetKick:
    """``kick_fd`` None = poll the ring; ``enable``: a ring without F_PROTOCOL_FEATURES starts in the enabled state."""

    index: int
    kick_fd: OwnedFd | None
    enable: bool = False


@dataclass(frozen=True, slots=True)
class ConfigureQueue:
    """No request's own operation: a ring that was kicked has become whole, whatever message did it."""

    index: int
    setup: QueueSetup


@dataclass(frozen=True, slots=True)
class KickQueue:
    """VHOST_USER_VRING_KICK for a ring that is started already."""

    index: int


@dataclass(frozen=True, slots=True)
class StopQueue:
    """Done with the ring's base as value; ``base`` is that value already when the back-end does not have the ring.

    ``started``: the back-end has its descriptors. ``flush_iotlb``: it is the last ring that runs. A front-end
    invalidates nothing while all are stopped.
    """

    index: int
    base: int | None
    started: bool = True
    flush_iotlb: bool = False


@dataclass(frozen=True, slots=True)
class SetCall:
    index: int
    call_fd: OwnedFd | None


@dataclass(frozen=True, slots=True)
class SetErr:
    index: int
    err_fd: OwnedFd | None


@dataclass(frozen=True, slots=True)
class EnableQueue:
    index: int
    on: bool


@dataclass(frozen=True, slots=True)
class DisableAllQueues:
    """VHOST_USER_RESET_OWNER, as the text recommends to understand it."""


@dataclass(frozen=True, slots=True)
class ReadConfig:
    """Done with the bytes read as value; ``flags`` go back unchanged."""

    offset: int
    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class WriteConfig:
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SetStatus:
    """A device status other than 0."""

    status: int


@dataclass(frozen=True, slots=True)
class GetStatus:
    """Done with the device status as value."""


@dataclass(frozen=True, slots=True)
class StopDevice:
    """Device status 0: all rings stop, translations are forgotten, features must be negotiated again.

    It is no reset of the device: QEMU sends it also when the virtual machine is only paused, before
    it asks for the rings' bases, and a guest that goes on must find bases and device as they were.
    Done with the base of each queue in ``running`` as value.
    """

    running: tuple[int, ...]
    flush_iotlb: bool


@dataclass(frozen=True, slots=True)
class ResetDevice:
    """VHOST_USER_RESET_DEVICE: the device forgets everything but the memory, which belongs to the connection."""


@dataclass(frozen=True, slots=True)
class IotlbUpdate:
    iova: int
    size: int
    uva: int
    perm: int


@dataclass(frozen=True, slots=True)
class IotlbInvalidate:
    iova: int
    size: int


@dataclass(frozen=True, slots=True)
class SetMtu:
    mtu: int


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the network behind the device that the station with this address, of 6 bytes, is here now."""

    address: bytes


@dataclass(frozen=True, slots=True)
class SetBackendChannel:
    fd: OwnedFd


Operation = (
    Answer
    | Refuse
    | SetOwner
    | SetProtocolFeatures
    | SetFeatures
    | SetMemory
    | SetRingSize
    | SetRingAddresses
    | SetRingBase
    | SetKick
    | KickQueue
    | StopQueue
    | SetCall
    | SetErr
    | EnableQueue
    | DisableAllQueues
    | ReadConfig
    | WriteConfig
    | SetStatus
    | GetStatus
    | StopDevice
    | ResetDevice
    | IotlbUpdate
    | IotlbInvalidate
    | SetMtu
    | Announce
    | SetBackendChannel
)


@dataclass(frozen=True, slots=True)
class Request:
    """One valid request and what it asks for."""

    message: Message
    need_reply: bool
    operation: Operation

    @property
    def name(self) -> str:
        return self.message.name

    @property
    def fds(self) -> tuple[OwnedFd, ...]:
        """The descriptors the operation carries, also those a memory table already had.

        Whoever carries the operation out owns those it brought.
        """
        match self.operation:
            case SetKick(kick_fd=fd) | SetCall(call_fd=fd) | SetErr(err_fd=fd):
                return () if fd is None else (fd,)
            case SetBackendChannel(fd=fd):
                return (fd,)
            case SetMemory(regions=regions):
                return tuple(region.fd for region in regions)
            case _:
                return ()
