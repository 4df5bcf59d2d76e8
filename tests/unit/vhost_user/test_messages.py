"""The message table agrees with itself and with the code that reads it."""

from __future__ import annotations

import ast
from pathlib import Path

import kit.front_end.vhost_user_wire as wire
import pytest

from transports.vhost_user.requests import config_space, device, iotlb, memory, negotiation, net, rings
from transports.vhost_user.requests.table import MESSAGES, REQUESTS
from transports.vhost_user.wire.message import SIZES, UNSUPPORTED, VHOST_USER_MAX_PAYLOAD, Message, Payload, Reply

# The protocol text's "Front-end message types", by number from 1.
NAMES = """
    GET_FEATURES SET_FEATURES SET_OWNER RESET_OWNER SET_MEM_TABLE SET_LOG_BASE SET_LOG_FD SET_VRING_NUM
    SET_VRING_ADDR SET_VRING_BASE GET_VRING_BASE SET_VRING_KICK SET_VRING_CALL SET_VRING_ERR GET_PROTOCOL_FEATURES
    SET_PROTOCOL_FEATURES GET_QUEUE_NUM SET_VRING_ENABLE SEND_RARP NET_SET_MTU SET_BACKEND_REQ_FD IOTLB_MSG
    SET_VRING_ENDIAN GET_CONFIG SET_CONFIG CREATE_CRYPTO_SESSION CLOSE_CRYPTO_SESSION POSTCOPY_ADVISE
    POSTCOPY_LISTEN POSTCOPY_END GET_INFLIGHT_FD SET_INFLIGHT_FD GPU_SET_SOCKET RESET_DEVICE VRING_KICK
    GET_MAX_MEM_SLOTS ADD_MEM_REG REM_MEM_REG SET_STATUS GET_STATUS GET_SHARED_OBJECT SET_DEVICE_STATE_FD
    CHECK_DEVICE_STATE
"""


def test_every_request_has_the_name_and_the_number_of_the_text() -> None:
    ours = {row.number: row.name for row in MESSAGES.values()} | dict(UNSUPPORTED)
    assert ours == {number: f"VHOST_USER_{name}" for number, name in enumerate(NAMES.split(), 1)}


def test_every_class_of_a_request_is_in_the_table() -> None:
    rooms = (config_space, device, iotlb, memory, negotiation, net, rings)
    kinds = {kind for room in rooms for kind in vars(room).values() if isinstance(kind, type)}
    classes = {kind for kind in kinds if isinstance(vars(kind).get("message"), Message)}
    assert classes == set(REQUESTS.values())


def test_requests_know_nothing_of_sockets_or_of_trio() -> None:
    for path in Path(negotiation.__file__).parent.glob("*.py"):
        tree = list(ast.walk(ast.parse(path.read_text())))
        names = [alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in tree if isinstance(node, ast.ImportFrom)]
        assert names or path.name == "__init__.py"
        assert not {name.split(".")[0] for name in names} & {"trio", "socket"}, path


def test_the_offered_protocol_features_are_exactly_those_implemented() -> None:
    implemented = wire.ALL_PROTOCOL_FEATURES | wire.RARP | wire.NET_MTU | wire.INBAND_NOTIFICATIONS
    assert implemented == negotiation.OFFERED_PROTOCOL_FEATURES == 0b1_1110_0010_0011_1101


def test_inband_notifications_are_offered_only_where_they_are_asked_for() -> None:
    def offered(**how: bool) -> int:
        return negotiation.offered_protocol_features(has_config_space=True, is_network_interface=True, **how)

    assert not offered() & wire.INBAND_NOTIFICATIONS
    assert offered(inband_notifications=True) == offered() | wire.INBAND_NOTIFICATIONS


def test_every_protocol_feature_a_request_needs_is_offered() -> None:
    needed = {row.feature for row in MESSAGES.values() if row.feature is not None}
    assert needed <= set(negotiation.PROTOCOL_FEATURES.values())


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
    assert SIZES[payload] == len(example)


def test_the_largest_payloads_of_the_wire_are_legal() -> None:
    table, access = wire.mem_table(*[wire.region(0, 1, 2)] * 8), wire.config(0, bytes(256))
    assert max(len(table), len(access)) == VHOST_USER_MAX_PAYLOAD
    assert all(row.sizes[-1] == VHOST_USER_MAX_PAYLOAD for row in MESSAGES.values())


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
