"""The I2C adapter (5.21): segments reach the chips in order, groups fail as one, and no request can confuse it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.front_end.frontend import Setting, every_python_setting, plugged
from kit.guest.i2c import (
    EEPROM,
    ERR,
    FAIL_NEXT,
    M_RD,
    OK,
    SENSOR,
    WIDE,
    add_read,
    add_write,
    header,
    i2c,
    read,
    read_from,
    results,
    write,
)
from kit.host.line_client import talking

from virtio.devices.i2c.device import REQUEST_MAX, SEGMENT_MAX, decode_address
from virtio.testing import attach


@every_python_setting
async def test_a_register_is_chosen_by_a_write_and_read_after_it(setting: Setting) -> None:
    async with plugged(i2c(), setting) as p:
        assert await read_from(p, SENSOR, b"\0", 2) == (OK, b"\x19\x00")
        assert await write(p, SENSOR, b"\x03\x55\x80") == OK
        assert await read_from(p, SENSOR, b"\x03", 2) == (OK, b"\x55\x80")
        assert await read(p, SENSOR, 4) == (OK, b"\x55\x80\x55\x80")  # the pointer stays
        assert await write(p, SENSOR, b"\x00\xff\xff") == OK
        assert await read_from(p, SENSOR, b"\0", 2) == (OK, b"\x19\x00"), "it is read-only"
        assert await write(p, SENSOR, b"\x01\xff") == OK
        assert await read_from(p, SENSOR, b"\1", 1) == (OK, b"\x7f")
        assert await read_from(p, SENSOR, b"\x77", 2) == (OK, b"\xff\xff"), "nobody drives the bus"
        assert p.op("read")[1] == p.op("write")[1] == 0


@every_python_setting
async def test_a_chip_may_go_on_to_the_next_register(setting: Setting) -> None:
    registers = [{"number": 0xFE, "value": 1}, {"number": 0xFF, "size": 2, "value": 0x0203}, {"number": 0, "value": 4}]
    async with plugged(i2c({"address": 0x20, "byte_order": "little", "registers": registers}), setting) as p:
        assert await read_from(p, 0x20, b"\xfe", 5) == (OK, b"\x01\x03\x02\x04\xff")
        assert await write(p, 0x20, b"\xfe\x0a\x0b\x0c\x0d") == OK
        assert await read_from(p, 0x20, b"\xfe", 4) == (OK, b"\x0a\x0b\x0c\x0d")
        assert await write(p, 0x20, b"\xff\x77") == OK  # half of it
        assert await read_from(p, 0x20, b"\xff", 2) == (OK, b"\x0b\x0c")


@every_python_setting
async def test_a_request_without_data_only_asks_who_is_there(setting: Setting) -> None:
    async with plugged(i2c(), setting) as p:
        for address, status in ((SENSOR, OK), (EEPROM, OK), (0x51, ERR)):
            assert await write(p, address, b"") == status
            assert await read(p, address, 0) == (status, b"")
        assert p.op("write") == (3, 1)
        assert p.op("read") == (3, 1)


@every_python_setting
async def test_a_page_write_wraps_within_its_page_and_a_read_over_the_whole_memory(setting: Setting) -> None:
    async with plugged(i2c(), setting) as p:
        assert await read_from(p, EEPROM, b"\x00", 256) == (OK, b"\xff" * 256)
        assert await write(p, EEPROM, b"\x0d" + b"abcde") == OK
        assert await read_from(p, EEPROM, b"\x08", 8) == (OK, b"de\xff\xff\xffabc")
        assert await write(p, EEPROM, b"\xff" + b"z") == OK
        assert await read_from(p, EEPROM, b"\xff", 2) == (OK, b"z\xff")
        assert await read(p, EEPROM, 1) == (OK, b"\xff")  # goes on behind what was read last
        assert await write(p, EEPROM, b"\x10" + bytes(range(20))) == OK  # more than twice round
        assert await read_from(p, EEPROM, b"\x10", 8) == (OK, bytes([16, 17, 18, 19, 12, 13, 14, 15]))


@every_python_setting
async def test_a_large_eeprom_has_addresses_of_two_bytes(setting: Setting) -> None:
    async with plugged(i2c({"kind": "eeprom", "address": EEPROM, "size": 4096, "page": 32}), setting) as p:
        assert await write(p, EEPROM, b"\x0f\xfe" + b"end") == OK
        assert await read_from(p, EEPROM, b"\x0f\xfe", 3) == (OK, b"en\xff")
        assert await read_from(p, EEPROM, b"\x0f\xe0", 1) == (OK, b"d")
        assert await write(p, EEPROM, b"\x00") == OK  # half an address


@every_python_setting
async def test_addresses_of_ten_bits_reach_their_chip(setting: Setting) -> None:
    async with plugged(i2c({"address": WIDE, "registers": [{"number": 0, "value": 7}]}), setting) as p:
        field = (WIDE & 0xFF) << 8 | 0xF0 | (WIDE >> 8) << 1
        used = await p.guest.queues[0].request([struct.pack("<HHI", field, 0, M_RD)], [1, 1])
        assert used.buffers == [b"\x07", b"\x00"]
        assert await write(p, WIDE & 0x7F, b"") == ERR


@given(st.integers(0, 0x3FF))
def test_an_address_comes_out_as_it_was_put_in(address: int) -> None:
    assert decode_address((address & 0xFF) << 8 | 0xF0 | (address >> 8) << 1) == (address, True)
    if address <= 0x77:
        assert decode_address(address << 1) == (address, False)


# --- what a hostile driver does ---


@every_python_setting
@pytest.mark.parametrize(
    ("readable", "writable", "answer"),
    [
        (header(SENSOR, M_RD) + b"data", 3, b"\0\0\1"),  # both ways at once
        (header(SENSOR, 0) + b"\0", 3, b"\0\0\1"),  # room to read into without M_RD
        (header(SENSOR, 4), 1, b"\1"),
        (header(SENSOR, 0x80000000), 1, b"\1"),
        (struct.pack("<HHI", SENSOR << 1 | 1, 0, 0), 1, b"\1"),
        (struct.pack("<HHI", 0xFFFF, 0, 0), 1, b"\1"),
        (struct.pack("<HHI", 0x0100, 0, 0), 1, b"\1"),
        (b"short", 1, b"\1"),
        (b"", 1, b"\1"),
        (b"", 4, b"\0\0\0\1"),
        (header(SENSOR, 0), 0, b""),
        (header(SENSOR, M_RD), 0, b""),
        (header(SENSOR, M_RD), SEGMENT_MAX + 2, bytes(SEGMENT_MAX + 1) + b"\1"),
        (header(SENSOR, 0) + bytes(SEGMENT_MAX + 1), 1, b"\1"),
    ],
)
async def test_nonsense_fails_and_nothing_breaks(
    setting: Setting, readable: bytes, writable: int, answer: bytes
) -> None:
    async with plugged(i2c(), setting) as p:
        used = await p.guest.queues[0].request([readable] if readable else [], [writable] if writable else [])
        assert b"".join(used.buffers)[: used.written] == answer
        assert await read_from(p, SENSOR, b"\0", 2) == (OK, b"\x19\x00")


@every_python_setting
async def test_a_segment_nobody_could_send_breaks_the_queue_and_returns_every_buffer(setting: Setting) -> None:
    async with plugged(i2c(), setting) as p:
        add_write(p, SENSOR, b"\0", FAIL_NEXT)
        add_read(p, SENSOR, REQUEST_MAX + 1)
        p.guest.queues[0].kick()
        await p.guest.queues[0].broken()
        assert p.backend.stats().queues[0].inflight == 0


@every_python_setting
async def test_a_queue_that_stops_in_the_middle_of_a_flood_loses_nothing(setting: Setting) -> None:
    async with plugged(i2c(), setting) as p:
        for n in range(20):
            add_write(p, EEPROM, bytes([n, n]), FAIL_NEXT)
        p.guest.queues[0].kick()
        base = await p.guest.link.stop(0)
        await p.guest.start_queue(0, base=base)
        assert await results(p, 20) == [(OK, b"")] * 20
        add_read(p, EEPROM, 1)
        assert await results(p, 1) == [(OK, b"\xff")]
        assert await read_from(p, EEPROM, b"\x00", 20) == (OK, bytes(range(20)))


CHAINS = st.tuples(st.binary(max_size=24), st.integers(0, 40))


@settings(max_examples=60, deadline=None)
@given(st.lists(CHAINS, min_size=1, max_size=20))
def test_whatever_comes_every_buffer_goes_back_with_a_status(chains: list[tuple[bytes, int]]) -> None:
    async def scenario() -> None:
        async with attach(i2c()) as driver:
            sent = {driver.post(0, readable, room): room for readable, room in chains if readable or room}
            if sent:
                for token, answer in await driver.answers(0, len(sent)):
                    assert len(answer) == sent[token]
                    assert not answer or answer[-1] in (OK, ERR)
            assert await driver.request(0, header(SENSOR, 0), 1) in (b"\0", b"\1")
            assert await driver.request(0, header(SENSOR, 0), 1) == b"\0"

    trio.run(scenario)


# --- the other side ---


async def test_a_sensor_measures_what_it_is_told_over_the_control_socket(tmp_path: Path) -> None:
    path = tmp_path / "c"
    async with plugged(i2c(control=path), Setting("waist", "split")) as p, talking(path) as client:
        assert await client.command("list") == ["chip 0x48 registers present", "chip 0x50 eeprom present", "ok"]
        assert await client.command("set 0x48 0 0xe700") == ["ok"]
        assert await read_from(p, SENSOR, b"\0", 2) == (OK, b"\xe7\x00")
        assert await client.command("watch") == ["ok"]
        assert await write(p, SENSOR, b"\x01\x60") == OK
        assert await client.line() == "write 0x48 0x01 0x60"
        assert await write(p, EEPROM, b"\x08hello") == OK
        assert await client.line() == "write 0x50 0x08 0x68656c6c6f"
        assert await client.command("get 72 1") == ["value 0x48 0x01 0x60", "ok"]
        assert await client.command("get 0x50 8") == ["value 0x50 0x08 0x68", "ok"]
        assert await client.command("set 0x50 8 0x6a") == ["ok"]
        assert await read_from(p, EEPROM, b"\x08", 5) == (OK, b"jello")


async def test_a_chip_that_is_removed_answers_no_more_until_it_is_inserted(tmp_path: Path) -> None:
    path = tmp_path / "c"
    async with plugged(i2c(control=path), Setting("waist", "split")) as p, talking(path) as client:
        assert await client.command("remove 0x48") == ["ok"]
        assert (await client.command("list"))[0] == "chip 0x48 registers absent"
        assert await write(p, SENSOR, b"") == ERR
        assert await client.command("insert 0x48") == ["ok"]
        assert await write(p, SENSOR, b"") == OK


@pytest.mark.parametrize(
    "command",
    [
        *("get", "get 0x48", "get 0x49 0", "get 0x48 9", "get 0x50 256", "set 0x48 0 0x10000", "set 0x50 0 256"),
        *("set 0x48 0 -1", "set 0x48 zero 1", "get 0x48 0x", "remove 0x49", "lists", "set 0x48 0 99999999999"),
    ],
)
async def test_a_wrong_command_is_an_error_that_helps(tmp_path: Path, command: str) -> None:
    async with attach(i2c(control=tmp_path / "c")), talking(tmp_path / "c") as client:
        (answer,) = await client.command(command)
        assert answer.startswith("error ")
        assert await client.command("get 0x48 1") == ["value 0x48 0x01 0x00", "ok"]
