"""Drivers that do not accept VIRTIO_F_VERSION_1: so firmware drives transitional devices ("Legacy Interface")."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from kit.front_end.frontend import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    NATIVE_SETTINGS,
    NEEDS_RESET,
    PYTHON_SETTINGS,
    REACTORS,
    Guest,
    Setting,
    plugged,
)
from kit.guest.blk import (
    S_IOERR,
    S_OK,
    S_UNSUPP,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    Answer,
    BlkDriver,
    contents,
    header,
    make_disk,
    pattern,
)
from kit.net.lan import BROADCAST, lan
from kit.net.packets import GSO, KINDS, check_sums, packet

from virtio.device import DeviceOptions
from virtio.devices.net.device import Net, NetOptions
from virtio.devices.rng import Rng
from virtio.native.nic import NicCounters
from virtio.testing import attach
from virtio.testing.driver import Used

RECEIVE, TRANSMIT, CONTROL = 0, 1, 2
F_CSUM, F_GUEST_CSUM, F_MRG_RXBUF, F_MAC_ADDR = 1 << 0, 1 << 1, 1 << 15, 1 << 23
HOST_OFFLOADS = 1 << 11 | 1 << 12 | 1 << 13 | 1 << 56
GUEST_OFFLOADS = F_GUEST_CSUM | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 54 | 1 << 55
FIRMWARE = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_MRG_RXBUF
"""What firmware leaves out: a header of 10 bytes follows from it."""
HEADER = bytes(10)
SECTOR = 512
T_SCSI, T_FLUSH_OUT = 2, 5

# A legacy driver knows no packed rings, which are bit 34.
every_native_way = pytest.mark.parametrize("setting", [s for s in NATIVE_SETTINGS if s.ring == "split"], ids=str)
every_python_way = pytest.mark.parametrize("setting", [s for s in PYTHON_SETTINGS if s.ring == "split"], ids=str)
every_reactor = pytest.mark.parametrize("reactor", REACTORS)


# ---- disks ----


@every_native_way
async def test_a_disk_serves_a_driver_that_knows_no_more_than_firmware(setting: Setting, tmp_path: Path) -> None:
    image = tmp_path / "image"
    async with plugged(make_disk("file", image), setting, without=(1 << 64) - 1) as p:
        assert p.guest.features == 0
        disk = BlkDriver(p.guest.queues[0])
        await disk.write(3, pattern(4 * SECTOR, 1))
        assert await disk.read(2, 6 * SECTOR) == bytes(SECTOR) + pattern(4 * SECTOR, 1) + bytes(SECTOR)
        await disk.flush()
        assert contents(image)[3 * SECTOR :][: 4 * SECTOR] == pattern(4 * SECTOR, 1)


@every_native_way
async def test_a_priority_in_a_legacy_header_changes_nothing(setting: Setting, tmp_path: Path) -> None:
    """5.2.6.3: `reserved` was `ioprio`."""
    async with plugged(make_disk("file", tmp_path / "image"), setting, without=F_VERSION_1) as p:
        disk = BlkDriver(p.guest.queues[0])
        assert await disk.raw([struct.pack("<IIQ", T_OUT, 0xFFFF_FFFF, 1), pattern(SECTOR, 1)], [1]) == Answer(
            S_OK, b"", 1
        )
        answer = await disk.raw([struct.pack("<IIQ", T_IN, 7, 1)], [SECTOR, 1])
        assert answer == Answer(S_OK, pattern(SECTOR, 1), SECTOR + 1)


@every_native_way
async def test_the_other_word_for_a_flush_is_known_from_legacy_drivers_alone(setting: Setting, tmp_path: Path) -> None:
    async with plugged(make_disk("file", tmp_path / "image"), setting, without=F_VERSION_1) as p:
        disk = BlkDriver(p.guest.queues[0])
        assert await disk.request(T_FLUSH_OUT) == Answer(S_OK, b"", 1)
        assert await disk.request(T_FLUSH) == Answer(S_OK, b"", 1)
        assert p.op("flush") == (2, 0)
        assert (await disk.request(T_FLUSH_OUT, data=bytes(SECTOR))).status == S_IOERR
        await p.guest.link.reset()
        p.guest.forget_queues()
        await p.guest.start()
        disk = BlkDriver(p.guest.queues[0])
        assert (await disk.request(T_FLUSH_OUT)).status == S_UNSUPP


@every_native_way
async def test_what_a_legacy_driver_may_not_send_costs_that_request_alone(setting: Setting, tmp_path: Path) -> None:
    async with plugged(make_disk("file", tmp_path / "image", serial="old"), setting, without=FIRMWARE) as p:
        disk = BlkDriver(p.guest.queues[0])
        # SCSI commands and barriers belong to features of old that are not offered.
        for kind in (T_SCSI, T_SCSI + 1, 1 << 31, T_OUT | 1 << 31):
            assert (await disk.request(kind, data=bytes(SECTOR))).status in (S_UNSUPP, S_IOERR)
        assert (await disk.request(T_IN, 0, room=SECTOR - 1)).status == S_IOERR
        assert (await disk.request(T_IN, 1 << 40, room=SECTOR)).status == S_IOERR
        assert (await disk.request(T_GET_ID, room=20)).data == b"old".ljust(20, b"\0")
        assert not await p.guest.link.status() & NEEDS_RESET


@every_native_way
async def test_a_legacy_request_with_no_room_for_its_status_breaks_the_queue(setting: Setting, tmp_path: Path) -> None:
    async with plugged(make_disk("file", tmp_path / "image"), setting, without=FIRMWARE) as p:
        p.guest.queues[0].driver.add([header(T_OUT), bytes(SECTOR)], [])
        p.guest.queues[0].kick()
        await p.guest.queues[0].broken()


@every_native_way
async def test_several_queues_serve_a_legacy_driver_and_then_a_modern_one(setting: Setting, tmp_path: Path) -> None:
    """As firmware and the system that it starts do, one after the other on one connection."""
    async with plugged(make_disk("file", tmp_path / "image", queues=4), setting, without=FIRMWARE) as p:
        await BlkDriver(p.guest.queues[0]).write(0, pattern(SECTOR, 7))
        await p.guest.link.reset()
        p.guest.forget_queues()
        await p.guest.start()
        for queue in p.guest.queues:
            assert await BlkDriver(queue).read(0, SECTOR) == pattern(SECTOR, 7)


# ---- networks ----


def net(**options: object) -> Net:
    return Net("lan", NetOptions(**{"frames": "reflect", **options}), 1, 256)


def frame(size: int, seed: int = 1) -> bytes:
    return (BROADCAST + b"\2\0\0\0\0\1" + b"\x08\x00" + pattern(size, seed))[:size]


def listen(guest: Guest, *pieces: int) -> None:
    guest.queues[RECEIVE].driver.add([], list(pieces))


async def send(guest: Guest, data: bytes, header: bytes = HEADER) -> None:
    assert (await guest.queues[TRANSMIT].request([header, data], [])).written == 0


def counters(device: object) -> NicCounters:
    assert isinstance(device, Net)
    return device.native_device.counters()


async def received(guest: Guest) -> Used:
    (used,) = await guest.queues[RECEIVE].used()
    return used


@every_native_way
async def test_frames_of_a_legacy_driver_have_a_header_of_ten_bytes_both_ways(setting: Setting) -> None:
    async with plugged(net(), setting, without=FIRMWARE) as p:
        for seed, size in enumerate((14, 60, 61, 1514, 4000)):
            listen(p.guest, 10, size)
            await send(p.guest, frame(size, seed))
            used = await received(p.guest)
            assert (used.written, used.buffers) == (10 + size, [HEADER, frame(size, seed)])
        assert counters(p.device) == NicCounters()


@every_native_way
async def test_a_legacy_driver_with_mergeable_buffers_is_told_how_many_there_are(setting: Setting) -> None:
    """5.1.6.1: num_buffers is there with MRG_RXBUF, whatever else was accepted."""
    async with plugged(net(), setting, without=F_VERSION_1) as p:
        for _ in range(3):
            listen(p.guest, 12, 500)
        await send(p.guest, frame(1200), bytes(12))
        back = await p.guest.queues[RECEIVE].used(3)
        whole = b"".join(b"".join(used.buffers)[: used.written] for used in back)
        assert whole == bytes(10) + b"\3\0" + frame(1200)


@every_native_way
async def test_a_buffer_for_a_legacy_header_alone_is_a_buffer_and_a_smaller_one_is_none(setting: Setting) -> None:
    async with plugged(net(), setting, without=FIRMWARE) as p:
        for room in (10, 11, 10 + 59):
            listen(p.guest, room)
            await send(p.guest, frame(60))
            assert not await p.guest.link.status() & NEEDS_RESET
        # The first buffer is used by the frame that fits in it, and until then every frame is refused.
        assert counters(p.device) == NicCounters(refused=3)
        await p.guest.link.reset()
        p.guest.forget_queues()
        await p.guest.start(without=FIRMWARE)
        listen(p.guest, 9)
        await send(p.guest, frame(60))
        await p.guest.queues[RECEIVE].broken()


@every_native_way
@pytest.mark.parametrize("pieces", [[HEADER], [HEADER[:9]], [HEADER, b"x" * 13], [b"x"] * 23], ids=len)
async def test_a_runt_of_a_legacy_driver_is_dropped_and_counted(setting: Setting, pieces: list[bytes]) -> None:
    async with plugged(net(), setting, without=FIRMWARE) as p:
        listen(p.guest, 10, 1514)
        await p.guest.queues[TRANSMIT].request(pieces, [])
        assert counters(p.device) == NicCounters(malformed=1)
        await send(p.guest, frame(14))  # the shortest that is none
        assert (await received(p.guest)).written == 24


@every_native_way
async def test_a_legacy_driver_without_a_command_for_it_sets_its_address_in_the_config_space(setting: Setting) -> None:
    """5.1.4.3."""
    chosen = bytes.fromhex("02aabbccddee")
    async with plugged(net(mac="02:00:00:00:00:01"), setting, without=F_VERSION_1 | F_MAC_ADDR) as p:
        link = p.guest.link
        for at, byte in enumerate(chosen):
            await link.write_config(at, bytes([byte]))
        await link.write_config(6, b"\xff\xff")  # the status is the device's
        assert await link.read_config(0, 8) == chosen + b"\1\0"
        await link.reset()
        assert await link.read_config(0, 6) == bytes.fromhex("020000000001")
        for without in (0, F_VERSION_1, F_MAC_ADDR):
            p.guest.forget_queues()
            await p.guest.start(without=without)
            await link.write_config(0, chosen)
            assert await link.read_config(0, 6) == bytes.fromhex("020000000001")
            await link.reset()


@every_native_way
async def test_a_legacy_driver_commands_by_the_control_queue(setting: Setting) -> None:
    async with plugged(net(), setting, without=FIRMWARE) as p:
        used = await p.guest.queues[CONTROL].request([b"\1", b"\1", bytes.fromhex("02aabbccddee")], [1])
        assert used.buffers == [b"\0"]
        assert await p.guest.link.read_config(0, 6) == bytes.fromhex("02aabbccddee")


@every_reactor
@pytest.mark.parametrize("merging", [0, F_MRG_RXBUF], ids=["merging", "whole"])
async def test_legacy_and_modern_guests_speak_over_a_switch(reactor: str, merging: int) -> None:
    async with lan(reactor, "split", FIRMWARE, merging) as (old, new):
        for size in (2, 48, 1502):
            old.listen(1)
            new.listen(1)
            await old.send(BROADCAST, pattern(size, 1))
            assert await new.frames() == [(bytes(10) + b"\1\0", BROADCAST + old.mac + pattern(size, 1))]
            await new.send(old.mac, pattern(size, 2))
            assert await old.frames() == [(HEADER, old.mac + new.mac + pattern(size, 2))]


@every_reactor
@pytest.mark.parametrize("kind", KINDS)
async def test_packets_of_a_modern_guest_are_summed_and_cut_for_a_legacy_one(reactor: str, kind: str) -> None:
    payload = pattern(5000, 9)
    async with lan(reactor, "split", FIRMWARE | GUEST_OFFLOADS, 0) as (old, new):
        old.listen(16)
        body, start, offset = packet(kind, payload)
        await new.send(BROADCAST, body, struct.pack("<BBHHHHH", 1, GSO[kind], 0, 1400, start, offset, 0))
        found = await old.frames(4)
        assert [header for header, _ in found] == [HEADER] * 4
        assert b"".join(check_sums(whole) for _, whole in found) == payload
        body, start, offset = packet(kind, payload[:100])
        await new.send(BROADCAST, body, struct.pack("<BBHHHHH", 1, 0, 0, 0, start, offset, 0))
        ((header, whole),) = await old.frames()
        assert (header, check_sums(whole)) == (HEADER, payload[:100])


@every_reactor
@pytest.mark.parametrize("kind", KINDS)
async def test_offloads_of_a_legacy_guest_work_both_ways(reactor: str, kind: str) -> None:
    """A header of 10 bytes has all that an offload needs."""
    payload = pattern(9000, 9)
    async with lan(reactor, "split", FIRMWARE, 0) as (old, new):
        body, start, offset = packet(kind, payload)
        told = struct.pack("<BBHHHH", 1, GSO[kind], start + (8 if "udp" in kind else 20), 1400, start, offset)
        old.listen(2, size=9200)
        new.listen(16)
        await old.send(BROADCAST, body, struct.pack("<BBHHHH", 1, GSO[kind], 0, 1400, start, offset))
        ((header, whole),) = await new.frames()
        assert (header[:10], whole) == (told, BROADCAST + old.mac + body)
        await new.send(BROADCAST, body, struct.pack("<BBHHHHH", 1, GSO[kind], 0, 1400, start, offset, 0))
        assert await old.frames() == [(told, BROADCAST + new.mac + body)]


@every_reactor
async def test_offloads_that_a_legacy_guest_did_not_accept_cost_that_frame_alone(reactor: str) -> None:
    async with lan(reactor, "split", FIRMWARE | F_CSUM | HOST_OFFLOADS, 0) as (old, new):
        new.listen(2)
        for lie in (struct.pack("<BBHHHH", 1, 0, 0, 0, 34, 16), b"\xff" * 10):
            await old.send(BROADCAST, pattern(60, 1), lie)
        await old.send(BROADCAST, b"honest")
        assert (await new.frames())[0][1].endswith(b"honest")
        assert old.device.native_device.counters() == NicCounters(malformed=2, flooded=1)


# ---- devices in Python ----


@every_python_way
async def test_an_entropy_device_serves_a_legacy_driver(setting: Setting) -> None:
    async with plugged(Rng("entropy", DeviceOptions(), 1, 64), setting, without=FIRMWARE) as p:
        seen = {(await p.guest.queues[0].request([], [16])).buffers[0] for _ in range(4)}
        assert len(seen) == 4


async def test_the_kit_drives_a_device_as_a_legacy_driver_does() -> None:
    async with attach(Rng("entropy", DeviceOptions(), 1, 64), without=range(64)) as driver:
        assert driver.features == 0
        assert len(await driver.request(0, writable=8)) == 8
