"""What a hostile or confused front-end sends: headers, descriptors, rings, config, order.

In every case the connection ends with an error that names the request, and no descriptor is left.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
import vhost_user_wire as wire
from vhost_user_wire import MIB, Dialogue, chunked, reply_to, u64, vring_addr, vring_state

from transports.vhost_user.messages import MESSAGES, UNSUPPORTED
from transports.vhost_user.operations import Refuse
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
    "request_44": (struct.pack("=III", 44, 1, 0), "request number 44 does not exist"),
    "request_2**32-1": (struct.pack("=III", 2**32 - 1, 1, 0), "does not exist"),
    "size_2**32-1": (struct.pack("=III", 24, 1, 2**32 - 1), "payload of 4294967295 bytes"),
    "size_above_the_limit": (struct.pack("=III", 24, 1, 269), "payload of 269 bytes"),
    "all_ones": (b"\xff" * 12, "does not exist"),
    "text": (b"GET / HTTP/1.1\r\n", "does not exist"),
}


@pytest.mark.parametrize(("data", "reason"), HEADERS.values(), ids=HEADERS)
def test_a_wrong_header_ends_the_connection_before_its_payload_comes(data: bytes, reason: str) -> None:
    with wire.no_fd_leaks():
        assert reason in ready().violate_raw(data, [wire.eventfd()])


@pytest.mark.parametrize("number", UNSUPPORTED)
def test_a_request_of_a_feature_that_is_not_offered_ends_the_connection(number: int) -> None:
    with wire.no_fd_leaks():
        assert "does not offer" in ready().violate(number, b"", [wire.eventfd()])


@pytest.mark.parametrize("number", MESSAGES)
@pytest.mark.parametrize("change", [-1, 1], ids=["a_byte_short", "a_byte_long"])
def test_a_payload_of_the_wrong_size_ends_the_connection(number: int, change: int) -> None:
    row = MESSAGES[number]
    size = (row.sizes[-1] if change > 0 else row.sizes[0]) + change
    if size < 0:
        size = 7  # of nothing, "one byte short" is any payload
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
def test_the_invalid_fd_flag_and_the_descriptor_must_agree(request_number: int) -> None:
    with wire.no_fd_leaks():
        assert "brings none" in ready().violate(request_number, u64(0))
        assert "marks it invalid" in ready().violate(request_number, u64(0 | 1 << 8), [wire.eventfd()])
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


@pytest.mark.parametrize("index", [2, 255, 2**31, 2**32 - 1])
@pytest.mark.parametrize(("number", "payload", "has_fd"), RING_MESSAGES.values(), ids=RING_MESSAGES)
def test_an_index_without_a_queue_ends_the_connection(
    number: int, payload: Callable[[int], bytes], has_fd: bool, index: int
) -> None:
    with wire.no_fd_leaks():
        reason = ready().violate(number, payload(index), [wire.eventfd()] if has_fd else [])
        assert "does not exist" in reason or "reserved bits" in reason


@pytest.mark.parametrize("size", [0, 3, 96, 257, 512, 32768, 65536, 2**31, 2**32 - 1])
def test_a_size_no_split_ring_can_have_ends_the_connection(size: int) -> None:
    ready().violate(8, vring_state(0, size))


@pytest.mark.parametrize("size", [0, 257, 65536])
def test_a_size_no_packed_ring_can_have_ends_the_connection(size: int) -> None:
    ready(features=wire.F_RING_PACKED | wire.F_VERSION_1).violate(8, vring_state(0, size))


def test_a_size_above_the_limit_says_what_to_do() -> None:
    assert "raise the device's queue_size" in ready().violate(8, vring_state(0, 512))


@pytest.mark.parametrize("base", [0x10000, 2**32 - 1])
def test_a_base_with_reserved_bits_ends_the_connection(base: int) -> None:
    assert "reserved bits" in ready().violate(10, vring_state(0, base))


@pytest.mark.parametrize("base", [64, 64 << 16, 0x7FFF, 0x7FFF_0000])
def test_a_packed_base_outside_the_ring_ends_the_connection(base: int) -> None:
    with wire.no_fd_leaks():
        d = ready(features=wire.F_RING_PACKED | wire.F_VERSION_1)
        d.share_memory()
        d.set_up_ring(size=64, base=base)
        assert "points outside" in d.violate(12, u64(0), [wire.eventfd()])
        d.close()


def test_a_packed_base_is_no_base_of_a_split_ring() -> None:
    with wire.no_fd_leaks():
        d = ready(features=wire.F_RING_PACKED | wire.F_VERSION_1)
        d.share_memory()
        d.set_up_ring(size=64, base=0x8000_8000)
        d.ask(2, u64(wire.F_VERSION_1))
        assert "no split ring's base" in d.violate(12, u64(0), [wire.eventfd()])
        d.close()


def test_ring_flags_that_were_not_negotiated_end_the_connection() -> None:
    assert "ring flags 0x1" in ready().violate(9, vring_addr(0, flags=1))


@pytest.mark.parametrize("value", [2, 2**32 - 1])
def test_a_ring_is_enabled_by_1_and_disabled_by_0_only(value: int) -> None:
    assert "neither 0" in ready().violate(18, vring_state(0, value))


@pytest.mark.parametrize(
    ("number", "payload", "reason"),
    [
        (8, vring_state(0, 64), "size cannot change"),
        (9, vring_addr(0, desc=0x9000), "addresses cannot change"),
        (10, vring_state(0, 0), "base cannot change"),
        (2, u64(wire.F_PROTOCOL_FEATURES), "features cannot change"),
        (16, u64(wire.MQ), "protocol features cannot change"),
    ],
    ids=["SET_VRING_NUM", "SET_VRING_ADDR", "SET_VRING_BASE", "SET_FEATURES", "SET_PROTOCOL_FEATURES"],
)
def test_nothing_a_running_ring_stands_on_can_change(number: int, payload: bytes, reason: str) -> None:
    with wire.no_fd_leaks():
        d = running()
        assert reason in d.violate(number, payload)
        d.close()


@pytest.mark.parametrize("missing", ["memory", "size", "addresses"])
def test_a_ring_that_is_not_set_up_cannot_be_kicked(missing: str) -> None:
    reasons = {"memory": "before the front-end shared any memory", "size": "no size", "addresses": "no addresses"}
    with wire.no_fd_leaks():
        d = ready()
        if missing != "memory":
            d.share_memory()
        if missing != "size":
            d.ask(8, vring_state(0, 64))
        if missing != "addresses":
            d.ask(9, vring_addr(0))
        assert reasons[missing] in d.violate(12, u64(0), [wire.eventfd()])
        d.close()


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


@pytest.mark.parametrize("size", [0, 3, 5, 256, 2**32 - 1])
@pytest.mark.parametrize("number", [24, 25])
def test_a_config_size_that_contradicts_the_payload_ends_the_connection(number: int, size: int) -> None:
    assert f"announces {size} bytes" in ready().violate(number, wire.config(0, bytes(4), size=size))


def test_unknown_flags_of_set_config_end_the_connection() -> None:
    assert "unknown flags" in ready().violate(25, wire.config(0, b"x", flags=2))


@pytest.mark.parametrize("status", [0x100, 2**64 - 1])
def test_a_status_of_more_than_a_byte_ends_the_connection(status: int) -> None:
    assert "no device status" in ready().violate(39, u64(status))
