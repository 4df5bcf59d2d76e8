"""The order of messages is what front-ends really send: what harms nobody is taken. In bytes, without a back-end."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable

import kit.front_end.vhost_user_wire as wire
import pytest
from kit.front_end.vhost_user_wire import MIB, UVA, Dialogue, chunked, reply_to, u64, vring_addr, vring_state

from transports.vhost_user.requests.config_space import ReadConfig
from transports.vhost_user.requests.memory import SetMemory
from transports.vhost_user.requests.negotiation import SetFeatures, SetProtocolFeatures
from transports.vhost_user.requests.operation import Answer, Refuse
from transports.vhost_user.requests.rings import (
    EnableQueue,
    SetKick,
    SetRingAddresses,
    SetRingBase,
    SetRingSize,
    StopQueue,
)
from transports.vhost_user.requests.table import MESSAGES
from transports.vhost_user.wire.message import UNSUPPORTED
from virtio.waist import AddressSpace, QueueSetup

FEATURES = wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES
PACKED = FEATURES | wire.F_RING_PACKED
WHOLE = QueueSetup(128, UVA + 0x1000, UVA + 0x2000, UVA + 0x3000, 7, AddressSpace.UVA)
KICK = u64(0 | 1 << 8)  # without a descriptor


def starts(d: Dialogue) -> list[QueueSetup]:
    return [start.setup for start in d.starts]


def started(features: int = FEATURES, *, enabled: bool, base: int = 7) -> Dialogue:
    """A connection whose ring 0 the back-end has."""
    d = Dialogue()
    d.negotiate(features)
    d.share_memory()
    if enabled:
        d.ask(18, vring_state(0, 1))
    d.set_up_ring(base=base)
    d.ask(12, KICK)
    assert len(d.starts) == 1
    return d


# --- payloads ---


@chunked
def test_a_memory_table_with_room_for_more_regions_than_it_announces_is_taken(chunk: int) -> None:
    """User-mode Linux 6.1 sends room for two and announces one."""
    with wire.no_fd_leaks():
        d = Dialogue(chunk)
        d.negotiate()
        for spare in (32, 7 * 32, 1, 17):
            table = wire.mem_table(wire.region(0, MIB, UVA), count=1) + b"\xff" * spare
            old = d.session.state.memory.regions
            assert d.ask(5, table, [wire.memfd()], need_reply=True) == reply_to(5, u64(0))
            assert [region.size for region in d.session.state.memory.regions] == [MIB]
            for one in old:
                one.fd.close()
        d.close()


def test_a_memory_table_of_no_region_takes_all_memory_back() -> None:
    with wire.no_fd_leaks():
        d = Dialogue()
        d.negotiate()
        d.share_memory()
        (old,) = d.session.state.memory.regions
        assert d.plan(5, wire.mem_table()) == SetMemory(())
        d.accept()
        old.fd.close()


def least(number: int) -> bytes:
    """The shortest payload of a request that makes sense."""
    payload = bytearray(MESSAGES[number].sizes[0])
    match number:
        case 8:
            payload[:] = vring_state(0, 128)
        case 12 | 13 | 14:
            payload[:] = KICK
        case 24:
            struct.pack_into("=I", payload, 4, 8)  # 8 bytes, which it need not bring
        case 25:
            payload[:] = wire.config(0, b"x")
        case 37 | 38:
            payload[:] = wire.single_region(0, MIB, UVA)
    return bytes(payload)


@pytest.mark.parametrize("number", MESSAGES)
def test_what_a_payload_has_beyond_its_shape_means_nothing(number: int) -> None:
    row = MESSAGES[number]
    with wire.no_fd_leaks():
        found = []
        for excess in (b"", b"\xff", b"\xff" * 100):
            d = Dialogue(is_network_interface=True, inband_notifications=True)
            d.negotiate()
            d.share_memory()
            operation = d.plan(number, least(number) + excess, wire.eventfds(row.fds[0]))
            for fd in d.planned.fds:
                fd.close()
            assert not isinstance(operation, Refuse) or number == 22  # no IOMMU
            found.append(type(operation) if row.fds[0] else operation)
            d.close()
        assert found[0] == found[1] == found[2]


def test_a_config_access_may_bring_more_or_to_be_read_fewer_bytes_than_it_announces() -> None:
    d = Dialogue()
    d.negotiate()
    assert d.plan(24, wire.config(8, b"", size=4)) == ReadConfig(8, 4, 0)
    assert d.accept(b"abcd") == reply_to(24, wire.config(8, b"abcd"))
    assert d.plan(24, wire.config(8, bytes(60), size=4)) == ReadConfig(8, 4, 0)


# --- before owner, features, protocol features ---


@pytest.mark.parametrize("number", MESSAGES)
def test_no_request_needs_owner_features_or_protocol_features_before_it(number: int) -> None:
    """DPDK's server mode sends SET_OWNER once in three connections, and SET_STATUS before it negotiates."""
    row = MESSAGES[number]
    with wire.no_fd_leaks():
        d = Dialogue(is_network_interface=True, inband_notifications=True)
        operation = d.plan(number, least(number), wire.eventfds(row.fds[0]))
        assert isinstance(operation, Refuse) == (number == 22)  # no IOMMU
        for fd in d.planned.fds:
            fd.close()
        d.session.close()


