"""What a hostile or confused front-end sends: headers, descriptors, rings, config, order.

The connection ends with an error that names the request, where it can be told nothing, and no descriptor is left.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import kit.front_end.vhost_user_wire as wire
import pytest
from kit.front_end.vhost_user_wire import MIB, Dialogue, chunked, reply_to, u64, vring_addr, vring_state

from transports.vhost_user.requests.operation import Refuse
from transports.vhost_user.requests.table import MESSAGES
from transports.vhost_user.wire.message import UNSUPPORTED
from virtio.errors import PeerError
from virtio.fd import OwnedFd

UVA = 0x7F00_0000_0000


def ready(chunk: int = 0, features: int = wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES) -> Dialogue:
    d = Dialogue(chunk)
    d.negotiate(features)
    return d


def running(chunk: int = 0) -> Dialogue:
    d = ready(chunk)
    d.share_memory()
    d.set_up_ring()
    d.start_ring()
    return d


# --- header and sizes ---

HEADERS = {
    "version_0": (struct.pack("=III", 1, 0, 0), "protocol version 0"),
    "version_2": (struct.pack("=III", 1, 2, 0), "protocol version 2"),
    "a_reply": (struct.pack("=III", 1, 5, 0), "a reply"),
    "unknown_flags": (struct.pack("=III", 1, 1 | 1 << 4, 0), "unknown header flags"),
    "top_flag": (struct.pack("=III", 1, 1 | 1 << 31, 0), "unknown header flags"),
    "request_0": (struct.pack("=III", 0, 1, 0), "request number 0 does not exist"),
    "request_0_of_4097_bytes": (struct.pack("=III", 0, 1 | wire.NEED_REPLY, 4097), "payload of 4097 bytes"),
    "request_44": (struct.pack("=III", 44, 1, 0), "request number 44 does not exist"),
    "request_2**32-1": (struct.pack("=III", 2**32 - 1, 1, 0), "does not exist"),
    "size_2**32-1": (struct.pack("=III", 24, 1, 2**32 - 1), "payload of 4294967295 bytes"),
    "size_above_the_limit": (struct.pack("=III", 24, 1, 269), "payload of 269 bytes"),
    "all_ones": (b"\xff" * 12, "protocol version 3"),
    "text": (b"GET / HTTP/1.1\r\n", "protocol version 3"),
}


@pytest.mark.parametrize(("data", "reason"), HEADERS.values(), ids=HEADERS)
def test_a_wrong_header_ends_the_connection_before_its_payload_comes(data: bytes, reason: str) -> None:
    with wire.no_fd_leaks():
        assert reason in ready().violate_raw(data, [wire.eventfd()])


@pytest.mark.parametrize("number", UNSUPPORTED)
def test_a_request_of_a_feature_that_is_not_offered_ends_the_connection_of_who_does_not_ask(number: int) -> None:
    with wire.no_fd_leaks():
        assert "does not offer" in ready().violate(number, b"", [wire.eventfd()])


SIZED = [(number, row.sizes[0] - 1) for number, row in MESSAGES.items() if row.sizes[0]]


@pytest.mark.parametrize(("number", "size"), [*SIZED, *((number, 12 + 256 + 1) for number in MESSAGES)])
def test_a_payload_too_short_or_longer_than_any_ends_the_connection(number: int, size: int) -> None:
    row = MESSAGES[number]
    with wire.no_fd_leaks():
        reason = ready().violate_raw(struct.pack("=III", number, 1, size), wire.eventfds(min(1, row.fds[-1])))
        assert f"payload of {size} bytes" in reason


@chunked
def test_a_message_that_never_ends_is_waited_for_and_its_descriptor_closed_at_the_end(chunk: int) -> None:
    whole = wire.message(13, u64(0))
    for cut in range(1, len(whole)):
        with wire.no_fd_leaks():
            d = ready(chunk)
            d.feed(whole[:cut], [wire.eventfd()])
            assert d.session.next_request() is None
            assert not d.session.is_between_messages
            d.session.close()


# --- descriptors ---


@pytest.mark.parametrize("number", [n for n, row in MESSAGES.items() if row.fds[-1] == 0])
def test_descriptors_on_a_request_that_takes_none_end_the_connection(number: int) -> None:
    payload = bytes(MESSAGES[number].sizes[0])
    for count in (1, 8, 16):
        with wire.no_fd_leaks():
            reason = ready().violate(number, payload, wire.eventfds(count))
            assert f"came with {count} file descriptors" in reason


@chunked
@pytest.mark.parametrize("number", [n for n, row in MESSAGES.items() if row.fds[-1] > 0])
def test_one_descriptor_too_many_ends_the_connection(number: int, chunk: int) -> None:
    row = MESSAGES[number]
    with wire.no_fd_leaks():
        fds = wire.eventfds(row.fds[-1] + 1)
        assert "at most" in ready(chunk).violate(number, bytes(row.sizes[0]), fds)


@pytest.mark.parametrize("number", [n for n, row in MESSAGES.items() if row.fds[0] > 0])
def test_a_missing_descriptor_ends_the_connection(number: int) -> None:
    with wire.no_fd_leaks():
        assert "came with 0" in ready().violate(number, bytes(MESSAGES[number].sizes[0]))


@pytest.mark.parametrize("request_number", [12, 13, 14], ids=["KICK", "CALL", "ERR"])
def test_a_descriptor_that_is_announced_must_come_and_reserved_bits_are_no_index(request_number: int) -> None:
    with wire.no_fd_leaks():
        assert "brings none" in ready().violate(request_number, u64(0))
        assert "reserved bits" in ready().violate(request_number, u64(1 << 9), [wire.eventfd()])
        assert "reserved bits" in ready().violate(request_number, u64(1 << 63), [wire.eventfd()])


def test_descriptors_lost_by_the_kernel_end_the_connection() -> None:
    with wire.no_fd_leaks():
        d = ready()
        d.session.receive(wire.message(13, u64(0)), [wire.eventfd()], truncated=True)
        with pytest.raises(PeerError, match="more file descriptors than could be received"):
            d.session.next_request()


def test_descriptors_that_trickle_in_with_each_byte_are_bounded() -> None:
    with wire.no_fd_leaks():
        d = ready()
        with pytest.raises(PeerError, match="at most 8"):
            trickle(d)


def trickle(d: Dialogue) -> None:
    for _ in range(12):
        d.session.receive(b"\x05", [wire.eventfd()])
        d.session.next_request()


def test_a_session_that_is_closed_closes_what_it_did_not_give_out() -> None:
    with wire.no_fd_leaks():
        d = ready()
        d.session.receive(wire.message(3) + wire.message(13, u64(0))[:8])
        d.session.receive(wire.message(13, u64(0))[8:] + wire.message(14, u64(0)), [wire.eventfd()])
        d.session.close()


@pytest.mark.parametrize("need_reply", [True, False])
def test_descriptors_are_closed_at_once_and_not_when_somebody_collects_garbage(need_reply: bool) -> None:
    d = ready()
    d.share_memory()
    unused, rejected, refused = (OwnedFd(wire.eventfd()) for _ in range(3))
    removal = wire.message(38, wire.single_region(0, MIB, UVA), need_reply=need_reply)
    d.session.receive(removal, [unused])
    request = d.session.next_request()
    assert request is not None
    assert unused.closed
    d.session.accept(request)
    d.session.receive(wire.message(22, wire.iotlb(3, 0)), [rejected])
    with pytest.raises(PeerError):
        d.session.next_request()
    assert rejected.closed
    d.session.receive(wire.message(1), [refused])
    assert refused.closed


# --- rings ---

RING_MESSAGES: dict[str, tuple[int, Callable[[int], bytes], bool]] = {
    "SET_VRING_NUM": (8, lambda index: vring_state(index, 64), False),
    "SET_VRING_ADDR": (9, vring_addr, False),
    "SET_VRING_BASE": (10, lambda index: vring_state(index, 0), False),
    "GET_VRING_BASE": (11, lambda index: vring_state(index, 0), False),
    "SET_VRING_KICK": (12, u64, True),
    "SET_VRING_CALL": (13, u64, True),
    "SET_VRING_ERR": (14, u64, True),
    "SET_VRING_ENABLE": (18, lambda index: vring_state(index, 1), False),
}


every_ring_message = pytest.mark.parametrize(("number", "payload", "has_fd"), RING_MESSAGES.values(), ids=RING_MESSAGES)


@pytest.mark.parametrize("need_reply", [False, True], ids=["silent", "need_reply"])
@pytest.mark.parametrize("index", [2, 255])
@every_ring_message
def test_a_message_about_a_queue_that_the_device_has_not_is_refused_and_no_connection_ends(
    number: int, payload: Callable[[int], bytes], has_fd: bool, index: int, need_reply: bool
) -> None:
    """Front-ends prepare all queues of their machine. GET_VRING_BASE is answered in any case: they wait for it."""
    with wire.no_fd_leaks():
        d = ready()
        operation = d.plan(number, payload(index), [wire.eventfd()] if has_fd else [], need_reply=need_reply)
        assert operation == Refuse(f"queue {index} does not exist; the device has 2", missing_queue=index)
        status = reply_to(number, u64(1)) if need_reply else b""
        assert d.reject() == (reply_to(11, vring_state(index, 0)) if number == 11 else status)
        assert d.ask(1) == reply_to(1, u64(wire.DEVICE_FEATURES | wire.F_PROTOCOL_FEATURES))


@pytest.mark.parametrize("index", [512, 2**31, 2**32 - 1])
@every_ring_message
def test_an_index_that_no_device_has_ends_the_connection(
    number: int, payload: Callable[[int], bytes], has_fd: bool, index: int
) -> None:
    with wire.no_fd_leaks():
        reason = ready().violate(number, payload(index), [wire.eventfd()] if has_fd else [])
        assert "does not exist" in reason or "reserved bits" in reason


@pytest.mark.parametrize("packed", [0, wire.F_RING_PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("size", [0, 32769, 65536, 2**31, 2**32 - 1])
def test_a_size_no_ring_can_have_ends_the_connection(size: int, packed: int) -> None:
    ready(features=packed | wire.F_VERSION_1).violate(8, vring_state(0, size))


@pytest.mark.parametrize("size", [512, 32768])
def test_a_size_above_the_limit_is_refused_in_words_that_say_what_to_do(size: int) -> None:
    d = ready()
    operation = d.plan(8, vring_state(0, size), need_reply=True)
    assert isinstance(operation, Refuse)
    assert "raise the device's queue_size" in operation.reason
    assert d.reject() == reply_to(8, u64(1))
    assert d.session.state.rings[0].size is None
    d.plan(8, vring_state(0, size))
    with pytest.raises(PeerError):  # without a reply the front-end would believe that the ring is served
        d.reject()


@pytest.mark.parametrize(
    ("features", "size", "base", "reason"),
    [
        (0, 96, 0, "not a power of two"),
        (0, 3, 0, "not a power of two"),
        (0, 64, 0x10000, "no split ring's base"),
        (0, 64, 0x8000_8000, "no split ring's base"),
        *((wire.F_RING_PACKED, 64, base, "points outside") for base in (64, 64 << 16, 0x7FFF, 0x7FFF_0000)),
    ],
)
def test_a_ring_that_its_format_does_not_know_starts_only_when_it_is_set_up_rightly(
    features: int, size: int, base: int, reason: str
) -> None:
    with wire.no_fd_leaks():
        d = ready(features=features | wire.F_VERSION_1)
        d.share_memory()
        d.set_up_ring(size=size, base=base)
        d.plan(12, u64(0 | 1 << 8), need_reply=True)
        request = d.planned
        with pytest.raises(PeerError, match=reason):
            d.accept()
        assert d.session.fail(request) == reply_to(12, u64(1))
        assert d.session.next_start() is None  # told once
        d.set_up_ring(size=64, base=0x8000_8000 if features else 0)
        assert [start.index for start in d.starts] == [0]
        d.close()


def test_ring_flags_that_were_not_negotiated_end_the_connection() -> None:
    assert "ring flags 0x1" in ready().violate(9, vring_addr(0, flags=1))


# --- config space ---


@pytest.mark.parametrize(
    "payload",
    [wire.config(0, b""), wire.config(256, b"x"), wire.config(1, bytes(256)), wire.config(2**32 - 1, bytes(8))],
    ids=["no_bytes", "at_the_end", "beyond_the_end", "offset_2**32-1"],
)
def test_config_accesses_out_of_bounds_are_refused(payload: bytes) -> None:
    d = ready()
    assert isinstance(d.plan(24, payload), Refuse)
    assert d.reject() == reply_to(24, b"")  # "zero length of payload to indicate an error"
    assert isinstance(d.plan(25, payload, need_reply=True), Refuse)
    assert d.reject() == reply_to(25, u64(1))
    assert isinstance(d.plan(25, payload), Refuse)
    with pytest.raises(PeerError, match="beyond"):
        d.reject(PeerError("beyond"))


@pytest.mark.parametrize("size", [5, 256, 2**32 - 1])
def test_a_config_access_that_announces_more_bytes_than_it_brings_is_refused(size: int) -> None:
    assert f"announces {size} bytes" in ready().violate(25, wire.config(0, bytes(4), size=size))


def test_a_config_space_larger_than_any_cannot_be_read() -> None:
    d = ready()
    assert isinstance(d.plan(24, wire.config(0, b"", size=257)), Refuse)
    assert d.reject() == reply_to(24, b"")


def test_unknown_flags_of_set_config_end_the_connection() -> None:
    assert "unknown flags" in ready().violate(25, wire.config(0, b"x", flags=2))


@pytest.mark.parametrize("status", [0x100, 2**64 - 1])
def test_a_status_of_more_than_a_byte_ends_the_connection(status: int) -> None:
    assert "no device status" in ready().violate(39, u64(status))
