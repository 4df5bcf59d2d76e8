"""The queues of virtio-mmio (virtio 1.3, 4.2.2 and 4.2.3.2): set up, started, stopped and reset by registers."""

from __future__ import annotations

import pytest
from kit.guest.mmio import (
    ACKNOWLEDGE,
    AREAS,
    DRIVER,
    DRIVER_OK,
    F_RING_PACKED,
    F_RING_RESET,
    F_VERSION_1,
    FEATURES_OK,
    NEEDS_RESET,
    QUEUE_NUM,
    QUEUE_READY,
    QUEUE_RESET,
    QUEUE_SEL,
    STATUS,
    Performer,
)

from virtio.mmio.register_file import RegisterFile
from virtio.mmio.registers import Reason, StartQueue, StopQueue

OFFERED = F_VERSION_1 | F_RING_PACKED | F_RING_RESET
NEGOTIATED = ACKNOWLEDGE | DRIVER | FEATURES_OK


def performer() -> Performer:
    return Performer(
        RegisterFile(
            device_id=2,
            device_features=OFFERED,
            queue_count=2,
            queue_size_max=256,
            config_space=lambda: b"",
        )
    )


# ---- setting up ----


def test_queue_ready_reads_back_only_what_is_done() -> None:
    guest = performer()
    assert guest.negotiate(F_VERSION_1)
    guest.held = True
    guest.set_up(0, 8, (0x1000, 0x2000, 0x3000))
    assert guest.read(QUEUE_READY) == 0
    guest.finish()
    assert guest.read(QUEUE_READY) == 1
    assert guest.write(QUEUE_READY, 0) == [StopQueue(0)]
    assert guest.read(QUEUE_READY) == 1
    assert guest.write(QUEUE_READY, 1) == []
    assert guest.write(QUEUE_READY, 0) == []
    assert guest.registers.refusals == {("QueueReady", Reason.QUEUE_IN_USE): 2}
    guest.finish()
    assert guest.read(QUEUE_READY) == 0


def test_driver_ok_enables_a_queue_whose_start_is_still_under_way() -> None:
    guest = performer()
    assert guest.negotiate(F_VERSION_1)
    guest.held = True
    guest.set_up(0, 8, (0x1000, 0x2000, 0x3000))
    guest.driver_ok()
    guest.finish()
    assert guest.running == {0}


def test_a_queue_that_cannot_be_set_up_needs_a_reset_and_is_not_ready() -> None:
    guest = performer()
    assert guest.negotiate(F_VERSION_1)
    guest.fails = StartQueue
    guest.set_up(0, 7, (0x1001, 0x2000, 0x3000))
    assert guest.read(QUEUE_READY) == 0
    assert guest.read(STATUS) == NEGOTIATED | NEEDS_RESET
    guest.fails = None
    guest.start(queues=2)
    assert guest.read(STATUS) == NEGOTIATED | DRIVER_OK


@pytest.mark.parametrize("size", [0, 257, 0x1_0000, 0xFFFF_FFFF])
def test_a_queue_of_impossible_size_is_not_made_ready(size: int) -> None:
    guest = performer()
    assert guest.negotiate(F_VERSION_1)
    guest.write(QUEUE_SEL, 0)
    guest.write(QUEUE_NUM, size)
    assert guest.write(QUEUE_READY, 1) == []
    assert guest.read(QUEUE_READY) == 0
    assert guest.registers.take_complaints() == [f"QueueReady: QueueNum {size} is not 1 to 256"]


def test_a_queue_is_not_made_ready_before_features_are_settled() -> None:
    guest = performer()
    guest.write(STATUS, ACKNOWLEDGE | DRIVER)
    assert guest.set_up(0, 8, (0x1000, 0x2000, 0x3000)) == []
    assert guest.registers.refusals == {("QueueReady", Reason.ORDER): 1}


def test_the_setup_of_a_queue_in_use_does_not_change() -> None:
    guest = performer()
    guest.start()
    guest.write(QUEUE_SEL, 0)
    for register in (QUEUE_NUM, *AREAS, *(area + 4 for area in AREAS)):
        assert guest.write(register, 0x10) == []
    assert sum(guest.registers.refusals.values()) == 7
    assert {reason for _, reason in guest.registers.refusals} == {Reason.QUEUE_IN_USE}


def test_settings_of_a_queue_that_does_not_exist_go_nowhere() -> None:
    guest = performer()
    assert guest.negotiate(F_VERSION_1)
    guest.write(QUEUE_SEL, 0xFFFF_FFFF)
    for register in (QUEUE_NUM, QUEUE_READY, *AREAS):
        assert guest.write(register, 1) == []
    assert guest.registers.refusals == {
        (name, Reason.NO_QUEUE): 1
        for name in ("QueueSel", "QueueNum", "QueueReady", "QueueDescLow", "QueueDriverLow", "QueueDeviceLow")
    }


# ---- QueueReset ----


def test_one_queue_is_reset_and_set_up_again_while_the_others_run() -> None:
    guest = performer()
    guest.start(F_VERSION_1 | F_RING_RESET, queues=2)
    guest.write(QUEUE_SEL, 1)
    guest.held = True
    assert guest.write(QUEUE_RESET, 1) == [StopQueue(1)]
    assert (guest.read(QUEUE_RESET), guest.read(QUEUE_READY)) == (1, 1)
    guest.finish()
    assert (guest.read(QUEUE_RESET), guest.read(QUEUE_READY)) == (0, 0)
    guest.held = False
    guest.set_up(1, 16, (0x7000, 0x8000, 0x9000))
    assert guest.running == {0, 1}
    assert guest.read(QUEUE_RESET) == 0


def test_a_queue_reset_that_was_not_negotiated_or_makes_no_sense_does_nothing() -> None:
    guest = performer()
    guest.start()
    guest.write(QUEUE_SEL, 0)
    assert guest.read(QUEUE_RESET) == 0
    assert guest.write(QUEUE_RESET, 1) == []
    guest.start(F_VERSION_1 | F_RING_RESET)
    for index, value in ((0, 0), (0, 2), (1, 1), (2, 1)):
        guest.write(QUEUE_SEL, index)
        assert guest.write(QUEUE_RESET, value) == []
    refused = {reason: count for (name, reason), count in guest.registers.refusals.items() if name == "QueueReset"}
    assert refused == {Reason.ORDER: 2, Reason.VALUE: 2, Reason.QUEUE_NOT_READY: 1, Reason.NO_QUEUE: 1}
