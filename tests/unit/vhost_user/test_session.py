"""Conversations a correct front-end has: negotiation, replies, rings, config, status."""

from __future__ import annotations

import kit.front_end.vhost_user_wire as wire
import pytest
from kit.front_end.vhost_user_wire import Dialogue, chunked, reply_to, u64, vring_state

from transports.vhost_user.requests.config_space import ReadConfig, WriteConfig
from transports.vhost_user.requests.device import GetStatus, ResetDevice, SetBackendChannel, SetStatus, StopDevice
from transports.vhost_user.requests.iotlb import IotlbInvalidate, IotlbUpdate
from transports.vhost_user.requests.negotiation import SetFeatures
from transports.vhost_user.requests.operation import Answer
from transports.vhost_user.requests.rings import SetCall, StopQueue
from transports.vhost_user.session import Session
from virtio.errors import HostError
from virtio.fd import OwnedFd
from virtio.waist import AddressSpace


@chunked
def test_session_negotiates_in_the_order_of_qemu(chunk: int) -> None:
    with wire.no_fd_leaks():
        d = Dialogue(chunk)
        assert d.ask(1) == reply_to(1, u64(wire.DEVICE_FEATURES | wire.F_PROTOCOL_FEATURES))
        assert d.ask(15) == reply_to(15, u64(wire.ALL_PROTOCOL_FEATURES))
        assert d.ask(16, u64(wire.ALL_PROTOCOL_FEATURES)) == b""
        assert d.ask(17) == reply_to(17, u64(2))
        assert d.ask(36) == reply_to(36, u64(509))
        assert d.ask(21, b"", [wire.eventfd()], need_reply=True) == reply_to(21, u64(0))
        assert d.ask(3, need_reply=True) == reply_to(3, u64(0))
        assert d.ask(1) == reply_to(1, u64(wire.DEVICE_FEATURES | wire.F_PROTOCOL_FEATURES))
        for index in range(2):
            assert d.ask(13, u64(index), [wire.eventfd()], need_reply=True) == reply_to(13, u64(0))
            assert d.ask(14, u64(index), [wire.eventfd()], need_reply=True) == reply_to(14, u64(0))
        assert d.ask(24, wire.config(0, bytes(60)), value=b"c" * 60) == reply_to(24, wire.config(0, b"c" * 60))
        assert d.ask(2, u64(wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES), need_reply=True) == reply_to(2, u64(0))
        d.share_memory()
        d.set_up_ring()
        d.start_ring()
        assert d.session.state.rings[0].started
        d.close()


@chunked
def test_session_understands_a_front_end_without_protocol_features(chunk: int) -> None:
    d = Dialogue(chunk)
    d.ask(3)
    d.ask(1)
    operation = d.plan(2, u64(wire.F_VERSION_1))
    assert operation == SetFeatures(wire.F_VERSION_1, enable_all=True)
    d.accept()
    assert [ring.enabled for ring in d.session.state.rings] == [True, True]


def test_session_takes_several_messages_from_one_chunk() -> None:
    d = Dialogue()
    d.session.receive(wire.message(3) + wire.message(1) + wire.message(15)[:7])
    first = d.session.next_request()
    assert first is not None
    assert first.name == "VHOST_USER_SET_OWNER"
    assert d.session.accept(first) == b""
    second = d.session.next_request()
    assert second is not None
    assert d.session.accept(second, 5) == reply_to(1, u64(5))
    assert d.session.next_request() is None
    assert not d.session.is_between_messages


def test_session_wants_no_byte_beyond_the_message_it_reads() -> None:
    session = Session(device_features=0, queue_count=1, queue_size_max=256)
    assert session.wanted_bytes == 12
    session.receive(wire.message(3)[:5])
    assert session.wanted_bytes == 7
    session.receive(wire.message(3)[5:])
    owner = session.next_request()
    assert owner is not None
    session.accept(owner)
    session.receive(wire.message(2, u64(0))[:12])
    assert session.next_request() is None
    assert session.wanted_bytes == 8