def test_a_reply_is_sent_to_whoever_asks_for_one() -> None:
    """libvhost-user and DPDK answer without REPLY_ACK; a front-end that asked would wait for ever."""
    d = Dialogue()
    assert d.ask(8, vring_state(0, 64), need_reply=True) == reply_to(8, u64(0))
    d.negotiate(protocol=0)
    assert d.ask(8, vring_state(0, 64), need_reply=True) == reply_to(8, u64(0))


def test_owner_features_and_protocol_features_may_be_set_again() -> None:
    d = started(enabled=True)
    for _ in range(2):
        assert d.ask(3, need_reply=True) == reply_to(3, u64(0))
        assert d.plan(2, u64(FEATURES)) == SetFeatures(FEATURES, enable_all=False)
        d.accept({})
        assert d.plan(16, u64(wire.ALL_PROTOCOL_FEATURES)) == SetProtocolFeatures(wire.ALL_PROTOCOL_FEATURES)
        d.accept()
    fewer = wire.ALL_PROTOCOL_FEATURES & ~wire.MQ
    assert d.plan(16, u64(fewer)) == SetProtocolFeatures(fewer)
    d.accept()
    assert "cannot change while a ring runs" in d.violate(16, u64(wire.MQ))  # where addresses are translated or not
    assert d.starts == []
    d.close()


# --- refusals ---


@pytest.mark.parametrize("number", [*UNSUPPORTED, 0, 44, 1000, 2**32 - 1])
@chunked
def test_a_request_that_is_not_served_is_refused_and_the_conversation_goes_on(number: int, chunk: int) -> None:
    with wire.no_fd_leaks():
        d = Dialogue(chunk)
        d.negotiate()
        operation = d.plan(number, bytes(300), wire.eventfds(3), need_reply=True)
        assert isinstance(operation, Refuse)
        assert d.reject() == reply_to(number, u64(1))
        assert d.ask(17) == reply_to(17, u64(2))


@pytest.mark.parametrize(
    ("number", "payload"),
    [
        (2, u64(1 << 63)),
        (8, vring_state(9, 64)),
        (9, vring_addr(0, flags=1)),
        (12, u64(9 | 1 << 8)),
        (18, vring_state(9, 1)),
        (37, wire.single_region(0, 0, UVA)),
        (39, u64(0x100)),
    ],
)
def test_what_a_rule_forbids_is_refused_where_that_can_be_said(number: int, payload: bytes) -> None:
    with wire.no_fd_leaks():
        d = Dialogue()
        d.negotiate()
        fds = wire.eventfds(MESSAGES[number].fds[0])
        assert isinstance(d.plan(number, payload, fds, need_reply=True), Refuse)
        assert d.reject() == reply_to(number, u64(1))
        assert d.ask(17) == reply_to(17, u64(2))


# --- a ring for the first time ---

STEPS: dict[str, Callable[[Dialogue], None]] = {
    "NUM": lambda d: void(d.ask(8, vring_state(0, 128))),
    "BASE": lambda d: void(d.ask(10, vring_state(0, 7))),
    "ADDR": lambda d: void(d.ask(9, vring_addr(0))),
    "KICK": lambda d: void(d.ask(12, KICK)),
    "ENABLE": lambda d: void(d.ask(18, vring_state(0, 1))),
    "FEATURES": lambda d: void(d.ask(2, u64(FEATURES))),
    "MEMORY": lambda d: d.share_memory(),
}


def void(reply: bytes) -> None:
    assert reply == b""


ORDERS = list(itertools.permutations(["NUM", "BASE", "ADDR"]))


def test_a_ring_runs_whole_in_whatever_order_its_parts_come() -> None:
    """All 5,040 orders. Where the base comes after a start at 0, the ring is started again."""
    for order in itertools.permutations(STEPS):
        d = Dialogue()
        last: list[QueueSetup] = []
        for step in order:
            STEPS[step](d)
            assert all(start.size == 128 and start.desc == WHOLE.desc for start in starts(d))
            last = starts(d) or last
        ring = d.session.state.rings[0]
        assert (last, ring.started, ring.enabled, ring.configured) == ([WHOLE], True, True, True), order
        d.close()


