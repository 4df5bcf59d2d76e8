"""HOSTILE's checklist, items 11 to 14: what a front-end sends ends its own connection, or is refused, and no more."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import kit.front_end.vhost_user_wire as wire
import pytest
from kit.front_end.frontend import Guest
from kit.front_end.links import SocketLink
from kit.front_end.scene import Scene
from kit.front_end.vhost_user_wire import MIB, eventfds, mem_table, memfd, message, region, u64, vring_addr, vring_state
from kit.guest.blk import BlkDriver

GPA, UVA = 0x4000_0000, 0x7F00_0000_0000
GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR, SET_VRING_ENABLE = 12, 13, 14, 18
SET_BACKEND_REQ_FD, GET_CONFIG, SET_CONFIG, RESET_DEVICE = 21, 24, 25, 34
ADD_MEM_REG, REM_MEM_REG = 37, 38

Fds = Callable[[], Sequence[int]]


def no_fds() -> Sequence[int]:
    return ()


def pipes() -> Sequence[int]:
    """A pipe, both ends; only the first travels."""
    readable, writable = os.pipe()
    os.close(writable)
    return [readable]


def sockets() -> Sequence[int]:
    ours, theirs = socket.socketpair()
    ours.close()
    return [theirs.detach()]


def folders() -> Sequence[int]:
    return [os.open("/", os.O_RDONLY)]


def unsendable() -> Sequence[int]:
    """/dev/null: a file that cannot be memory, and an endless source that could be a kick."""
    return [os.open("/dev/null", os.O_RDWR)]


def read_only_files() -> Sequence[int]:
    fd = memfd()
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return [again]


@dataclass(frozen=True)
class Message:
    """What is sent, after the state it needs was reached: "new", "negotiated", "shared" or "running"."""

    state: str
    data: bytes
    fds: Fds = no_fds
    request: str = ""
    reason: str = ""


async def reach(guest: Guest, state: str) -> wire.FrontEnd:
    """Bring the connection into this state."""
    assert isinstance(guest.link, SocketLink)
    await guest.link.device_features()  # from here on it is us who are served, and nobody before us
    if state == "running":
        await guest.start()
    elif state != "new":
        await guest.negotiate()
        if state == "shared":
            await guest.link.share(guest.memory)
    return guest.link.front_end


def raw(request: int, size: int, flags: int = 1) -> bytes:
    return struct.pack("=III", request, flags, size)


# --- the connection ends ---

ENDS: dict[str, Message] = {
    # item 11
    "an_unknown_request": Message("new", raw(99, 0), request="unknown", reason="request number 99 does not exist"),
    "request_0": Message("new", raw(0, 0), request="unknown"),
    "request_2_to_the_32": Message("new", raw(0xFFFF_FFFF, 0), request="unknown"),
    "text": Message("new", b"GET /metrics HTTP/1.1\r\n\r\n", request="unknown"),
    "zeroes": Message("new", bytes(4096), request="unknown"),
    "ones": Message("new", b"\xff" * 4096, request="unknown"),
    "a_size_of_4_gib": Message("negotiated", raw(GET_CONFIG, 0xFFFF_FFFF), request="VHOST_USER_GET_CONFIG"),
    "a_size_of_2_gib": Message("negotiated", raw(SET_MEM_TABLE, 1 << 31), request="VHOST_USER_SET_MEM_TABLE"),
    "a_size_too_small": Message("negotiated", raw(SET_VRING_NUM, 4), request="VHOST_USER_SET_VRING_NUM"),
    "version_0": Message("new", raw(GET_FEATURES, 0, flags=0), request="VHOST_USER_GET_FEATURES"),
    "version_3": Message("new", raw(GET_FEATURES, 0, flags=3), request="VHOST_USER_GET_FEATURES"),
    "a_reply": Message("new", raw(GET_FEATURES, 0, flags=5), request="VHOST_USER_GET_FEATURES"),
    "unknown_flags": Message("new", raw(GET_FEATURES, 0, flags=1 << 16 | 1), request="VHOST_USER_GET_FEATURES"),
    "a_feature_not_offered": Message("new", raw(31, 24), request="VHOST_USER_GET_INFLIGHT_FD"),
    "before_the_owner": Message("new", message(SET_FEATURES, u64(1 << 32)), request="VHOST_USER_SET_FEATURES"),
    "features_not_offered": Message(
        "negotiated", message(SET_FEATURES, u64(1 << 63)), request="VHOST_USER_SET_FEATURES", reason="bits 63"
    ),
    "features_changed_while_running": Message(
        "running", message(SET_FEATURES, u64(1 << 32)), request="VHOST_USER_SET_FEATURES"
    ),
    # item 12
    "a_descriptor_too_many": Message("new", message(GET_FEATURES), lambda: eventfds(1), "VHOST_USER_GET_FEATURES"),
    "sixteen_too_many": Message("new", message(SET_OWNER), lambda: eventfds(16), "VHOST_USER_SET_OWNER"),
    "two_hundred_too_many": Message("new", message(SET_OWNER), lambda: eventfds(200), "VHOST_USER_SET_OWNER"),
    "two_kicks_at_once": Message(
        "shared", message(SET_VRING_KICK, u64(0)), lambda: eventfds(2), "VHOST_USER_SET_VRING_KICK"
    ),
    "a_kick_without_one": Message("shared", message(SET_VRING_KICK, u64(0)), no_fds, "VHOST_USER_SET_VRING_KICK"),
    "a_call_marked_invalid_with_one": Message(
        "shared", message(SET_VRING_CALL, u64(1 << 8)), lambda: eventfds(1), "VHOST_USER_SET_VRING_CALL"
    ),
    "a_back_end_channel_that_is_no_socket": Message(
        "negotiated", message(SET_BACKEND_REQ_FD), lambda: eventfds(1), "VHOST_USER_SET_BACKEND_REQ_FD"
    ),
    "memory_without_a_descriptor": Message(
        "negotiated", message(SET_MEM_TABLE, mem_table(region(GPA, MIB, UVA))), no_fds, "VHOST_USER_SET_MEM_TABLE"
    ),
    "one_descriptor_for_two_regions": Message(
        "negotiated",
        message(SET_MEM_TABLE, mem_table(region(GPA, MIB, UVA), region(0, MIB, 0x1000))),
        lambda: [memfd()],
        "VHOST_USER_SET_MEM_TABLE",
    ),
    # item 13
    "no_regions": Message("negotiated", message(SET_MEM_TABLE, mem_table(count=0)), no_fds, "VHOST_USER_SET_MEM_TABLE"),
    "nine_regions": Message(
        "negotiated",
        message(SET_MEM_TABLE, mem_table(*[region(GPA, MIB, UVA)] * 9)),
        lambda: [memfd() for _ in range(9)],
        "VHOST_USER_SET_MEM_TABLE",
    ),
    "a_count_that_lies": Message(
        "negotiated",
        message(SET_MEM_TABLE, mem_table(region(GPA, MIB, UVA), count=0xFFFF_FFFF)),
        lambda: [memfd()],
        "VHOST_USER_SET_MEM_TABLE",
    ),
    "regions_that_overlap_for_the_guest": Message(
        "negotiated",
        message(SET_MEM_TABLE, mem_table(region(0, 2 * MIB, UVA), region(MIB, MIB, UVA + 8 * MIB))),
        lambda: [memfd(2 * MIB), memfd()],
        "VHOST_USER_SET_MEM_TABLE",
        "overlap in guest addresses",
    ),
    "regions_that_overlap_for_the_front_end": Message(
        "negotiated",
        message(SET_MEM_TABLE, mem_table(region(0, 2 * MIB, UVA), region(8 * MIB, MIB, UVA + MIB))),
        lambda: [memfd(2 * MIB), memfd()],
        "VHOST_USER_SET_MEM_TABLE",
        "overlap in user addresses",
    ),
    "a_region_of_no_size": Message(
        "negotiated",
        message(SET_MEM_TABLE, mem_table(region(GPA, 0, UVA))),
        lambda: [memfd()],
        "VHOST_USER_SET_MEM_TABLE",
        "has no size",
    ),
    "a_region_that_wraps": Message(
        "negotiated",
        message(SET_MEM_TABLE, mem_table(region(2**64 - 4096, 8192, UVA))),
        lambda: [memfd()],
        "VHOST_USER_SET_MEM_TABLE",
        "overflows",
    ),
    "an_offset_that_wraps": Message(
        "negotiated",
        message(SET_MEM_TABLE, mem_table(region(GPA, 8192, UVA, 2**64 - 4096))),
        lambda: [memfd()],
        "VHOST_USER_SET_MEM_TABLE",
        "overflows",
    ),
    "added_memory_that_overlaps": Message(
        "shared", message(ADD_MEM_REG, wire.single_region(GPA, MIB, UVA)), lambda: [memfd()], "VHOST_USER_ADD_MEM_REG"
    ),
    # item 14
    "queue_2_of_2": Message(
        "negotiated", message(SET_VRING_NUM, vring_state(2, 64)), request="VHOST_USER_SET_VRING_NUM"
    ),
    "queue_2_to_the_32": Message(
        "negotiated", message(SET_VRING_BASE, vring_state(0xFFFF_FFFF, 0)), request="VHOST_USER_SET_VRING_BASE"
    ),
    "queue_255": Message(
        "shared", message(SET_VRING_KICK, u64(255)), lambda: eventfds(1), "VHOST_USER_SET_VRING_KICK", "does not exist"
    ),
    "addresses_of_queue_2_to_the_31": Message(
        "negotiated", message(SET_VRING_ADDR, vring_addr(1 << 31)), request="VHOST_USER_SET_VRING_ADDR"
    ),
    "base_of_queue_77": Message(
        "running", message(GET_VRING_BASE, vring_state(77, 0)), request="VHOST_USER_GET_VRING_BASE"
    ),
    "enabling_queue_77": Message(
        "running", message(SET_VRING_ENABLE, vring_state(77, 1)), request="VHOST_USER_SET_VRING_ENABLE"
    ),
    "enabling_by_7": Message(
        "running", message(SET_VRING_ENABLE, vring_state(0, 7)), request="VHOST_USER_SET_VRING_ENABLE"
    ),
    "a_size_of_0": Message("negotiated", message(SET_VRING_NUM, vring_state(0, 0)), request="VHOST_USER_SET_VRING_NUM"),
    "a_size_of_65536": Message(
        "negotiated", message(SET_VRING_NUM, vring_state(0, 65536)), request="VHOST_USER_SET_VRING_NUM"
    ),
    "a_size_no_power_of_two": Message(
        "negotiated", message(SET_VRING_NUM, vring_state(0, 48)), request="VHOST_USER_SET_VRING_NUM"
    ),
    "a_size_changed_while_running": Message(
        "running", message(SET_VRING_NUM, vring_state(0, 32)), request="VHOST_USER_SET_VRING_NUM"
    ),
    "addresses_changed_while_running": Message(
        "running", message(SET_VRING_ADDR, vring_addr(0)), request="VHOST_USER_SET_VRING_ADDR"
    ),
    "a_base_while_running": Message(
        "running", message(SET_VRING_BASE, vring_state(0, 0)), request="VHOST_USER_SET_VRING_BASE"
    ),
    "a_split_base_of_32_bits": Message(
        "negotiated", message(SET_VRING_BASE, vring_state(0, 1 << 16)), request="VHOST_USER_SET_VRING_BASE"
    ),
    "a_kick_before_memory": Message(
        "negotiated", message(SET_VRING_KICK, u64(0)), lambda: eventfds(1), "VHOST_USER_SET_VRING_KICK", "any memory"
    ),
    "a_kick_before_a_size": Message(
        "shared", message(SET_VRING_KICK, u64(0)), lambda: eventfds(1), "VHOST_USER_SET_VRING_KICK", "has no size"
    ),
    "a_ring_that_is_logged": Message(
        "negotiated", message(SET_VRING_ADDR, vring_addr(0, flags=1)), request="VHOST_USER_SET_VRING_ADDR"
    ),
}

# Once these ended the connection, too. Front-ends send their like and mean no harm (tests/conversations).
LIVES = {
    name: ENDS.pop(name)
    for name in (
        "before_the_owner",
        "features_changed_while_running",
        "a_call_marked_invalid_with_one",
        "no_regions",
        "queue_2_of_2",
        "queue_255",
        "base_of_queue_77",
        "enabling_queue_77",
        "enabling_by_7",
        "a_size_no_power_of_two",
        "a_size_changed_while_running",
        "addresses_changed_while_running",
        "a_base_while_running",
        "a_split_base_of_32_bits",
        "a_kick_before_memory",
        "a_kick_before_a_size",
    )
}
LIVES["a_payload_where_there_is_none"] = Message("negotiated", message(SET_OWNER, u64(0)))
LIVES["a_call_that_is_a_socket"] = Message("running", message(SET_VRING_CALL, u64(0)), sockets)
LIVES["an_err_that_is_a_socket"] = Message("running", message(SET_VRING_ERR, u64(0)), sockets)


@pytest.mark.parametrize("sent", LIVES.values(), ids=LIVES)
async def test_a_message_that_harms_nobody_leaves_the_connection_alive(scene: Scene, sent: Message) -> None:
    guest = await scene.connect()
    try:
        front_end = await reach(guest, sent.state)
        mark = scene.log.mark
        await front_end.send(sent.data, sent.fds())
        if sent.request == "VHOST_USER_GET_VRING_BASE":
            number, _ = await front_end.receive()
            assert number == GET_VRING_BASE
        assert len(await front_end.ask(GET_FEATURES)) == 8
        assert not [entry for entry in scene.log.since(mark) if entry["event"].startswith("connection ended")]
    finally:
        guest.close()
    await scene.aftermath()


@pytest.mark.parametrize("sent", ENDS.values(), ids=ENDS)
async def test_a_message_that_breaks_the_protocol_ends_its_connection(scene: Scene, sent: Message) -> None:
    guest = await scene.connect()
    try:
        front_end = await reach(guest, sent.state)
        mark, before = scene.log.mark, scene.counters()
        await front_end.send(sent.data, sent.fds())
        assert await front_end.ended()
        entry = await scene.log.expect(mark, "connection ended")
        assert entry["event"] == "connection ended: the front-end broke the protocol"
        assert (entry["device"], entry["level"], entry["request"]) == ("victim", "warning", sent.request)
        assert sent.reason in entry["error"]
        assert len([e for e in scene.log.since(mark) if e["level"] != "info"]) == 1
        after = scene.counters()
        assert after.protocol_errors[sent.request] == before.protocol_errors.get(sent.request, 0) + 1
        assert sum(after.protocol_errors.values()) == sum(before.protocol_errors.values()) + 1
    finally:
        guest.close()
    await scene.aftermath()


# --- refused, and the conversation goes on ---

TABLE = mem_table(region(GPA, MIB, UVA))
REFUSED: dict[str, Message] = {
    "memory_larger_than_its_file": Message("negotiated", TABLE, lambda: [memfd(MIB - 4096)]),
    "memory_that_begins_at_the_end_of_its_file": Message(
        "negotiated", mem_table(region(GPA, MIB, UVA, MIB)), lambda: [memfd()]
    ),
    "memory_in_an_eventfd": Message("negotiated", TABLE, lambda: eventfds(1)),
    "memory_in_a_pipe": Message("negotiated", TABLE, pipes),
    "memory_in_a_socket": Message("negotiated", TABLE, sockets),
    "memory_in_a_folder": Message("negotiated", TABLE, folders),
    "memory_in_a_device": Message("negotiated", TABLE, unsendable),
    "memory_that_cannot_be_written": Message("negotiated", TABLE, read_only_files),
    "memory_that_is_more_than_an_address_space": Message(
        "negotiated", mem_table(region(0, 1 << 62, 0)), lambda: [memfd()]
    ),
}
REFUSED_REQUESTS = dict.fromkeys(REFUSED, SET_MEM_TABLE)
for kind, fds in (("pipe", pipes), ("socket", sockets), ("folder", folders), ("device", unsendable)):
    for name, number in (("kick", SET_VRING_KICK), ("call", SET_VRING_CALL), ("err", SET_VRING_ERR)):
        if kind == "socket" and name != "kick":
            continue  # a socket can be written to: User-mode Linux has such ones
        REFUSED[f"a_{name}_that_is_a_{kind}"] = Message("running", u64(0), fds)
        REFUSED_REQUESTS[f"a_{name}_that_is_a_{kind}"] = number


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_had_is_refused_and_the_conversation_goes_on(scene: Scene, name: str) -> None:
    sent, request = REFUSED[name], REFUSED_REQUESTS[name]
    guest = await scene.connect()
    try:
        front_end = await reach(guest, sent.state)
        mark = scene.log.mark
        for _ in range(3):
            assert await front_end.do(request, sent.data, sent.fds()) != 0
        entry = await scene.log.expect(mark, "request refused")
        assert (entry["device"], entry["request"]) == ("victim", wire.MESSAGE_NAMES[request])
        assert len([e for e in scene.log.since(mark) if e["level"] != "info"]) == 1  # said once, not three times
        if sent.state == "running":
            for queue in guest.queues:
                await BlkDriver(queue).write(0, bytes(512))
        else:
            await guest.start()
            await BlkDriver(guest.queues[0]).write(0, bytes(512))
    finally:
        guest.close()
    await scene.aftermath()