def test_descriptors_that_come_in_the_middle_of_their_message_are_taken() -> None:
    with wire.no_fd_leaks():
        d = Dialogue()
        d.negotiate()
        call = wire.message(13, u64(0))
        d.session.receive(call[:15])
        assert d.session.next_request() is None
        d.session.receive(call[15:], [wire.eventfd()])
        request = d.session.next_request()
        assert request is not None
        assert isinstance(request.operation, SetCall)
        assert len(request.fds) == 1
        request.fds[0].close()


def test_descriptors_stay_with_their_message_when_several_wait() -> None:
    with wire.no_fd_leaks():
        d = Dialogue()
        d.negotiate()
        call, err = OwnedFd(wire.eventfd()), OwnedFd(wire.eventfd())
        d.session.receive(wire.message(17))
        d.session.receive(wire.message(13, u64(0)), [call])
        d.session.receive(wire.message(14, u64(1)), [err])
        found = []
        while (request := d.session.next_request()) is not None:
            found.append((request.message.number, request.fds))
            d.session.accept(request)
        assert found == [(17, ()), (13, (call,)), (14, (err,))]
        call.close()
        err.close()


def test_next_request_insists_that_the_last_one_is_answered() -> None:
    d = Dialogue()
    d.plan(1)
    with pytest.raises(RuntimeError, match="VHOST_USER_GET_FEATURES was not answered"):
        d.session.next_request()


# --- replies ---


@chunked
def test_a_reply_comes_only_when_it_was_asked_for(chunk: int) -> None:
    d = Dialogue(chunk)
    d.negotiate()
    assert d.ask(8, vring_state(0, 64)) == b""
    assert d.ask(8, vring_state(0, 64), need_reply=True) == reply_to(8, u64(0))


def test_need_reply_changes_nothing_for_a_request_with_its_own_reply() -> None:
    d = Dialogue()
    d.negotiate()
    assert d.ask(17, need_reply=True) == d.ask(17) == reply_to(17, u64(2))


def test_set_protocol_features_itself_may_ask_for_a_reply() -> None:
    d = Dialogue()
    assert d.ask(16, u64(wire.REPLY_ACK), need_reply=True) == reply_to(16, u64(0))


def test_a_failed_operation_is_answered_with_a_nonzero_status() -> None:
    d = Dialogue()
    d.negotiate()
    d.plan(39, u64(1), need_reply=True)
    assert d.reject() == reply_to(39, u64(1))
    assert d.ask(17) == reply_to(17, u64(2))  # and the conversation goes on


def test_a_failed_operation_that_cannot_be_answered_raises_its_error() -> None:
    d = Dialogue()
    d.negotiate()
    d.plan(39, u64(1))
    with pytest.raises(HostError, match="no memory"):
        d.reject(HostError("no memory"))
    assert d.session.next_request() is None  # closed


def test_a_failed_get_vring_base_cannot_be_answered() -> None:
    d = Dialogue()
    d.negotiate()
    d.plan(11, vring_state(0, 0), need_reply=True)
    with pytest.raises(HostError, match="stuck"):
        d.reject(HostError("stuck"))


# --- the device ---


@chunked
def test_config_space_is_read_and_written(chunk: int) -> None:
    d = Dialogue(chunk)
    d.negotiate()
    assert d.plan(24, wire.config(8, bytes(4), flags=1)) == ReadConfig(8, 4, 1)
    assert d.accept(b"abcd") == reply_to(24, wire.config(8, b"abcd", flags=1))
    assert d.plan(25, wire.config(32, b"\x01"), need_reply=True) == WriteConfig(32, b"\x01")
    assert d.accept() == reply_to(25, u64(0))


def test_status_is_set_and_read() -> None:
    d = Dialogue()
    d.negotiate()
    assert d.plan(39, u64(7)) == SetStatus(7)
    d.accept()
    assert d.plan(40) == GetStatus()
    assert d.accept(7) == reply_to(40, u64(7))