@pytest.mark.parametrize(
    "features", [FEATURES, wire.F_VERSION_1], ids=["protocol_features", "without_protocol_features"]
)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_a_ring_whose_kick_came_first_waits_for_everything_else(order: tuple[str, ...], features: int) -> None:
    d = Dialogue()
    d.ask(2, u64(features))
    d.share_memory()
    d.ask(18, vring_state(0, 1))
    d.ask(12, KICK)
    for step in order:
        assert d.starts == []
        STEPS[step](d)
    assert starts(d) == [WHOLE]
    d.close()


def test_a_ring_whose_kick_came_first_and_whose_base_never_comes_starts_when_it_is_enabled() -> None:
    d = Dialogue()
    d.ask(2, u64(FEATURES))
    d.share_memory()
    for step in ("KICK", "NUM", "ADDR"):
        STEPS[step](d)
        assert d.starts == []
    STEPS["ENABLE"](d)
    assert [setup.base for setup in starts(d)] == [0]
    d.close()


def test_a_ring_waits_for_memory_and_no_longer() -> None:
    """A ring outside of what is shared is the driver's mistake, which breaks its queue where it can be told."""
    d = Dialogue()
    d.negotiate()
    d.set_up_ring(base=7)
    d.ask(12, KICK)
    state = d.session.state
    assert state.waits_for(state.rings[0]) == "memory"
    d.ask(37, wire.single_region(MIB, MIB, UVA + MIB), [wire.memfd()])
    assert starts(d) == [WHOLE]
    d.close()


def test_every_ring_that_waited_starts_with_the_features() -> None:
    d = Dialogue(queue_count=3)
    d.share_memory()
    for index in (0, 2):
        d.set_up_ring(index)
        d.ask(12, u64(index | 1 << 8))
        assert d.starts == []
    d.ask(2, u64(wire.F_VERSION_1))
    assert [start.index for start in d.starts] == [0, 2]
    assert all(ring.enabled for ring in d.session.state.rings)
    d.close()


def test_a_size_that_only_packed_rings_have_may_come_before_the_features() -> None:
    d = Dialogue()
    d.ask(8, vring_state(0, 100))
    d.negotiate(PACKED)
    d.share_memory()
    d.ask(9, vring_addr(0))
    d.ask(12, KICK)
    assert [(setup.size, setup.base) for setup in starts(d)] == [(100, 0x8000_8000)]
    d.close()


# --- ENABLE and GET_VRING_BASE ---


@pytest.mark.parametrize("value", [1, 2, 2**32 - 1])
def test_any_value_but_0_enables_as_peers_take_it(value: int) -> None:
    d = Dialogue()
    assert d.plan(18, vring_state(1, value)) == EnableQueue(1, True)
    d.accept()
    assert d.plan(18, vring_state(1, 0)) == EnableQueue(1, False)


def test_a_connection_may_open_with_enable_0_and_get_vring_base() -> None:
    """DPDK's virtio-user in server mode, when its back-end came back."""
    d = Dialogue()
    for index in (0, 1):
        d.ask(18, vring_state(index, 0))
        assert d.plan(11, vring_state(index, 0)) == StopQueue(index, 0, started=False)
        assert d.accept(0) == reply_to(11, vring_state(index, 0))


def test_a_ring_that_is_not_whole_can_be_stopped() -> None:
    d = Dialogue()
    d.negotiate()
    d.ask(10, vring_state(0, 9))
    d.ask(12, KICK)
    assert d.plan(11, vring_state(0, 0)) == StopQueue(0, 9)
    assert d.accept(9) == reply_to(11, vring_state(0, 9))
    assert not d.session.state.rings[0].started


def test_without_protocol_features_a_kick_starts_the_ring_enabled() -> None:
    """So it does after RESET_OWNER, which has disabled all."""
    d = Dialogue()
    d.ask(2, u64(wire.F_VERSION_1))
    d.ask(4)
    assert d.plan(12, KICK) == SetKick(0, None, enable=True)
    d.accept()
    assert d.session.state.rings[0].enabled
    assert not d.session.state.rings[1].enabled


# --- a ring that is started already ---


def test_the_same_values_again_are_no_change_for_a_ring_that_runs() -> None:
    d = started(PACKED, enabled=True, base=0x8007_8007)
    assert d.plan(8, vring_state(0, 128)) == SetRingSize(0, 128)
    d.accept()
    assert d.plan(10, vring_state(0, 0x8007_8007)) == SetRingBase(0, 0x8007_8007)
    d.accept()
    assert d.plan(9, vring_addr(0)) == SetRingAddresses(0, UVA + 0x1000, UVA + 0x2000, UVA + 0x3000)
    d.accept()
    assert d.starts == []
    d.close()


