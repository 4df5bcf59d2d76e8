"""Hostile or confused front-ends: requests out of order, of features nobody negotiated, and IOTLB nonsense."""

from __future__ import annotations

import pytest
import vhost_user_wire as wire
from vhost_user_wire import MIB, Dialogue, reply_to, u64, vring_state

from transports.vhost_user.messages import MESSAGES
from transports.vhost_user.operations import Refuse

UVA = 0x7F00_0000_0000


def ready(features: int = wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES) -> Dialogue:
    d = Dialogue()
    d.negotiate(features)
    return d


@pytest.mark.parametrize("number", [n for n, row in MESSAGES.items() if not row.before_owner])
def test_a_request_before_set_owner_ends_the_connection(number: int) -> None:
    with wire.no_fd_leaks():
        d = Dialogue(is_network_interface=True, inband_notifications=True)
        d.ask(16, u64(wire.ALL_PROTOCOL_FEATURES | wire.RARP | wire.NET_MTU | wire.INBAND_NOTIFICATIONS))
        row = MESSAGES[number]
        reason = d.violate(number, bytes(row.sizes[0]), wire.eventfds(row.fds[0]))
        assert "before VHOST_USER_SET_OWNER" in reason


@pytest.mark.parametrize("number", [n for n, row in MESSAGES.items() if row.needs_features])
def test_a_request_whose_meaning_depends_on_features_must_wait_for_them(number: int) -> None:
    with wire.no_fd_leaks():
        d = Dialogue()
        d.ask(16, u64(wire.ALL_PROTOCOL_FEATURES))
        d.ask(3)
        row = MESSAGES[number]
        reason = d.violate(number, bytes(row.sizes[0]), wire.eventfds(row.fds[0]))
        assert "before VHOST_USER_SET_FEATURES" in reason


@pytest.mark.parametrize("number", [n for n, row in MESSAGES.items() if row.feature is not None])
def test_a_request_of_a_feature_that_was_not_negotiated_ends_the_connection(number: int) -> None:
    row = MESSAGES[number]
    assert row.feature is not None
    with wire.no_fd_leaks():
        d = Dialogue()
        d.negotiate(protocol=wire.ALL_PROTOCOL_FEATURES & ~(1 << row.feature))
        reason = d.violate(number, bytes(row.sizes[0]), wire.eventfds(row.fds[0]))
        assert "was not negotiated" in reason


def test_set_vring_enable_needs_protocol_features() -> None:
    d = Dialogue()
    d.ask(3)
    d.ask(2, u64(wire.F_VERSION_1))
    assert "VHOST_USER_F_PROTOCOL_FEATURES was not negotiated" in d.violate(18, vring_state(0, 1))


def test_need_reply_without_reply_ack_ends_the_connection() -> None:
    d = Dialogue()
    d.negotiate(protocol=wire.ALL_PROTOCOL_FEATURES & ~wire.REPLY_ACK)
    assert "REPLY_ACK was not negotiated" in d.violate(8, vring_state(0, 64), need_reply=True)


@pytest.mark.parametrize("bit", [0, 26, 27, 40, 63])
def test_features_that_were_not_offered_end_the_connection(bit: int) -> None:
    assert f"feature bits {bit} were not offered" in ready().violate(2, u64(wire.F_VERSION_1 | 1 << bit))


@pytest.mark.parametrize("bit", [1, 2, 8, 10, 12, 14, 17, 19, 20, 63])
def test_protocol_features_that_were_not_offered_end_the_connection(bit: int) -> None:
    assert f"protocol feature bits {bit} were not offered" in ready().violate(16, u64(1 << bit))


# --- IOTLB ---


def with_iommu() -> Dialogue:
    d = ready(features=wire.F_VERSION_1 | wire.F_ACCESS_PLATFORM | wire.F_PROTOCOL_FEATURES)
    d.share_memory()
    return d


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (wire.iotlb(1, 0, 0x1000, UVA, 1), "type 1"),
        (wire.iotlb(4, 0, 0x1000, UVA, 1), "type 4"),
        (wire.iotlb(5, 0), "type 5"),
        (wire.iotlb(255, 0), "type 255"),
        (wire.iotlb(2, 0, 0x1000, UVA, 4), "unknown permissions"),
        (wire.iotlb(2, 0, 0, UVA, 3), "no range"),
        (wire.iotlb(2, 2**64 - 0x800, 0x1000, UVA, 3), "no range"),
        (wire.iotlb(2, 0, 0x1000, 2**64 - 0x800, 3), "no range"),
        (wire.iotlb(3, 2**64 - 0x800, 0x1000), "no range"),
    ],
    ids=[
        "a_miss",
        "an_access_failure",
        "type_5",
        "type_255",
        "permission_4",
        "size_0",
        "iova_overflow",
        "uva_overflow",
        "invalidation_overflow",
    ],
)
def test_an_impossible_iotlb_message_ends_the_connection(payload: bytes, reason: str) -> None:
    d = with_iommu()
    assert reason in d.violate(22, payload)
    d.close()


@pytest.mark.parametrize(
    ("uva", "size"), [(UVA - 1, 2), (UVA + MIB - 1, 2), (UVA + MIB, 1), (0, 0x1000), (UVA, MIB + 1)]
)
def test_a_translation_to_memory_that_is_not_shared_is_refused(uva: int, size: int) -> None:
    d = with_iommu()
    assert isinstance(d.plan(22, wire.iotlb(2, 0x4000, size, uva, 3)), Refuse)
    assert d.reject() == reply_to(22, u64(1))
    d.close()


@pytest.mark.parametrize(
    ("features", "protocol"),
    [
        (wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES, wire.ALL_PROTOCOL_FEATURES),
        (wire.F_VERSION_1 | wire.F_ACCESS_PLATFORM | wire.F_PROTOCOL_FEATURES, wire.REPLY_ACK),
    ],
    ids=["no_access_platform", "no_backend_req"],
)
@pytest.mark.parametrize("kind", [2, 3], ids=["update", "invalidate"])
def test_iotlb_messages_where_nothing_is_translated_end_the_connection(features: int, protocol: int, kind: int) -> None:
    """A front-end that sends them counts on them: identity would be memory other than it means."""
    d = Dialogue()
    d.negotiate(features, protocol)
    d.share_memory()
    told = d.violate(22, wire.iotlb(kind, 0x4000, 0x1000, UVA, 3))
    assert "VIRTIO_F_ACCESS_PLATFORM and VHOST_USER_PROTOCOL_F_BACKEND_REQ were not both negotiated" in told
    d.close()