def test_status_0_stops_all_rings_and_their_bases_are_still_to_be_had() -> None:
    d = Dialogue()
    d.negotiate()
    d.share_memory()
    for index in range(2):
        d.set_up_ring(index)
        d.start_ring(index)
    assert d.plan(39, u64(0)) == StopDevice((0, 1), flush_iotlb=False)
    d.accept({0: 41, 1: 42})
    assert d.session.state.is_suspended
    assert d.plan(11, vring_state(0, 0)) == StopQueue(0, 41, started=False)
    d.accept(41)
    assert d.plan(11, vring_state(1, 0)) == StopQueue(1, 42, started=False)
    d.accept(42)
    d.ask(2, u64(wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES))  # a paused machine goes on like this
    d.start_ring(1)
    assert d.session.state.rings[1].base == 42
    d.close()


def test_reset_device_forgets_rings_and_features_and_keeps_the_memory() -> None:
    d = Dialogue()
    d.negotiate()
    d.share_memory()
    d.set_up_ring()
    d.start_ring()
    d.ask(18, vring_state(0, 1))
    regions = d.session.state.memory.regions
    for _ in range(3):  # QEMU sends it twice or thrice in a row
        assert d.plan(34) == ResetDevice()
        d.accept()
    state = d.session.state
    assert state.features is None
    assert (state.rings[0].started, state.rings[0].enabled, state.rings[0].size) == (False, False, None)
    assert state.memory.regions == regions
    d.ask(2, u64(wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES))
    d.set_up_ring()
    d.start_ring()
    assert [start.index for start in d.starts] == [0]
    d.close()


def test_a_back_end_channel_is_given_to_whoever_serves_the_connection() -> None:
    with wire.no_fd_leaks():
        d = Dialogue()
        d.negotiate()
        operation = d.plan(21, b"", [wire.eventfd()])
        assert isinstance(operation, SetBackendChannel)
        assert not operation.fd.closed
        operation.fd.close()


# --- IOTLB ---


@chunked
def test_iotlb_messages_are_answered_whether_or_not_a_reply_was_asked_for(chunk: int) -> None:
    d = Dialogue(chunk)
    d.negotiate(wire.F_VERSION_1 | wire.F_ACCESS_PLATFORM | wire.F_PROTOCOL_FEATURES)
    d.share_memory()
    assert d.plan(22, wire.iotlb(2, 0x4000, 0x1000, 0x7F00_0000_2000, 3)) == IotlbUpdate(
        0x4000, 0x1000, 0x7F00_0000_2000, 3
    )
    assert d.accept() == reply_to(22, u64(0))
    assert d.plan(22, wire.iotlb(3, 0x4000, 0x1000), need_reply=True) == IotlbInvalidate(0x4000, 0x1000)
    assert d.accept() == reply_to(22, u64(0))
    d.close()


def test_an_invalidation_of_everything_arrives_as_size_zero() -> None:
    d = Dialogue()
    d.negotiate(wire.F_VERSION_1 | wire.F_ACCESS_PLATFORM | wire.F_PROTOCOL_FEATURES)
    assert d.plan(22, wire.iotlb(3, 0, 0)) == IotlbInvalidate(0, 2**64 - 1)


def test_with_an_iommu_ring_addresses_are_iovas() -> None:
    d = Dialogue()
    d.negotiate(wire.F_VERSION_1 | wire.F_ACCESS_PLATFORM | wire.F_PROTOCOL_FEATURES)
    d.share_memory()
    d.set_up_ring()
    d.ask(12, u64(0 | 1 << 8))
    assert [start.setup.space for start in d.starts] == [AddressSpace.IOVA]
    d.close()


SET_FEATURES = (2, wire.F_VERSION_1 | wire.F_ACCESS_PLATFORM | wire.F_PROTOCOL_FEATURES)


