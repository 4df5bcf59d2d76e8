"""Hostile or confused front-ends: requests of features that were not offered, and IOTLB nonsense."""

from __future__ import annotations

import kit.front_end.vhost_user_wire as wire
import pytest
from kit.front_end.vhost_user_wire import MIB, Dialogue, reply_to, u64

from transports.vhost_user.requests.negotiation import SetFeatures
from transports.vhost_user.requests.operation import Refuse
from virtio.spec import VIRTIO_F_RING_RESET

UVA = 0x7F00_0000_0000


def ready(features: int = wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES) -> Dialogue:
    d = Dialogue()
    d.negotiate(features)
    return d


@pytest.mark.parametrize("number", [19, 20], ids=["SEND_RARP", "NET_SET_MTU"])
def test_a_request_of_a_feature_that_the_device_does_not_offer_is_refused(number: int) -> None:
    assert "which this device does not offer" in ready().violate(number, u64(0))
    d = ready()
    assert isinstance(d.plan(number, u64(0), need_reply=True), Refuse)
    assert d.reject() == reply_to(number, u64(1))


@pytest.mark.parametrize("bit", [0, 26, 27, 41, 63])
def test_features_that_were_not_offered_end_the_connection(bit: int) -> None:
    assert f"feature bits {bit} were not offered" in ready().violate(2, u64(wire.F_VERSION_1 | 1 << bit))


def test_ring_reset_is_ignored_where_a_front_end_accepts_what_it_offered_itself() -> None:
    d = ready()
    operation = d.plan(2, u64(wire.F_VERSION_1 | 1 << VIRTIO_F_RING_RESET))  # QEMU 7.2's vhost-user-input
    assert isinstance(operation, SetFeatures)
    assert operation.bits == wire.F_VERSION_1


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
def test_an_impossible_iotlb_message_is_refused(payload: bytes, reason: str) -> None:
    d = with_iommu()
    operation = d.plan(22, payload)
    assert isinstance(operation, Refuse)
    assert reason in operation.reason
    assert d.reject() == reply_to(22, u64(1))
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
def test_iotlb_messages_where_nothing_is_translated_are_refused(features: int, protocol: int, kind: int) -> None:
    """A front-end that sends them counts on them: identity would be memory other than it means."""
    d = Dialogue()
    d.negotiate(features, protocol)
    d.share_memory()
    operation = d.plan(22, wire.iotlb(kind, 0x4000, 0x1000, UVA, 3))
    assert isinstance(operation, Refuse)
    assert "VIRTIO_F_ACCESS_PLATFORM and VHOST_USER_PROTOCOL_F_BACKEND_REQ were not both negotiated" in operation.reason
    d.close()
