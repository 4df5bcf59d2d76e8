"""Drivers of the socket device that break its rules (5.10.6), and hosts that run short: one connection ends."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.guest.vsock import (
    CID,
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    EOM,
    HEADER,
    HOST,
    RECEIVE_QUEUE,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SEQPACKET,
    SHUTDOWN,
    STREAM,
    TRANSMIT_QUEUE,
    HostListener,
    VsockGuest,
    connected_client,
    pair,
    vsock,
    works,
)
from kit.host.peak import Peak

from virtio.devices.vsock.packet import HEADER_SIZE, Packet
from virtio.testing import attach
from virtio.testing.driver import Element

# ---- packets that make no sense ----


@pytest.mark.parametrize("op", [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, 0xFFFF])
async def test_what_belongs_to_no_connection_is_reset(op: int, tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        await guest.say(op, 11, 22, b"data" if op == RW else b"")
        answer = await guest.hear()
        assert answer.meaning == (RST, 22, 11)
        assert (answer.src_cid, answer.type, answer.len) == (HOST, STREAM, 0)
        await guest.say(RST, 11, 22)
        await guest.silence()


@pytest.mark.parametrize("kind", [0, 3, 0xFFFF])
@pytest.mark.parametrize("op", [REQUEST, RW])
async def test_an_unknown_type_is_reset(kind: int, op: int, tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        listener = HostListener(tmp_path, 22)
        await guest.say(op, 11, 22, type=kind)
        answer = await guest.hear()
        assert (answer.meaning, answer.type) == ((RST, 22, 11), kind)
        listener.close()


async def test_a_packet_in_another_guests_name_is_not_answered_and_counts_as_an_error(tmp_path: Path) -> None:
    device = vsock(tmp_path)
    async with attach(device) as driver:
        guest = VsockGuest(driver)
        listener = HostListener(tmp_path, 22)
        for cid in (0, HOST, CID + 1, 1 << 63):
            await guest.say(REQUEST, 11, 22, src_cid=cid)
        for length in (0, 1, HEADER_SIZE - 1):
            if length:
                await guest.say_raw(bytes(length))
        await guest.silence()
        assert device._connections == {}
        stats = driver._backend.stats().queues[TRANSMIT_QUEUE].ops["transmit"]
        assert (stats.requests, stats.errors) == (6, 6)
        await works(guest, tmp_path)
        listener.close()


@pytest.mark.parametrize(("length", "given"), [(5, 4), (0xFFFF_FFFF, 100), (65536, 65535), (1, 0)])
async def test_a_length_beyond_the_buffer_ends_the_connection(length: int, given: int, tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        inside, outside = await pair(guest, tmp_path)
        await guest.say(RW, 5000, 1024, bytes(given), length=length)
        assert (await inside.hear()).op == RST
        await outside.at_end()
        await works(guest, tmp_path)
        outside.close()


async def test_bytes_behind_the_length_are_not_data(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        inside, outside = await pair(guest, tmp_path)
        await guest.say(RW, 5000, 1024, b"yes and no", length=3)
        await inside.say(CREDIT_UPDATE, b"nothing of this")
        await inside.say(RW, b"!")
        assert await outside.receive(4) == b"yes!"
        outside.close()


@pytest.mark.parametrize("op", [0, REQUEST, RESPONSE, 8, 0xFFFF])
async def test_an_operation_out_of_place_ends_the_connection(op: int, tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        inside, outside = await pair(guest, tmp_path)
        await inside.say(op)
        assert (await inside.hear()).op == RST
        await outside.at_end()
        await works(guest, tmp_path)
        outside.close()


async def test_data_before_the_connection_is_accepted_ends_it(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        client = await connected_client(tmp_path / "vsock", 7)
        asked = await guest.hear()
        await guest.say(RW, 7, asked.src_port, b"too early")
        assert (await guest.hear()).op == RST
        await client.at_end()
        client.close()


async def test_flags_that_mean_nothing_do_nothing(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await pair(VsockGuest(driver), tmp_path)
        await inside.say(SHUTDOWN, flags=0)
        await inside.say(SHUTDOWN, flags=0xFFFF_FFFC)
        await inside.say(RW, b"data", flags=0xFFFF_FFFF)
        assert await outside.receive(4) == b"data"
        await outside.send(b"more")
        assert await inside.receive(4) == b"more"
        outside.close()


# ---- buffers ----


@pytest.mark.parametrize("size", [1, HEADER_SIZE - 1, HEADER_SIZE])
async def test_a_buffer_too_small_for_any_data_comes_back_empty(size: int, tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver, buffers=0)
        for _ in range(3):
            driver.post(RECEIVE_QUEUE, writable=size)
        await guest.say(REQUEST, 1, 2)
        assert [answer for _, answer in await driver.answers(RECEIVE_QUEUE, 3)] == [b""] * 3
        guest.post(1)
        assert (await guest.hear()).op == RST


async def test_buffers_of_the_wrong_direction_come_back_and_carry_nothing(tmp_path: Path) -> None:
    device = vsock(tmp_path)
    async with attach(device) as driver:
        guest = VsockGuest(driver, buffers=0)
        for _ in range(3):
            driver.post(RECEIVE_QUEUE, readable=b"x" * 100)
        await guest.say(REQUEST, 1, 2)
        assert [answer for _, answer in await driver.answers(RECEIVE_QUEUE, 3)] == [b""] * 3
        guest.post(1)
        assert (await guest.hear()).op == RST
        assert await driver.request(TRANSMIT_QUEUE, writable=100) == b""
        stats = driver._backend.stats().queues
        assert stats[TRANSMIT_QUEUE].ops["transmit"].errors == 1
        assert stats[RECEIVE_QUEUE].ops["receive"].errors == 3
        guest.post(8)
        await works(guest, tmp_path)


async def test_a_packet_that_claims_far_more_than_the_guest_has_costs_no_memory(tmp_path: Path) -> None:
    """The same MiB again and again: 200 MiB of data in a guest of 4, and the length is right."""
    async with attach(vsock(tmp_path), queue_size=256) as driver:
        guest = VsockGuest(driver)
        inside, outside = await pair(guest, tmp_path)
        queue, memory = driver.queues[TRANSMIT_QUEUE], driver._memory
        header = guest.packet(RW, inside.port, 1024, b"", length=200 << 20)
        at = memory.allocate(len(header))
        memory.write(at, header)
        piece = Element(memory.allocate(1 << 20), 1 << 20, False)
        peak = Peak()
        queue.driver.add_elements([Element(at, len(header), False), *[piece] * 200])
        queue.kick()
        await queue.used()
        assert (await inside.hear()).op == RST
        assert peak.kib < 64 << 10
        await outside.at_end()
        await works(guest, tmp_path)
        outside.close()


async def test_buffers_of_one_byte_of_data_each_carry_it(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        inside, outside = await pair(VsockGuest(driver, room=1), tmp_path)
        await outside.send(b"one by one")
        assert await inside.receive(10) == b"one by one"
        outside.close()


# ---- anything ----

header_fields = st.tuples(
    *(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    *(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    *(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1)),
    *(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
)


@given(header_fields, st.binary(max_size=20))
def test_every_header_is_read_as_it_was_written(fields: tuple[int, ...], rest: bytes) -> None:
    packet = Packet(*fields)
    raw = packet.pack()
    assert raw == HEADER.pack(*fields)
    assert Packet.parse(raw + rest) == packet
    assert len(raw) == HEADER_SIZE == 44


@given(st.binary(max_size=43))
def test_fewer_bytes_than_a_header_are_no_packet(raw: bytes) -> None:
    assert Packet.parse(raw) is None


a_packet = st.fixed_dictionaries(
    {
        "op": st.integers(0, 9),
        "src_port": st.sampled_from([5000, 5001]),
        "dst_port": st.sampled_from([1, 2, 3, 1 << 30]),
        "data": st.binary(max_size=200),
        "dst_cid": st.sampled_from([HOST, HOST, HOST, CID, 0]),
        "type": st.sampled_from([STREAM, STREAM, SEQPACKET, 0]),
        "flags": st.integers(0, 3) | st.just(0xFFFF_FFFF),
        "length": st.none() | st.integers(0, 2**32 - 1),
        "buf_alloc": st.sampled_from([0, 1, 1 << 18, 0xFFFF_FFFF]),
        "fwd_cnt": st.sampled_from([0, 1, 0xFFFF_FFFF]),
    }
)


@given(st.lists(a_packet, max_size=40))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_no_sequence_of_packets_stops_the_device(packets: list[dict[str, int]]) -> None:
    async def drive(folder: Path) -> None:
        async with attach(vsock(folder, group="lab")) as driver:
            guest = VsockGuest(driver)
            listeners = HostListener(folder, 1), HostListener(folder, 2, socket.SOCK_SEQPACKET)
            for fields in packets:
                await guest.say_raw(guest.packet(**fields))  # type: ignore[arg-type]
                await trio.testing.wait_all_tasks_blocked()
                if driver.queues[RECEIVE_QUEUE].driver.has_used():
                    await guest.hear()
            assert not any(queue.broken for queue in driver._backend.stats().queues)
            guest.clear()
            await guest.say(RST, 5000, 4242)
            await trio.testing.wait_all_tasks_blocked()
            await works(guest, folder)
            for listener in listeners:
                listener.close()

    with tempfile.TemporaryDirectory(prefix="hyperbell-") as folder:
        trio.run(drive, Path(folder))


async def test_messages_cut_short_by_a_reset_leave_the_next_connection_clean(tmp_path: Path) -> None:
    async with attach(vsock(tmp_path)) as driver:
        guest = VsockGuest(driver)
        listener = HostListener(tmp_path, 9, socket.SOCK_SEQPACKET)
        first = await guest.connect(5000, 9, type=SEQPACKET)
        lost = await listener.accept()
        await first.say(RW, b"half of a mess", flags=0)
        await first.say(RST)
        await lost.at_end()
        second = await guest.connect(5000, 9, type=SEQPACKET)
        outside = await listener.accept()
        await second.say(RW, b"whole", flags=EOM)
        assert await outside.receive_message() == b"whole"
        for each in (lost, outside):
            each.close()
        listener.close()
