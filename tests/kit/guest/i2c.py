"""A guest's side of the I2C device, for tests: a small bus, and requests by hand (5.21.6.1)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from kit.front_end.frontend import Plugged

from virtio.devices.i2c.device import I2c
from virtio.devices.i2c.options import I2cOptions

FAIL_NEXT, M_RD = 1, 2
OK, ERR = 0, 1
SENSOR, EEPROM, WIDE = 0x48, 0x50, 0x123
F_ZERO_LENGTH = 1 << 0

LM75: dict[str, Any] = {
    "address": SENSOR,
    "auto_increment": False,
    "registers": [
        {"number": 0, "size": 2, "value": 0x1900, "writable": 0},
        {"number": 1, "value": 0, "writable": 0x7F},
        {"number": 2, "size": 2, "value": 0x4B00},
        {"number": 3, "size": 2, "value": 0x5000},
    ],
}


def i2c(*chips: dict[str, Any], control: Path | None = None) -> I2c:
    chosen = chips or (LM75, {"kind": "eeprom", "address": EEPROM})
    return I2c("bus", I2cOptions.model_validate({"chips": chosen, "control": control}), 1, 64)


def header(address: int, flags: int) -> bytes:
    return struct.pack("<HHI", address << 1, 0, flags)


def add_write(p: Plugged, address: int, data: bytes, flags: int = 0) -> int:
    pieces = [header(address, flags), data] if data else [header(address, flags)]
    return p.guest.queues[0].driver.add(pieces, [1])


def add_read(p: Plugged, address: int, length: int, flags: int = 0) -> int:
    room = [length, 1] if length else [1]
    return p.guest.queues[0].driver.add([header(address, flags | M_RD)], room)


async def results(p: Plugged, count: int) -> list[tuple[int, bytes]]:
    """(status, what was read) of so many requests, in the order they came back."""
    p.guest.queues[0].kick()
    back = [b"".join(used.buffers)[: used.written] for used in await p.guest.queues[0].used(count)]
    return [(each[-1], each[:-1]) for each in back]


async def write(p: Plugged, address: int, data: bytes) -> int:
    add_write(p, address, data)
    ((status, _),) = await results(p, 1)
    return status


async def read(p: Plugged, address: int, length: int) -> tuple[int, bytes]:
    add_read(p, address, length)
    ((status, data),) = await results(p, 1)
    return status, data


async def read_from(p: Plugged, address: int, register: bytes, length: int) -> tuple[int, bytes]:
    """A register, in one transaction."""
    add_write(p, address, register, FAIL_NEXT)
    add_read(p, address, length)
    first, second = await results(p, 2)
    assert first == (second[0], b"")
    return second