@pytest.mark.parametrize("again", ["KICK", "ENABLE"])
def test_a_base_restarts_a_ring_that_is_started_but_disabled(again: str) -> None:
    """User-mode Linux, when a driver is unbound and bound again; the same after RESET_OWNER."""
    for disable in (wire.message(18, vring_state(0, 0)), wire.message(4)):
        d = started(enabled=True)
        d.ask(int.from_bytes(disable[:4], "little"), disable[12:])
        d.ask(2, u64(FEATURES))
        d.ask(8, vring_state(0, 128))
        assert d.plan(10, vring_state(0, 0)) == SetRingBase(0, 0, suspend=True)
        d.accept(55)
        d.ask(9, vring_addr(0))
        assert d.starts == []
        STEPS[again](d)
        assert [setup.base for setup in starts(d)] == [0]
        d.close()


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_a_ring_that_runs_is_drained_first_and_starts_again_when_all_of_it_was_said_again(
    order: tuple[str, ...],
) -> None:
    messages = {
        "NUM": (8, vring_state(0, 64)),
        "BASE": (10, vring_state(0, 3)),
        "ADDR": (9, vring_addr(0, desc=UVA + 0x9000)),
    }
    d = started(enabled=True)
    suspended = []
    for step in order:
        operation = d.plan(*messages[step])
        assert isinstance(operation, SetRingSize | SetRingAddresses | SetRingBase)
        suspended.append(operation.suspend)
        d.accept(40)
    assert suspended[0]
    assert starts(d) == [QueueSetup(64, UVA + 0x9000, UVA + 0x2000, UVA + 0x3000, 3, AddressSpace.UVA)]
    d.close()


def test_a_size_alone_waits_for_the_next_kick_and_the_ring_goes_on_where_it_stood() -> None:
    d = started(enabled=True)
    assert d.plan(8, vring_state(0, 64)) == SetRingSize(0, 64, suspend=True)
    d.accept(41)
    assert d.starts == []
    d.ask(12, KICK)
    assert [(setup.size, setup.base) for setup in starts(d)] == [(64, 41)]
    d.close()


def test_a_suspended_ring_that_is_stopped_answers_where_it_stood() -> None:
    d = started(enabled=True)
    d.plan(8, vring_state(0, 64))
    d.accept(41)
    assert d.plan(11, vring_state(0, 0)) == StopQueue(0, 41)
    assert d.accept(41) == reply_to(11, vring_state(0, 41))
    d.close()


def test_a_new_kick_or_call_or_err_moves_no_ring() -> None:
    d = started(enabled=True)
    for number in (12, 13, 14):
        d.ask(number, KICK)
        assert d.starts == []
    d.close()


# --- features of rings that run ---


@pytest.mark.parametrize("enabled", [True, False])
def test_other_features_drain_the_rings_first_and_they_go_on_where_they_stood(enabled: bool) -> None:
    d = started(enabled=enabled)
    assert d.plan(2, u64(FEATURES | 1 << 29)) == SetFeatures(FEATURES | 1 << 29, enable_all=False, suspend=(0,))
    d.accept({0: 50})
    if not enabled:
        assert d.starts == []
        d.ask(18, vring_state(0, 1))
    assert [setup.base for setup in starts(d)] == [50]
    d.close()


@pytest.mark.parametrize("other", [PACKED, FEATURES | wire.F_ACCESS_PLATFORM], ids=["format", "space"])
def test_a_ring_of_another_format_or_space_waits_for_the_front_ends_word(other: int) -> None:
    d = started(enabled=True)
    d.plan(2, u64(other))
    d.accept({0: 50})
    assert d.starts == []
    d.set_up_ring(base=0x8000_8000 if other == PACKED else 0)
    assert len(d.starts) == 1
    d.close()


# --- memory ---


def test_a_region_that_is_there_already_is_taken_and_another_file_replaces_it() -> None:
    with wire.no_fd_leaks():
        d = started(enabled=True)
        (old,) = d.session.state.memory.regions
        again = wire.single_region(0, MIB, UVA)
        assert d.plan(37, again, [old.fd.duplicate().detach()]) == Answer(0)
        assert d.accept() == b""
        operation = d.plan(37, again, [wire.memfd()])
        assert isinstance(operation, SetMemory)
        assert [one is old for one in operation.regions] == [False]
        d.accept()
        old.fd.close()
        d.close()


def test_a_table_may_overlap_the_one_it_replaces_while_rings_run() -> None:
    with wire.no_fd_leaks():
        d = started(enabled=True)
        (old,) = d.session.state.memory.regions
        d.ask(5, wire.mem_table(wire.region(0, 2 * MIB, UVA)), [wire.memfd(2 * MIB)])
        assert [one.size for one in d.session.state.memory.regions] == [2 * MIB]
        assert d.starts == []
        old.fd.close()
        d.close()
