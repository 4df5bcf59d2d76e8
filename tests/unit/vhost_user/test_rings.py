"""Rings as a correct front-end drives them: set up, started, enabled, stopped, started again."""

from __future__ import annotations

import kit.front_end.vhost_user_wire as wire
from kit.front_end.vhost_user_wire import UVA, Dialogue, chunked, reply_to, u64, vring_addr, vring_state

from transports.vhost_user.requests.negotiation import DisableAllQueues
from transports.vhost_user.requests.rings import EnableQueue, SetCall, SetErr, SetKick, SetRingAddresses, StopQueue
from transports.vhost_user.session import ConfigureQueue
from virtio.waist import PACKED_BASE_INITIAL, AddressSpace, QueueSetup


def test_rings_stay_disabled_while_protocol_features_are_negotiated() -> None:
    d = Dialogue()
    d.negotiate()
    assert [ring.enabled for ring in d.session.state.rings] == [False, False]
    assert d.plan(18, vring_state(1, 1)) == EnableQueue(1, True)
    d.accept()
    assert [ring.enabled for ring in d.session.state.rings] == [False, True]


def test_kick_gives_the_back_end_the_whole_ring() -> None:
    d = Dialogue()
    d.negotiate()
    d.share_memory()
    d.set_up_ring(1, size=64, base=7)
    operation = d.plan(12, u64(1), [wire.eventfd()])
    assert isinstance(operation, SetKick)
    assert operation.kick_fd is not None
    operation.kick_fd.close()
    d.accept()
    assert d.starts == [
        ConfigureQueue(1, QueueSetup(64, UVA + 0x1000, UVA + 0x2000, UVA + 0x3000, 7, AddressSpace.UVA))
    ]
    d.close()


def test_kick_without_a_descriptor_means_that_the_ring_is_polled() -> None:
    d = Dialogue()
    d.negotiate()
    d.share_memory()
    d.set_up_ring()
    assert d.plan(12, u64(0 | 1 << 8)) == SetKick(0, None)
    d.accept()
    assert [start.index for start in d.starts] == [0]
    d.close()


def test_a_ring_the_back_end_could_not_start_is_tried_again_when_it_is_kicked_again() -> None:
    d = Dialogue()
    d.negotiate()
    d.share_memory()
    d.set_up_ring()
    d.plan(12, u64(0 | 1 << 8))
    d.session.accept(d.planned)
    start = d.session.next_start()
    assert start is not None
    d.session.hold(start.index)
    assert d.session.next_start() is None
    d.ask(8, vring_state(0, 128))
    assert d.starts == []
    d.ask(12, u64(0 | 1 << 8))
    assert d.starts == [start]
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
    assert d.plan(11, vring_state(1, 0)) == StopQueue(1, 9, started=False)


def test_a_packed_ring_begins_with_both_wrap_counters_set() -> None:
    d = Dialogue()
    d.negotiate(wire.F_VERSION_1 | wire.F_RING_PACKED | wire.F_PROTOCOL_FEATURES)
    assert d.plan(11, vring_state(0, 0)) == StopQueue(0, PACKED_BASE_INITIAL, started=False)
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
    assert d.plan(9, vring_addr(0)) == SetRingAddresses(0, UVA + 0x1000, UVA + 0x2000, UVA + 0x3000)
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
    d.ask(12, u64(0), [wire.eventfd()])
    assert d.starts == []
    d.close()


def test_reset_owner_disables_all_rings_and_keeps_the_connection() -> None:
    d = Dialogue()
    d.negotiate()
    d.ask(18, vring_state(0, 1))
    assert d.plan(4) == DisableAllQueues()
    d.accept()
    assert not d.session.state.rings[0].enabled
    assert d.ask(17) == reply_to(17, u64(2))
