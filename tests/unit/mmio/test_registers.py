"""virtio-mmio's registers (virtio 1.3, 4.2.2): an honest driver's way, features, status, config space; rule by rule."""

from __future__ import annotations

import pytest
from kit.guest.mmio import (
    ACKNOWLEDGE,
    CONFIG,
    DEVICE_FEATURES,
    DEVICE_FEATURES_SEL,
    DEVICE_ID,
    DRIVER,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    DRIVER_OK,
    F_ACCESS_PLATFORM,
    F_HYPERCALL_NOTIFY,
    F_NOTIFICATION_DATA,
    F_RING_PACKED,
    F_RING_RESET,
    F_VERSION_1,
    FAILED,
    FEATURES_OK,
    GENERATION,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    MAGIC,
    NEEDS_RESET,
    QUEUE_NOTIFY,
    QUEUE_NUM_MAX,
    QUEUE_READY,
    QUEUE_SEL,
    SHM_LEN,
    SHM_SEL,
    STATUS,
    VERSION,
    Performer,
)

from virtio.mmio.register_file import RegisterFile
from virtio.mmio.registers import (
    AcknowledgeInterrupt,
    EnableQueue,
    Notify,
    Reason,
    Reset,
    SetDriverFeatures,
    SetStatus,
    StartQueue,
    WriteConfig,
)
from virtio.waist import AddressSpace, QueueSetup

OFFERED = F_VERSION_1 | F_RING_PACKED | F_RING_RESET | 1 << 5
NEGOTIATED = ACKNOWLEDGE | DRIVER | FEATURES_OK


class Space:
    """A config space that a test changes."""

    def __init__(self, data: bytes = bytes(range(1, 61))) -> None:
        self.data = data.ljust(256, b"\0")

    def __call__(self) -> bytes:
        return self.data


def performer(features: int = OFFERED, queues: int = 2, space: Space | None = None, interrupts: int = 0) -> Performer:
    return Performer(
        RegisterFile(
            device_id=2,
            device_features=features,
            queue_count=queues,
            queue_size_max=256,
            config_space=space or Space(),
            interrupt_status=lambda: interrupts,
        )
    )


# ---- an honest driver ----


def test_identity_is_that_of_a_modern_virtio_mmio_device() -> None:
    guest = performer()
    assert guest.read(MAGIC).to_bytes(4, "little") == b"virt"
    assert guest.read(VERSION) == 2
    assert guest.read(DEVICE_ID) == 2


def test_a_driver_that_follows_the_order_gets_its_queues_started_and_then_enabled() -> None:
    guest = performer()
    assert guest.negotiate(F_VERSION_1)
    guest.set_up(0, 128, (0x1_2345_6000, 0x2_3456_7008, 0x3_4567_800C))
    guest.set_up(1, 256, (0x4000, 0x5000, 0x6000))
    assert not any(isinstance(each, EnableQueue) for each in guest.done)  # 2.1.2: nothing is consumed before DRIVER_OK
    guest.driver_ok()
    assert guest.read(STATUS) == NEGOTIATED | DRIVER_OK
    assert guest.done == [
        Reset(),
        SetStatus(ACKNOWLEDGE),
        SetStatus(ACKNOWLEDGE | DRIVER),
        SetDriverFeatures(F_VERSION_1),
        SetStatus(NEGOTIATED),
        StartQueue(0, QueueSetup(128, 0x1_2345_6000, 0x2_3456_7008, 0x3_4567_800C, 0, AddressSpace.GPA)),
        StartQueue(1, QueueSetup(256, 0x4000, 0x5000, 0x6000, 0, AddressSpace.GPA)),
        SetStatus(NEGOTIATED | DRIVER_OK),
        EnableQueue(0),
        EnableQueue(1),
    ]
    assert not guest.registers.refusals
    assert guest.registers.take_complaints() == []


def test_a_packed_ring_begins_with_both_wrap_counters_at_one() -> None:
    guest = performer()
    assert guest.negotiate(F_VERSION_1 | F_RING_PACKED)
    (start,) = guest.set_up(0, 5, (0x1000, 0x2000, 0x3000))
    assert isinstance(start, StartQueue)
    assert start.setup.base == 0x8000_8000


def test_a_queue_set_up_after_driver_ok_is_enabled_at_once() -> None:
    guest = performer()
    guest.start(queues=1)
    operations = guest.set_up(1, 8, (0x4000, 0x5000, 0x6000))
    assert [type(each) for each in operations] == [StartQueue, EnableQueue]


