"""Conversations a correct front-end has: negotiation, replies, rings, config, status."""

from __future__ import annotations

import pytest
import vhost_user_wire as wire
from vhost_user_wire import Dialogue, chunked, reply_to, u64, vring_addr, vring_state

from transports.vhost_user.operations import (
    Answer,
    DisableAllQueues,
    EnableQueue,
    GetStatus,
    IotlbInvalidate,
    IotlbUpdate,
    ReadConfig,
    ResetDevice,
    SetBackendChannel,
    SetCall,
    SetErr,
    SetFeatures,
    SetRingAddresses,
    SetStatus,
    StartQueue,
    StopQueue,
    WriteConfig,
)
from transports.vhost_user.session import Session
from transports.vhost_user.vrings import PACKED_BASE_INITIAL
from virtio.errors import HostError
from virtio.waist import AddressSpace, QueueSetup


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


def test_rings_stay_disabled_while_protocol_features_are_negotiated() -> None:
    d = Dialogue()
    d.negotiate()
    assert [ring.enabled for ring in d.session.state.rings] == [False, False]
    assert d.plan(18, vring_state(1, 1)) == EnableQueue(1, True)
    d.accept()
    assert [ring.enabled for ring in d.session.state.rings] == [False, True]


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


# --- rings ---


def test_kick_gives_the_back_end_the_whole_ring() -> None:
    d = Dialogue()
    d.negotiate()
    d.share_memory()
    d.set_up_ring(1, size=64, base=7)
    operation = d.plan(12, u64(1), [wire.eventfd()])
    assert isinstance(operation, StartQueue)
    assert operation.setup == QueueSetup(64, 0x1000, 0x2000, 0x3000, 7, AddressSpace.UVA)
    assert operation.kick_fd is not None
    operation.kick_fd.close()
    d.close()


def test_kick_without_a_descriptor_means_that_the_ring_is_polled() -> None:
    d = Dialogue()
    d.negotiate()
    d.share_memory()
    d.set_up_ring()
    operation = d.plan(12, u64(0 | 1 << 8))
    assert isinstance(operation, StartQueue)
    assert operation.kick_fd is None
    d.accept(True)
    assert d.session.state.rings[0].started
    d.close()


def test_a_ring_the_back_end_could_not_start_stays_stopped() -> None:
    d = Dialogue()
    d.negotiate()
    d.share_memory()
    d.set_up_ring()
    d.ask(12, u64(0), [wire.eventfd()], value=False)
    assert d.session.state.is_suspended
    d.close()


def test_call_and_err_fds_may_come_before_the_features_and_while_a_ring_runs() -> None:
    d = Dialogue()
    d.ask(3)
    d.ask(13, u64(0), [wire.eventfd()])
    d.negotiate()
    d.share_memory()
    d.set_up_ring()
    d.start_ring()
    assert d.plan(13, u64(0 | 1 << 8)) == SetCall(0, None)
    d.accept()
    assert d.plan(14, u64(1 | 1 << 8)) == SetErr(1, None)
    d.close()


def test_get_vring_base_stops_a_running_ring_and_answers_its_base() -> None:
    d = Dialogue()
    d.negotiate()
    d.share_memory()
    d.set_up_ring()
    d.start_ring()
    assert d.plan(11, vring_state(0, 0)) == StopQueue(0, None)
    assert d.accept(41) == reply_to(11, vring_state(0, 41))
    assert not d.session.state.rings[0].started
    d.close()


def test_get_vring_base_of_a_ring_that_never_ran_answers_what_was_set() -> None:
    d = Dialogue()
    d.negotiate()
    d.ask(10, vring_state(1, 9))
    assert d.plan(11, vring_state(1, 0)) == StopQueue(1, 9)


