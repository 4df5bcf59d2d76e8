"""Requests that belong together (5.21.6.1) are one transaction on the bus, and fail as one."""

from __future__ import annotations

from collections.abc import Sequence

import trio
from kit.front_end.frontend import Setting, every_python_setting, every_ring, plugged
from kit.guest.i2c import (
    EEPROM,
    ERR,
    F_ZERO_LENGTH,
    FAIL_NEXT,
    LM75,
    OK,
    SENSOR,
    add_read,
    add_write,
    i2c,
    read,
    read_from,
    results,
    write,
)

from virtio.devices.i2c.bus import Segment
from virtio.devices.i2c.device import SEGMENTS_MAX, I2c
from virtio.devices.i2c.options import I2cOptions
from virtio.devices.i2c.simulated import SimulatedBus


@every_python_setting
async def test_a_group_that_fails_is_not_tried_any_further(setting: Setting) -> None:
    async with plugged(i2c(), setting) as p:
        add_write(p, EEPROM, b"\x00a", FAIL_NEXT)
        add_write(p, 0x51, b"\x00b", FAIL_NEXT)
        add_write(p, EEPROM, b"\x00c", FAIL_NEXT)
        add_write(p, EEPROM, b"\x00d")
        add_write(p, EEPROM, b"\x01e")  # a transaction of its own
        assert [status for status, _ in await results(p, 5)] == [OK, ERR, ERR, ERR, OK]
        assert await read_from(p, EEPROM, b"\x00", 2) == (OK, b"ae")


@every_python_setting
async def test_a_group_that_comes_in_parts_still_fails_as_one(setting: Setting) -> None:
    # As when the driver's ring is too small for all of it: it waits for the first ones, so they are not held back.
    async with plugged(i2c(), setting) as p:
        add_write(p, 0x51, b"\x00a", FAIL_NEXT)
        assert await results(p, 1) == [(ERR, b"")]
        add_write(p, EEPROM, b"\x00b", FAIL_NEXT)
        assert await results(p, 1) == [(ERR, b"")]
        add_write(p, EEPROM, b"\x00c")
        assert await results(p, 1) == [(ERR, b"")]
        assert await read_from(p, EEPROM, b"\x00", 1) == (OK, b"\xff")
        add_write(p, EEPROM, b"\x00d", FAIL_NEXT)
        assert await results(p, 1) == [(OK, b"")]
        add_read(p, EEPROM, 1)
        assert await results(p, 1) == [(OK, b"\xff")]


class Recorder(SimulatedBus):
    """Knows the transactions: the addresses of each."""

    def __init__(self) -> None:
        super().__init__(
            I2cOptions.model_validate({"chips": [LM75, {"kind": "eeprom", "address": EEPROM}]}).chips, None
        )
        self.transactions: list[list[int]] = []

    async def transfer(self, segments: Sequence[Segment]) -> list[bytes]:
        self.transactions.append([segment.address for segment in segments])
        return await super().transfer(segments)


def recorded() -> tuple[I2c, Recorder]:
    device, recorder = i2c(), Recorder()
    device.bus.close()
    device.bus = recorder  # type: ignore[misc]
    return device, recorder


@every_ring
async def test_a_group_whose_requests_come_one_by_one_is_one_transaction(
    ring: str, mock_clock: trio.testing.MockClock
) -> None:
    device, recorder = recorded()
    async with plugged(device, Setting("waist", ring)) as p:
        add_write(p, EEPROM, b"\x00a", FAIL_NEXT)
        for length in (1, 2):
            p.guest.queues[0].kick()
            await trio.testing.wait_all_tasks_blocked()  # the device has looked at what there is
            assert recorder.transactions == []
            add_read(p, EEPROM, length, FAIL_NEXT if length == 1 else 0)
        assert [status for status, _ in await results(p, 3)] == [OK] * 3
        assert recorder.transactions == [[EEPROM] * 3]


@every_ring
async def test_a_group_whose_rest_does_not_come_is_begun_after_a_moment(
    ring: str, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05
    device, recorder = recorded()
    async with plugged(device, Setting("waist", ring)) as p:
        add_write(p, EEPROM, b"\x00a", FAIL_NEXT)
        add_write(p, EEPROM, b"\x01b", FAIL_NEXT)
        assert await results(p, 2) == [(OK, b"")] * 2
        assert recorder.transactions == [[EEPROM] * 2]
        add_write(p, EEPROM, b"\x02c")
        assert await results(p, 1) == [(OK, b"")]
        assert recorder.transactions == [[EEPROM] * 2, [EEPROM]]


@every_ring
async def test_a_queue_that_stops_before_a_group_is_whole_begins_it_when_it_goes_on(
    ring: str, mock_clock: trio.testing.MockClock
) -> None:
    device, recorder = recorded()
    async with plugged(device, Setting("waist", ring)) as p:
        add_write(p, EEPROM, b"\x00a", FAIL_NEXT)
        add_write(p, EEPROM, b"\x01b", FAIL_NEXT)
        p.guest.queues[0].kick()
        await trio.testing.wait_all_tasks_blocked()
        base = await p.guest.link.stop(0)
        assert recorder.transactions == []
        add_read(p, EEPROM, 1)
        await p.guest.start_queue(0, base=base)
        assert await results(p, 3) == [(OK, b""), (OK, b""), (OK, b"\xff")]
        assert recorder.transactions == [[EEPROM] * 3]


@every_python_setting
async def test_a_group_longer_than_any_adapter_takes_is_served_in_parts(setting: Setting) -> None:
    async with plugged(i2c(), setting, queue_size=128) as p:
        count = SEGMENTS_MAX + 3
        for n in range(count):
            add_write(p, EEPROM, bytes([n, n]), FAIL_NEXT if n < count - 1 else 0)
            if n % 15 == 14:
                await results(p, 15)
        assert await read_from(p, EEPROM, b"\x00", count) == (OK, bytes(range(count)))


@every_python_setting
async def test_a_reset_forgets_a_group_that_had_failed(setting: Setting) -> None:
    async with plugged(i2c(), setting) as p:
        add_write(p, 0x51, b"", FAIL_NEXT)
        assert await results(p, 1) == [(ERR, b"")]
        p.guest.close()
        if p.server is None:
            await p.backend.reset()
        guest = await p.connect()
        await guest.start()
        assert await write(p, SENSOR, b"") == OK


@every_python_setting
async def test_a_driver_that_does_not_know_zero_lengths_gets_nothing(setting: Setting) -> None:
    async with plugged(i2c(), setting, without=F_ZERO_LENGTH) as p:
        assert await write(p, SENSOR, b"\0") == ERR
        assert await read(p, SENSOR, 2) == (ERR, b"\0\0")
