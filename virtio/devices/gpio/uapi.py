"""The character device of GPIO chips, version 2 of its interface (linux/gpio.h, Linux 5.10 and later)."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from construct import Array, Bytes, Const, Default, Int32sn, Int32un, Int64un, Struct

from virtio.devices.host.ioctl import call, ior, iowr

LINE_FLAG_USED: Final = 1 << 0
LINE_FLAG_INPUT: Final = 1 << 2
LINE_FLAG_OUTPUT: Final = 1 << 3
LINE_FLAG_EDGE_RISING: Final = 1 << 4
LINE_FLAG_EDGE_FALLING: Final = 1 << 5
EDGE_RISING: Final = 1
"""The id of an event: GPIO_V2_LINE_EVENT_RISING_EDGE."""

_NAME_SIZE: Final = 32
_LINES_MAX: Final = 64
_ATTRIBUTES_MAX: Final = 10
_ATTRIBUTE_OUTPUT_VALUES: Final = 2
_CONSUMER: Final = b"hyperbell"

_CHIP_INFO = Struct("name" / Bytes(_NAME_SIZE), "label" / Bytes(_NAME_SIZE), "lines" / Int32un)
_ATTRIBUTE = Struct("id" / Int32un, "padding" / Const(0, Int32un), "value" / Int64un)
_CONFIG_ATTRIBUTE = Struct("attr" / _ATTRIBUTE, "mask" / Int64un)
_LINE_CONFIG = Struct(
    "flags" / Int64un,
    "num_attrs" / Int32un,
    "padding" / Default(Bytes(20), bytes(20)),
    "attrs" / Array(_ATTRIBUTES_MAX, _CONFIG_ATTRIBUTE),
)
_LINE_REQUEST = Struct(
    "offsets" / Array(_LINES_MAX, Int32un),
    "consumer" / Bytes(_NAME_SIZE),
    "config" / _LINE_CONFIG,
    "num_lines" / Int32un,
    "event_buffer_size" / Int32un,
    "padding" / Default(Bytes(20), bytes(20)),
    "fd" / Int32sn,
)
_LINE_INFO = Struct(
    "name" / Bytes(_NAME_SIZE),
    "consumer" / Bytes(_NAME_SIZE),
    "offset" / Int32un,
    "num_attrs" / Int32un,
    "flags" / Int64un,
    "attrs" / Bytes(_ATTRIBUTES_MAX * _ATTRIBUTE.sizeof()),
    "padding" / Bytes(16),
)
_LINE_VALUES = Struct("bits" / Int64un, "mask" / Int64un)
_EVENT: Final = struct.Struct("=QIIII24x")  # struct gpio_v2_line_event: timestamp, id, offset, seqno, line_seqno

_GET_CHIPINFO: Final = ior(0xB4, 0x01, _CHIP_INFO.sizeof())
_GET_LINEINFO: Final = iowr(0xB4, 0x05, _LINE_INFO.sizeof())
_GET_LINE: Final = iowr(0xB4, 0x07, _LINE_REQUEST.sizeof())
_SET_CONFIG: Final = iowr(0xB4, 0x0D, _LINE_CONFIG.sizeof())
_GET_VALUES: Final = iowr(0xB4, 0x0E, _LINE_VALUES.sizeof())
_SET_VALUES: Final = iowr(0xB4, 0x0F, _LINE_VALUES.sizeof())

EVENT_SIZE: Final = _EVENT.size


class LineInfo(NamedTuple):
    """What the kernel says of a line; ``consumer`` is who uses it."""

    name: str
    consumer: str
    flags: int


def line_count(chip: int, what: str) -> int:
    return int(_CHIP_INFO.parse(call(chip, _GET_CHIPINFO, bytes(_CHIP_INFO.sizeof()), what)).lines)


def line_info(chip: int, offset: int, what: str) -> LineInfo:
    asked = bytearray(_LINE_INFO.sizeof())
    struct.pack_into("=I", asked, 2 * _NAME_SIZE, offset)
    found = _LINE_INFO.parse(call(chip, _GET_LINEINFO, bytes(asked), what))
    return LineInfo(_text(found.name), _text(found.consumer), found.flags)


def request_line(chip: int, offset: int, flags: int, value: bool, what: str) -> int:
    """A new file descriptor for the line. Without INPUT and OUTPUT the line stays as it is."""
    request = _LINE_REQUEST.build(
        {
            "offsets": [offset, *[0] * (_LINES_MAX - 1)],
            "consumer": _CONSUMER.ljust(_NAME_SIZE, b"\0"),
            "config": _line_config(flags, value),
            "num_lines": 1,
            "event_buffer_size": 0,
            "fd": -1,
        }
    )
    return int(_LINE_REQUEST.parse(call(chip, _GET_LINE, request, what)).fd)


def configure_line(line: int, flags: int, value: bool, what: str) -> None:
    call(line, _SET_CONFIG, _LINE_CONFIG.build(_line_config(flags, value)), what)


def read_value(line: int, what: str) -> bool:
    found = _LINE_VALUES.parse(call(line, _GET_VALUES, _LINE_VALUES.build({"bits": 0, "mask": 1}), what))
    return bool(found.bits & 1)


def write_value(line: int, value: bool, what: str) -> None:
    call(line, _SET_VALUES, _LINE_VALUES.build({"bits": int(value), "mask": 1}), what)


def edges(events: bytes) -> list[bool]:
    """The events that were read from a line, oldest first: True for a rising edge."""
    return [event[1] == EDGE_RISING for event in _EVENT.iter_unpack(events)]


def _line_config(flags: int, value: bool) -> dict[str, object]:
    attributes = [{"attr": {"id": 0, "value": 0}, "mask": 0} for _ in range(_ATTRIBUTES_MAX)]
    output = bool(flags & LINE_FLAG_OUTPUT)
    if output:
        attributes[0] = {"attr": {"id": _ATTRIBUTE_OUTPUT_VALUES, "value": int(value)}, "mask": 1}
    return {"flags": flags, "num_attrs": int(output), "attrs": attributes}


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("ascii", "replace")
