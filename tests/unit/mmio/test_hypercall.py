"""The device key and bells of the hypercall doorbell, as virtio-mmio registers 0x0f0 and 0x0f4."""

from __future__ import annotations

from kit.guest.mmio import BELL, F_HYPERCALL_NOTIFY, F_VERSION_1, KEY, QUEUE_READY, QUEUE_SEL, STATUS, Performer

from transports import hypercall
from virtio.mmio.queues import VIRTIO_F_HYPERCALL_NOTIFY, Bells
from virtio.mmio.register_file import RegisterFile
from virtio.mmio.registers import Reason, SetDriverFeatures

BELLS = Bells(0xABCDEF, (0x200, 0x201, 0))


def performer() -> Performer:
    return Performer(
        RegisterFile(
            device_id=1,
            device_features=F_VERSION_1,
            queue_count=3,
            queue_size_max=64,
            config_space=lambda: b"",
        )
    )


def bells_of(guest: Performer) -> list[int]:
    numbers = []
    for index in range(4):
        guest.write(QUEUE_SEL, index)
        numbers.append(guest.read(BELL))
    return numbers


def accept(guest: Performer, index: int, value: int = 1) -> list[object]:
    guest.write(QUEUE_SEL, index)
    return list(guest.write(BELL, value))


def test_the_feature_bit_is_the_one_all_transports_mean() -> None:
    assert VIRTIO_F_HYPERCALL_NOTIFY == 1 << hypercall.VIRTIO_F_HYPERCALL_NOTIFY == F_HYPERCALL_NOTIFY


def test_a_device_that_withholds_the_hypercall_shows_no_key_no_bell_and_no_feature() -> None:
    guest = performer()
    assert guest.read(KEY) == 0
    assert bells_of(guest) == [0, 0, 0, 0]
    assert not guest.features() & F_HYPERCALL_NOTIFY
    assert not guest.negotiate(F_VERSION_1 | F_HYPERCALL_NOTIFY)
    assert accept(guest, 0) == []
    assert guest.registers.refusals["HypercallBell", Reason.WITHHELD] == 1


def test_a_device_that_offers_it_shows_the_key_and_a_bell_for_each_queue_that_has_one() -> None:
    guest = performer()
    guest.registers.offer_bells(BELLS)
    assert guest.read(KEY) == 0xABCDEF
    assert bells_of(guest) == [0x200, 0x201, 0, 0]
    assert guest.features() & F_HYPERCALL_NOTIFY


def test_the_device_behind_never_hears_of_our_feature_bit() -> None:
    guest = performer()
    guest.registers.offer_bells(BELLS)
    guest.start(F_VERSION_1 | F_HYPERCALL_NOTIFY)
    assert SetDriverFeatures(F_VERSION_1) in guest.done


def test_a_driver_that_negotiated_the_feature_has_accepted_every_bell() -> None:
    guest = performer()
    guest.registers.offer_bells(BELLS)
    assert guest.negotiate(F_VERSION_1)
    assert not guest.registers.bells_accepted
    assert guest.negotiate(F_VERSION_1 | F_HYPERCALL_NOTIFY)
    assert list(guest.registers.bells_accepted) == [0, 1, 2]


def test_a_driver_may_accept_a_single_bell_whenever_it_likes() -> None:
    guest = performer()
    guest.registers.offer_bells(BELLS)
    assert accept(guest, 0) == []
    assert list(guest.registers.bells_accepted) == [0]
    guest.write(STATUS, 0)
    assert not guest.registers.bells_accepted
    guest.start(queues=2)
    assert accept(guest, 1) == []
    assert list(guest.registers.bells_accepted) == [1]
    guest.write(QUEUE_READY, 0)
    assert list(guest.registers.bells_accepted) == [1]
    assert not guest.registers.refusals


def test_what_is_withheld_shows_nothing_and_can_be_offered_again() -> None:
    guest = performer()
    guest.registers.offer_bells(BELLS)
    guest.start(F_VERSION_1 | F_HYPERCALL_NOTIFY)
    guest.registers.withhold_bells()
    assert (guest.read(KEY), bells_of(guest)) == (0, [0, 0, 0, 0])
    assert not guest.features() & F_HYPERCALL_NOTIFY
    assert accept(guest, 0) == []
    guest.registers.offer_bells(BELLS)
    assert (guest.read(KEY), bells_of(guest)) == (0xABCDEF, [0x200, 0x201, 0, 0])


def test_a_driver_may_be_told_to_withhold_between_its_look_at_the_features_and_its_choice() -> None:
    """3.1.1, steps 4 to 6: what it read was true, so the device comes up, and rings by the plain doorbell."""
    guest = performer()
    guest.write(STATUS, 0)
    guest.registers.offer_bells(BELLS)
    wanted = guest.features()
    assert wanted & F_HYPERCALL_NOTIFY
    guest.registers.withhold_bells()
    assert guest.choose(wanted)
    assert guest.done[-2:-1] == [SetDriverFeatures(F_VERSION_1)]
    assert not guest.registers.refusals


def test_a_reset_forgets_what_was_offered_before() -> None:
    guest = performer()
    guest.registers.offer_bells(BELLS)
    guest.registers.withhold_bells()
    guest.write(STATUS, 0)
    assert not guest.choose(F_VERSION_1 | F_HYPERCALL_NOTIFY)
    guest.registers.offer_bells(BELLS)
    guest.write(STATUS, 0)
    guest.registers.withhold_bells()
    assert guest.choose(F_VERSION_1 | F_HYPERCALL_NOTIFY)  # the reset found it offered


def test_only_the_number_one_accepts() -> None:
    guest = performer()
    guest.registers.offer_bells(BELLS)
    guest.start()
    for value in (0, 2, 0x200, 0xFFFF_FFFF):
        assert accept(guest, 0, value) == []
    assert accept(guest, 3) == []
    assert guest.registers.refusals == {
        ("HypercallBell", Reason.VALUE): 4,
        ("HypercallBell", Reason.NO_QUEUE): 1,
        ("QueueSel", Reason.NO_QUEUE): 1,
    }
