"""The message table agrees with itself and with the code that reads it."""

from __future__ import annotations

import pytest
import vhost_user_wire as wire

from transports.vhost_user import messages, rules
from transports.vhost_user.messages import MESSAGES, Payload, Reply


@pytest.mark.parametrize("row", MESSAGES.values(), ids=lambda row: row.name)
def test_a_row_is_named_and_numbered_like_its_constant(row: messages.Message) -> None:
    assert getattr(messages, row.name) == row.number


def test_every_row_has_a_rule_and_every_rule_a_row() -> None:
    assert set(rules._PLANS) == set(MESSAGES)


def test_no_supported_request_is_listed_as_unsupported() -> None:
    assert not set(MESSAGES) & set(messages.UNSUPPORTED)
    assert sorted(set(MESSAGES) | set(messages.UNSUPPORTED)) == [n for n in range(1, 44) if n != 0]


def test_the_offered_protocol_features_are_exactly_those_implemented() -> None:
    implemented = wire.ALL_PROTOCOL_FEATURES | wire.RARP | wire.NET_MTU | wire.INBAND_NOTIFICATIONS
    assert implemented == messages.OFFERED_PROTOCOL_FEATURES == 0b1_1110_0010_0011_1101


def test_inband_notifications_are_offered_only_where_they_are_asked_for() -> None:
    def offered(**how: bool) -> int:
        return messages.offered_protocol_features(has_config_space=True, is_network_interface=True, **how)

    assert not offered() & wire.INBAND_NOTIFICATIONS
    assert offered(inband_notifications=True) == offered() | wire.INBAND_NOTIFICATIONS


def test_every_protocol_feature_a_request_needs_is_offered() -> None:
    needed = {row.feature for row in MESSAGES.values() if row.feature is not None}
    assert needed <= set(messages.PROTOCOL_FEATURES.values())


def test_the_requests_with_a_reply_of_their_own_are_those_of_the_text() -> None:
    always = {row.name.removeprefix("VHOST_USER_") for row in MESSAGES.values() if row.reply is not Reply.ON_REQUEST}
    assert always == {
        "GET_FEATURES",
        "GET_PROTOCOL_FEATURES",
        "GET_VRING_BASE",
        "GET_QUEUE_NUM",
        "GET_CONFIG",
        "GET_MAX_MEM_SLOTS",
        "GET_STATUS",
        "IOTLB_MSG",
    }


@pytest.mark.parametrize(
    ("payload", "example"),
    [
        (Payload.NOTHING, b""),
        (Payload.U64, wire.u64(1)),
        (Payload.VRING_STATE, wire.vring_state(0, 1)),
        (Payload.VRING_ADDR, wire.vring_addr(0)),
        (Payload.VRING_FD, wire.u64(0)),
        (Payload.MEMORY_TABLE, wire.mem_table()),
        (Payload.MEMORY_REGION, wire.single_region(0, 1, 2)),
        (Payload.IOTLB, wire.iotlb(2, 0)),
        (Payload.CONFIG, wire.config(0, b"")),
    ],
)
def test_the_least_legal_size_of_a_payload_is_that_of_the_wire(payload: Payload, example: bytes) -> None:
    assert messages.SIZES[payload] == len(example)


def test_the_largest_payloads_of_the_wire_are_legal() -> None:
    table, access = wire.mem_table(*[wire.region(0, 1, 2)] * 8), wire.config(0, bytes(256))
    assert max(len(table), len(access)) == messages.VHOST_USER_MAX_PAYLOAD
    assert all(row.sizes[-1] == messages.VHOST_USER_MAX_PAYLOAD for row in MESSAGES.values())


def test_every_request_that_carries_a_descriptor_is_one_the_text_names() -> None:
    with_fds = {row.name.removeprefix("VHOST_USER_") for row in MESSAGES.values() if row.fds[-1] > 0}
    assert with_fds == {
        "ADD_MEM_REG",
        "REM_MEM_REG",
        "SET_MEM_TABLE",
        "SET_VRING_KICK",
        "SET_VRING_CALL",
        "SET_VRING_ERR",
        "SET_BACKEND_REQ_FD",
    }
