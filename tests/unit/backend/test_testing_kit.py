"""The kit that a device's author tests with: what it promises, on a native device and on Python ones."""

from __future__ import annotations

import pytest
from kit.ring.driven import Echo, Scripted

from virtio.device import DeviceOptions
from virtio.devices.blk.device import Blk, BlkOptions
from virtio.errors import GuestError
from virtio.testing import attach


def echo() -> Echo:
    return Echo("echo", DeviceOptions(), 2, 64)


@pytest.mark.parametrize("ring", ["split", "packed"])
async def test_a_request_goes_there_and_back(ring: str) -> None:
    async with attach(echo(), ring=ring) as driver:  # type: ignore[arg-type]
        assert await driver.request(1, b"hello", writable=10) == b"hello"
        assert await driver.request(0, b"hello", writable=2) == b"he"
        assert await driver.request(0, writable=2) == b""
        assert bool(driver.features >> 34 & 1) == (ring == "packed")


async def test_native_devices_are_driven_the_same_way() -> None:
    disk = Blk("disk", BlkOptions(backend="memory", size=1 << 20, serial="kit"), 1, 64)
    async with attach(disk) as driver:
        assert (await driver.request(0, (8).to_bytes(16, "little"), writable=21))[:3] == b"kit"
        assert driver.read_config(0, 8) == (2048).to_bytes(8, "little")


async def test_many_requests_are_under_way_at_once_and_told_apart() -> None:
    async with attach(echo()) as driver:
        tokens = {driver.post(0, bytes([number]), writable=1): bytes([number]) for number in range(20)}
        assert dict(await driver.answers(0, 20)) == tokens


async def test_features_may_be_declined_and_a_reset_begins_anew() -> None:
    device = Scripted()
    async with attach(device, without=[29]) as driver:
        assert not driver.features >> 29 & 1
        assert device.driver_features == driver.features
        await driver.request(0, b"one", writable=3)
        await driver.reset()
        assert await driver.request(0, b"two", writable=3) == b"TWO"
        device.config_changed()
        await driver.config_changed()


async def test_a_broken_queue_is_seen() -> None:
    device = Scripted()

    async def refuse(*_: object) -> None:
        raise GuestError("nonsense")

    device.script = refuse
    async with attach(device) as driver:
        driver.post(0, b"x", writable=1)
        await driver.broken(0)
