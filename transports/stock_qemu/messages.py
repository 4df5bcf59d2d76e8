"""The messages between the preload library and the daemon; ``library/wire.h`` is the other side's table."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from construct import Bytes, Const, Int16ul, Int32sl, Int32ul, Struct

from virtio.errors import PeerError

WIRE_MAGIC: Final = 0x42624848
WIRE_VERSION: Final = 1
WIRE_NAME_SIZE: Final = 32
WIRE_SIZE: Final = 64

WIRE_BELL_REGISTERED: Final = 1

BELL_MAX: Final = 0xFF_FFFF
VCPU_MAX: Final = 4095


class Type(enum.IntEnum):
    """What a message is."""

    VM = 1
    BELL = 2
    BELL_GONE = 3
    VCPU = 4
    ANSWER = 5
    WELCOME = 32
    REGISTER = 33
    WITHDRAW = 34


FDS: Final[Mapping[int, int]] = MappingProxyType(
    {Type.VM: 0, Type.BELL: 1, Type.BELL_GONE: 0, Type.VCPU: 1, Type.ANSWER: 0}
)
"""How many descriptors come with each message of the library's."""


class VmFlag(enum.IntFlag):
    """Flags of VM."""

    KEY_SHOWN = 1
    KEY_STABLE = 2
    INCOMING = 4
    CPUID_SEEN = 8
    HYPERV = 16
    MAY_NEST = 32


class Reason(enum.IntEnum):
    """Why a VM has no ids. The names are labels of a metric."""

    NONE = 0
    NO_CAPABILITY = 1
    NO_HYPERV = 2
    INCOMING = 3
    CPUID_REFUSED = 4
    NO_KEY = 5


REASON_TEXTS: Final[Mapping[Reason, str]] = MappingProxyType(
    {
        Reason.NONE: "",
        Reason.NO_CAPABILITY: "KVM on this host has no KVM_HYPERV_EVENTFD",
        Reason.NO_HYPERV: "the guest has no Hyper-V leaves: add hv-relaxed to QEMU's -cpu",
        Reason.INCOMING: "a VM that comes from elsewhere needs the key it had there: --key, or --secret and --uuid",
        Reason.CPUID_REFUSED: "KVM did not take the platform leaf: its table of CPUID leaves is full",
        Reason.NO_KEY: "it was given a key that is none",
    }
)

_MESSAGE: Final = Struct(
    "magic" / Const(WIRE_MAGIC, Int32ul),
    "version" / Int16ul,
    "type" / Int16ul,
    "bell" / Int32ul,
    "serial" / Int32ul,
    "flags" / Int32ul,
    "result" / Int32sl,
    "vcpu" / Int32ul,
    "reserved" / Const(0, Int32ul),
    "name" / Bytes(WIRE_NAME_SIZE),
)


@dataclass(frozen=True, slots=True)
class Message:
    """One message; the fields that its type does not use are 0."""

    type: int
    bell: int = 0
    serial: int = 0
    flags: int = 0
    result: int = 0
    vcpu: int = 0
    name: str = ""

    def build(self) -> bytes:
        """As it travels."""
        values = {
            "version": WIRE_VERSION,
            "type": self.type,
            "bell": self.bell,
            "serial": self.serial,
            "flags": self.flags,
            "result": self.result,
            "vcpu": self.vcpu,
            "name": self.name.encode().ljust(WIRE_NAME_SIZE, b"\0"),
        }
        return bytes(_MESSAGE.build(values))


def parse_message(data: bytes, fd_count: int) -> Message:
    """A message of the library's that came with so many descriptors; ``PeerError`` if it is none."""
    if len(data) != WIRE_SIZE or int.from_bytes(data[:4], "little") != WIRE_MAGIC:
        raise PeerError(f"{len(data)} bytes that are no message")
    version = int.from_bytes(data[4:6], "little")
    if version != WIRE_VERSION:
        raise PeerError(f"version {version} of the messages, not {WIRE_VERSION}: the library is another hyperbell's")
    if any(data[28:32]):
        raise PeerError("the reserved field is not 0")
    fields = _MESSAGE.parse(data)
    if FDS.get(fields.type) != fd_count:
        raise PeerError(f"a message of type {fields.type} with {fd_count} descriptors")
    name = bytes(fields.name).partition(b"\0")[0].decode("ascii", "replace")
    message = Message(fields.type, fields.bell, fields.serial, fields.flags, fields.result, fields.vcpu, name)
    if message.bell > BELL_MAX or message.vcpu > VCPU_MAX:
        raise PeerError(f"bell {message.bell:#x} or vCPU {message.vcpu} is out of range")
    return message