@pytest.mark.parametrize(
    ("messages", "space"),
    [
        ([(16, wire.REPLY_ACK), SET_FEATURES], AddressSpace.UVA),
        ([SET_FEATURES, (16, wire.REPLY_ACK)], AddressSpace.UVA),
        ([SET_FEATURES], AddressSpace.UVA),
        ([(16, wire.REPLY_ACK | wire.BACKEND_REQ), SET_FEATURES], AddressSpace.IOVA),
        ([SET_FEATURES, (16, wire.REPLY_ACK | wire.BACKEND_REQ)], AddressSpace.IOVA),
        ([(16, wire.BACKEND_REQ), SET_FEATURES, (16, wire.REPLY_ACK)], AddressSpace.UVA),
    ],
    ids=["never", "never_late", "no_protocol_features", "before", "after", "taken_back"],
)
def test_without_a_way_to_ask_for_translations_access_platform_is_the_identity(
    messages: list[tuple[int, int]], space: AddressSpace
) -> None:
    """Front-ends without an IOMMU pass their driver's features on; when they say so does not matter."""
    d = Dialogue()
    d.ask(3)
    for number, bits in messages:
        d.ask(number, u64(bits))
    d.share_memory()
    d.set_up_ring()
    d.ask(12, u64(0 | 1 << 8))
    assert [start.setup.space for start in d.starts] == [space]
    assert d.plan(11, vring_state(0, 0)) == StopQueue(0, None, flush_iotlb=space is AddressSpace.IOVA)
    d.accept(0)
    d.close()


def test_when_the_last_ring_stops_all_translations_are_forgotten() -> None:
    d = Dialogue()
    d.negotiate(wire.F_VERSION_1 | wire.F_ACCESS_PLATFORM | wire.F_PROTOCOL_FEATURES)
    d.share_memory()
    for index in range(2):
        d.set_up_ring(index)
        d.start_ring(index)
    assert d.plan(11, vring_state(0, 0)) == StopQueue(0, None, flush_iotlb=False)
    d.accept(0)
    assert d.plan(11, vring_state(1, 0)) == StopQueue(1, None, flush_iotlb=True)
    d.accept(0)
    d.start_ring(0)
    assert d.plan(39, u64(0)) == StopDevice((0,), flush_iotlb=True)
    d.accept({0: 0})
    d.close()


def test_a_translation_that_comes_after_the_device_was_stopped_is_acknowledged_and_dropped() -> None:
    d = Dialogue()
    d.negotiate(wire.F_VERSION_1 | wire.F_ACCESS_PLATFORM | wire.F_PROTOCOL_FEATURES)
    d.share_memory()
    d.ask(39, u64(0))
    late = wire.iotlb(2, 0x4000, 0x1000, 0x7F00_0000_2000, 3)
    assert d.plan(22, late) == Answer(0)
    assert d.accept(0) == reply_to(22, u64(0))
    d.ask(2, u64(wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES))  # the next driver does without an IOMMU
    assert d.ask(22, late) == reply_to(22, u64(0))
    d.close()


@pytest.mark.parametrize(
    ("order", "offers_config", "offered"),
    [
        ([15, 3, 15], False, [False, True]),  # asked first, owner, and no features agreed on: not QEMU
        ([15, 16, 3, 15], False, [False, False]),  # QEMU, with a second pair of queues
        ([3, 15], False, [True]),  # User-mode Linux, cloud-hypervisor, DPDK
        ([15, 16], True, [True]),  # libkrun, told by the configuration
    ],
    ids=["asks_twice", "qemu", "owner_first", "by_configuration"],
)
def test_the_config_space_of_a_network_interface_is_not_offered_to_qemu(
    order: list[int], offers_config: bool, offered: list[bool]
) -> None:
    """QEMU would warn of it for each pair of queues; a front-end that has no config space of its own needs it."""
    d = Dialogue(is_network_interface=True, offers_config=offers_config)
    answers = [d.ask(number, u64(wire.MQ) if number == 16 else b"") for number in order]
    protocol = [
        int.from_bytes(answer[12:], "little") for number, answer in zip(order, answers, strict=True) if number == 15
    ]
    assert [bool(bits & wire.CONFIG) for bits in protocol] == offered
    d.close()


def test_a_device_that_is_no_network_interface_offers_its_config_space_to_qemu_too() -> None:
    d = Dialogue()
    assert int.from_bytes(d.ask(15)[12:], "little") & wire.CONFIG