def test_a_queue_that_does_not_exist_reads_as_absent() -> None:
    guest = performer()
    guest.write(QUEUE_SEL, 2)
    assert (guest.read(QUEUE_NUM_MAX), guest.read(QUEUE_READY)) == (0, 0)
    guest.write(QUEUE_SEL, 1)
    assert guest.read(QUEUE_NUM_MAX) == 256


def test_shared_memory_regions_have_no_length() -> None:
    guest = performer()
    guest.write(SHM_SEL, 3)
    assert [guest.read(each) for each in (*SHM_LEN, 0x0B8, 0x0BC)] == [0xFFFF_FFFF] * 4


def test_doorbells_and_acknowledgements_that_nobody_took_on_the_way_are_operations() -> None:
    guest = performer(interrupts=3)
    assert guest.read(INTERRUPT_STATUS) == 3
    assert guest.write(INTERRUPT_ACK, 1) == [AcknowledgeInterrupt(1)]
    assert guest.write(QUEUE_NOTIFY, 1) == [Notify(1)]
    assert guest.write(QUEUE_NOTIFY, 2) == []
    assert guest.registers.refusals == {("QueueNotify", Reason.NO_QUEUE): 1}


# ---- features ----


def test_features_are_read_word_by_word_and_end_after_the_second() -> None:
    guest = performer()
    assert guest.features() == OFFERED
    for beyond in (2, 3, 0xFFFF_FFFF):
        guest.write(DEVICE_FEATURES_SEL, beyond)
        assert guest.read(DEVICE_FEATURES) == 0


def test_what_this_transport_cannot_do_is_not_offered() -> None:
    guest = performer(OFFERED | F_NOTIFICATION_DATA | F_HYPERCALL_NOTIFY)
    assert guest.features() == OFFERED


def test_access_platform_is_offered_where_the_device_does_and_accepted() -> None:
    """There is no IOMMU: what the platform translates an address to is the address."""
    guest = performer(OFFERED | F_ACCESS_PLATFORM)
    assert guest.features() == OFFERED | F_ACCESS_PLATFORM
    assert guest.negotiate(F_VERSION_1 | F_ACCESS_PLATFORM)


@pytest.mark.parametrize("accepted", [0, 1 << 5, F_VERSION_1 | 1 << 6, F_VERSION_1 | F_ACCESS_PLATFORM], ids=hex)
def test_features_not_offered_or_not_modern_are_answered_by_the_absence_of_features_ok(accepted: int) -> None:
    guest = performer()
    assert not guest.negotiate(accepted)
    assert guest.read(STATUS) == ACKNOWLEDGE | DRIVER
    assert guest.registers.refusals == {("Status", Reason.FEATURES): 1}
    assert not any(isinstance(each, SetDriverFeatures) for each in guest.done)
    guest.write(STATUS, ACKNOWLEDGE | DRIVER | FAILED)  # what a driver does then
    assert guest.read(STATUS) == ACKNOWLEDGE | DRIVER | FAILED
    assert guest.negotiate(F_VERSION_1)


def test_bits_beyond_the_sixty_fourth_may_not_be_accepted() -> None:
    guest = performer()
    guest.write(STATUS, ACKNOWLEDGE | DRIVER)
    for word, bits in ((1, 1), (2, 0), (7, 1)):
        guest.write(DRIVER_FEATURES_SEL, word)
        guest.write(DRIVER_FEATURES, bits)
    guest.write(STATUS, NEGOTIATED)
    assert not guest.read(STATUS) & FEATURES_OK


def test_accepted_features_stand_until_a_reset() -> None:
    guest = performer()
    assert guest.negotiate(F_VERSION_1)
    guest.write(DRIVER_FEATURES, 0)
    assert guest.registers.refusals == {("DriverFeatures", Reason.ORDER): 1}
    assert guest.negotiate(F_VERSION_1 | 1 << 5)
    assert guest.done[-2] == SetDriverFeatures(F_VERSION_1 | 1 << 5)


def test_features_the_device_refuses_after_all_are_taken_back() -> None:
    guest = performer()
    guest.fails = SetDriverFeatures
    assert not guest.negotiate(F_VERSION_1)


# ---- status ----


def test_a_status_bit_once_set_stays_until_a_reset() -> None:
    guest = performer()
    guest.start()
    guest.write(STATUS, ACKNOWLEDGE)
    assert guest.read(STATUS) == NEGOTIATED | DRIVER_OK
    assert guest.registers.refusals == {("Status", Reason.VALUE): 1}
    guest.write(STATUS, 0)
    assert guest.read(STATUS) == 0