def test_a_packed_ring_begins_with_both_wrap_counters_set() -> None:
    d = Dialogue()
    d.negotiate(wire.F_VERSION_1 | wire.F_RING_PACKED | wire.F_PROTOCOL_FEATURES)
    assert d.plan(11, vring_state(0, 0)) == StopQueue(0, PACKED_BASE_INITIAL)
    d.accept(PACKED_BASE_INITIAL)
    d.ask(8, vring_state(0, 100))  # a packed ring's size need not be a power of two
    assert d.session.state.rings[0].size == 100


@chunked
def test_a_ring_stops_and_starts_again_and_again(chunk: int) -> None:
    with wire.no_fd_leaks():
        d = Dialogue(chunk)
        d.negotiate()
        d.share_memory()
        for turn in range(3):
            d.ask(2, u64(wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES))
            d.set_up_ring(size=64 << turn % 2, base=turn)
            d.start_ring()
            d.ask(18, vring_state(0, 1))
            d.ask(18, vring_state(0, 0))
            assert d.ask(11, vring_state(0, 0), value=turn + 1) == reply_to(11, vring_state(0, turn + 1))
        d.start_ring()  # without new parameters it goes on where it stopped
        assert d.session.state.rings[0].base == 3
        d.close()


def test_the_same_addresses_and_features_again_are_no_change_while_a_ring_runs() -> None:
    d = Dialogue()
    d.negotiate()
    d.share_memory()
    d.set_up_ring()
    d.start_ring()
    assert d.plan(9, vring_addr(0)) == SetRingAddresses(0, 0x1000, 0x2000, 0x3000)
    d.accept()
    d.ask(8, vring_state(0, 128))
    d.ask(2, u64(wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES))
    d.ask(16, u64(wire.ALL_PROTOCOL_FEATURES))
    d.close()


def test_a_running_ring_takes_a_new_kick_fd_without_being_set_up_again() -> None:
    d = Dialogue()
    d.negotiate()
    d.share_memory()
    d.set_up_ring()
    d.start_ring()
    operation = d.plan(12, u64(0), [wire.eventfd()])
    assert isinstance(operation, StartQueue)
    assert operation.setup is None
    d.accept(True)
    d.close()


def test_reset_owner_disables_all_rings_and_keeps_the_connection() -> None:
    d = Dialogue()
    d.negotiate()
    d.ask(18, vring_state(0, 1))
    assert d.plan(4) == DisableAllQueues()
    d.accept()
    assert not d.session.state.rings[0].enabled
    assert d.ask(17) == reply_to(17, u64(2))


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


@pytest.mark.parametrize(("request_number", "payload"), [(39, u64(0)), (34, b"")], ids=["SET_STATUS_0", "RESET_DEVICE"])
def test_reset_forgets_rings_and_features_and_keeps_the_memory(request_number: int, payload: bytes) -> None:
    d = Dialogue()
    d.negotiate()
    d.share_memory()
    d.set_up_ring()
    d.start_ring()
    d.ask(18, vring_state(0, 1))
    regions = d.session.state.memory.regions
    assert d.plan(request_number, payload) == ResetDevice(regions)
    d.accept(regions)
    state = d.session.state
    assert state.features is None
    assert (state.rings[0].started, state.rings[0].enabled, state.rings[0].size) == (False, False, None)
    assert state.memory.regions == regions
    d.ask(2, u64(wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES))
    d.set_up_ring()
    d.start_ring()
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
    operation = d.plan(12, u64(0 | 1 << 8))
    assert isinstance(operation, StartQueue)
    assert operation.setup is not None
    assert operation.setup.space is AddressSpace.IOVA
    d.close()


def test_a_translation_that_comes_after_a_reset_is_acknowledged_and_dropped() -> None:
    d = Dialogue()
    d.negotiate(wire.F_VERSION_1 | wire.F_ACCESS_PLATFORM | wire.F_PROTOCOL_FEATURES)
    d.share_memory()
    d.ask(39, u64(0))
    assert d.plan(22, wire.iotlb(2, 0x4000, 0x1000, 0x7F00_0000_2000, 3)) == Answer(0)
    assert d.accept(0) == reply_to(22, u64(0))
    d.close()
