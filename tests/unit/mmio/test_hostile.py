"""Nonsense in every virtio-mmio register: nothing happens but a count and one line, whatever the order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.guest.mmio import (
    BELL,
    CONFIG,
    DRIVER_FEATURES,
    F_HYPERCALL_NOTIFY,
    F_RING_PACKED,
    F_RING_RESET,
    F_VERSION_1,
    FEATURES_OK,
    QUEUE_NUM,
    QUEUE_READY,
    QUEUE_RESET,
    QUEUE_SEL,
    STATUS,
    Performer,
)

from virtio.mmio.queues import Bells
from virtio.mmio.register_file import RegisterFile
from virtio.mmio.registers import (
    BY_OFFSET,
    REGISTERS,
    Access,
    EnableQueue,
    Notify,
    Reason,
    Register,
    Server,
    SetDriverFeatures,
    StartQueue,
    StopQueue,
    WriteConfig,
)

OFFERED = F_VERSION_1 | F_RING_PACKED | F_RING_RESET
BELLS = Bells(0x123456, (0x100, 0x101))


def performer() -> Performer:
    return Performer(
        RegisterFile(
            device_id=4,
            device_features=OFFERED,
            queue_count=2,
            queue_size_max=128,
            config_space=lambda: bytes(range(64)).ljust(256, b"\0"),
        )
    )


every_register = pytest.mark.parametrize("register", REGISTERS, ids=lambda each: each.name)


def test_the_table_names_each_register_once_in_order_and_on_a_word() -> None:
    offsets = [register.offset for register in REGISTERS]
    assert offsets == sorted(set(offsets))
    assert len({register.name for register in REGISTERS}) == len(REGISTERS)
    assert not any(offset & 3 for offset in offsets)
    assert max(offsets) < CONFIG


def test_the_vcpu_thread_serves_what_lies_on_the_way_of_every_request() -> None:
    assert {each.name for each in REGISTERS if each.server == Server.VCPU} == {
        "QueueNotify",
        "InterruptStatus",
        "InterruptACK",
    }


@every_register
@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_register_is_four_bytes_or_nothing(register: Register, size: int) -> None:
    guest = performer()
    guest.registers.offer_bells(BELLS)
    assert guest.read(register.offset, size) == 0
    assert guest.write(register.offset, 1, size) == []
    assert guest.registers.refusals == {(register.name, Reason.SIZE): 2}
    assert guest.registers.take_complaints() == [f"{register.name}: wrong size"]


@every_register
def test_a_register_is_not_reached_from_between(register: Register) -> None:
    guest = performer()
    for offset in (1, 2, 3):
        assert guest.read(register.offset + offset) == 0
        assert guest.write(register.offset + offset, 1) == []
    assert guest.registers.refusals == {(register.name, Reason.ALIGNMENT): 6}


@every_register
def test_a_register_of_one_direction_has_no_other(register: Register) -> None:
    guest = performer()
    if Access.R not in register.access:
        assert guest.read(register.offset) == 0
        assert guest.registers.refusals == {(register.name, Reason.WRITE_ONLY): 1}
    elif Access.W not in register.access:
        before = guest.read(register.offset)
        assert guest.write(register.offset, 0xFFFF_FFFF) == []
        assert guest.read(register.offset) == before
        assert guest.registers.refusals == {(register.name, Reason.READ_ONLY): 1}
    else:
        guest.read(register.offset)
        assert not {why for _, why in guest.registers.refusals} & {Reason.WRITE_ONLY, Reason.READ_ONLY}


def test_where_there_is_no_register_there_is_nothing() -> None:
    guest = performer()
    holes = [offset for offset in range(0, CONFIG, 4) if offset not in BY_OFFSET]
    assert 0x01C in holes  # GuestPageSize and the like are of version 1
    for offset in holes:
        assert guest.read(offset) == 0
        assert guest.write(offset, 0xFFFF_FFFF) == []
    assert guest.registers.refusals == {("Unknown", Reason.UNKNOWN): 2 * len(holes)}
    assert guest.registers.take_complaints() == ["Unknown: no such register"]


def test_each_register_complains_once_however_often_the_driver_starts_over() -> None:
    guest = performer()
    for _ in range(3):
        guest.write(QUEUE_SEL, 99)
        guest.write(QUEUE_NUM, 1)
        guest.write(STATUS, 0)
    assert guest.registers.take_complaints() == ["QueueSel: no such queue", "QueueNum: no such queue"]
    guest.write(QUEUE_SEL, 99)
    assert guest.registers.take_complaints() == []
    assert guest.registers.refusals["QueueSel", Reason.NO_QUEUE] == 4


# ---- any sequence ----

interesting = st.sampled_from([0, 1, 2, 3, 7, 8, 11, 15, 16, 64, 128, 129, 255, 0x1000, 0x8000_0000, 0xFFFF_FFFF])
values = st.one_of(interesting, st.integers(0, 2**64 - 1))
offsets = st.one_of(
    st.sampled_from([register.offset for register in REGISTERS]),
    st.sampled_from([STATUS, QUEUE_SEL, QUEUE_NUM, QUEUE_READY, QUEUE_RESET, DRIVER_FEATURES, BELL]),
    st.integers(0, 0x1000),
)
accesses = st.tuples(
    st.sampled_from(["read", "write", "write", "write", "hold", "finish", "fail", "offer", "withhold", "broken"]),
    offsets,
    st.sampled_from([4, 4, 4, 4, 1, 2, 8, 3, 0, 16]),
    values,
)


def check(guest: Performer, offset: int, operations: Sequence[object]) -> None:
    for operation in operations:
        match operation:
            case StartQueue(index=index, setup=setup):
                assert 0 <= index < 2
                assert 1 <= setup.size <= 128
                assert guest.registers.status & FEATURES_OK
            case EnableQueue(index=index) | StopQueue(index=index) | Notify(index=index):
                assert 0 <= index < 2
            case SetDriverFeatures(bits=bits):
                assert bits & F_VERSION_1
                assert not bits & ~OFFERED
            case WriteConfig(offset=at, data=data):
                assert 0 <= at <= at + len(data) <= 256
                assert 1 <= len(data) <= 4


@settings(max_examples=400, deadline=None)
@given(st.booleans(), st.lists(accesses, max_size=60))
def test_no_sequence_of_accesses_raises_or_asks_for_what_must_not_be(
    started: bool, script: list[tuple[str, int, int, int]]
) -> None:
    """``Performer`` checks what is carried out: no queue is started twice, none is stopped that does not run, and none
    consumes buffers before DRIVER_OK."""
    guest = performer()
    if started:
        guest.registers.offer_bells(BELLS)
        guest.start(OFFERED | F_HYPERCALL_NOTIFY, queues=2)
    for what, offset, size, value in script:
        match what:
            case "read":
                assert 0 <= guest.read(offset, size) < 1 << 64
            case "write":
                check(guest, offset, guest.write(offset, value, size))
            case "hold":
                guest.held = True
            case "finish" | "fail":
                guest.fails = StartQueue if what == "fail" else None
                guest.held = False
                guest.finish()
            case "offer":
                guest.registers.offer_bells(BELLS)
            case "withhold":
                guest.registers.withhold_bells()
            case "broken":
                guest.registers.needs_reset()
        assert all(index in guest.started for index in guest.running)
        assert not guest.running or guest.held or guest.registers.driver_ok
    assert len(guest.registers.refusals) <= (len(REGISTERS) + 2) * len(Reason)
    assert len(guest.registers.take_complaints()) <= len(REGISTERS) + 2
    # Whatever it was, an honest driver can use the device afterwards.
    guest.fails = None
    guest.held = False
    guest.finish()
    guest.start(queues=2)
    assert guest.running == {0, 1}