def test_driver_ok_without_features_ok_is_not_taken() -> None:
    guest = performer()
    guest.write(STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert guest.read(STATUS) == ACKNOWLEDGE | DRIVER
    assert guest.registers.refusals == {("Status", Reason.ORDER): 1}


def test_a_driver_cannot_set_the_devices_own_bit_nor_one_without_meaning() -> None:
    guest = performer()
    guest.write(STATUS, ACKNOWLEDGE | NEEDS_RESET | 16 | 32 | 0xFF00)
    assert guest.read(STATUS) == ACKNOWLEDGE


def test_the_need_for_a_reset_shows_until_there_is_one() -> None:
    guest = performer()
    guest.start()
    guest.registers.needs_reset()
    guest.write(STATUS, NEGOTIATED | DRIVER_OK)
    assert guest.read(STATUS) == NEGOTIATED | DRIVER_OK | NEEDS_RESET
    guest.write(STATUS, 0)
    assert guest.read(STATUS) == 0


def test_status_reads_zero_only_when_the_reset_is_done() -> None:
    guest = performer()
    guest.start()
    guest.held = True
    assert guest.write(STATUS, 0) == [Reset()]
    assert guest.read(STATUS) == NEGOTIATED | DRIVER_OK
    assert guest.write(STATUS, ACKNOWLEDGE) == []
    assert guest.write(CONFIG, 1, 1) == []
    assert guest.registers.refusals == {("Status", Reason.BUSY): 1, ("Config", Reason.BUSY): 1}
    guest.finish()
    assert guest.read(STATUS) == 0
    guest.held = False
    guest.start()
    assert guest.read(STATUS) == NEGOTIATED | DRIVER_OK


def test_a_reset_forgets_every_setting_of_the_driver() -> None:
    guest = performer()
    guest.start(queues=2)
    guest.write(STATUS, 0)
    for index in range(2):
        guest.write(QUEUE_SEL, index)
        assert guest.read(QUEUE_READY) == 0
    assert guest.negotiate(F_VERSION_1)
    guest.write(QUEUE_SEL, 0)
    assert guest.write(QUEUE_READY, 1) == []  # its size was forgotten too


# ---- config space ----


def test_config_space_is_read_in_every_width_it_has_fields_of() -> None:
    guest = performer()
    assert guest.read(CONFIG, 1) == 1
    assert guest.read(CONFIG + 2, 2) == 0x0403
    assert guest.read(CONFIG + 4, 4) == 0x0807_0605
    assert guest.read(CONFIG + 8, 8) == 0x100F_0E0D_0C0B_0A09
    assert guest.read(CONFIG + 4, 8) == 0x0C0B_0A09_0807_0605
    assert guest.read(CONFIG + 0xFC, 4) == 0
    assert not guest.registers.refusals


def test_config_space_is_written_as_it_is_read() -> None:
    guest = performer()
    assert guest.write(CONFIG + 32, 0x1FF, 1) == [WriteConfig(32, b"\xff")]
    assert guest.write(CONFIG + 8, 0x1234, 2) == [WriteConfig(8, b"\x34\x12")]
    assert guest.write(CONFIG, 0x0807_0605_0403_0201, 8) == [
        WriteConfig(0, b"\1\2\3\4"),
        WriteConfig(4, b"\5\6\7\x08"),
    ]


def test_a_change_between_two_halves_of_a_field_is_seen_in_the_generation() -> None:
    space = Space()
    guest = performer(space=space)
    before = guest.read(GENERATION)
    guest.read(CONFIG)
    assert guest.read(GENERATION) == before
    guest.read(CONFIG)
    space.data = bytes(256)  # the device changes; nobody has told the register file yet
    guest.read(CONFIG + 4)
    assert guest.read(GENERATION) != before
    again = guest.read(GENERATION)
    assert (guest.read(CONFIG), guest.read(CONFIG + 4), guest.read(GENERATION)) == (0, 0, again)


@pytest.mark.parametrize(
    ("offset", "size", "reason"),
    [
        (CONFIG, 3, Reason.SIZE),
        (CONFIG, 16, Reason.SIZE),
        (CONFIG, 0, Reason.SIZE),
        (CONFIG + 1, 2, Reason.ALIGNMENT),
        (CONFIG + 2, 4, Reason.ALIGNMENT),
        (CONFIG + 2, 8, Reason.ALIGNMENT),
        (CONFIG + 0xFC, 8, Reason.UNKNOWN),
        (0x200, 4, Reason.UNKNOWN),
        (0xFFC, 4, Reason.UNKNOWN),
    ],
)
def test_an_access_to_no_field_of_the_config_space_does_nothing(offset: int, size: int, reason: Reason) -> None:
    guest = performer()
    assert guest.read(offset, size) == 0
    assert guest.write(offset, 1, size) == []
    assert {why for _, why in guest.registers.refusals} == {reason}
    assert sum(guest.registers.refusals.values()) == 2
