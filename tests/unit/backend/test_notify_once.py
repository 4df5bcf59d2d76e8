"""A driver is notified once of what is used, also without EVENT_IDX, where each notification is an interrupt."""

from __future__ import annotations

import pytest
from kit.ring.device import FORMATS, Rings, make_driver

from virtio.testing.driver import SplitDriver


@pytest.mark.parametrize("ring", FORMATS)
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_a_batch_that_was_notified_of_is_not_notified_of_again(rings: Rings, ring: str, event_idx: bool) -> None:
    driver = make_driver(ring, rings.memory(), 16, event_idx=event_idx)
    device = rings.device(driver)
    for _ in range(3):
        for _ in range(4):
            driver.add([b"x"], [8])
        driver.want_interrupts(True)
        device.push(*((chain, b"y") for chain in device.pop()))
        assert device.interrupts() == 1
        device.push()  # the end of the worker's round, with nothing new in it
        assert device.interrupts() == 0
        assert len(driver.used()) == 4


@pytest.mark.parametrize("ring", FORMATS)
def test_what_is_used_after_a_notification_is_notified_of(rings: Rings, ring: str) -> None:
    driver = make_driver(ring, rings.memory(), 16)
    device = rings.device(driver)
    for _ in range(3):
        driver.add([b"x"], [8])
    for chain in device.pop():
        device.push((chain, b"y"))
        assert device.interrupts() == 1
    assert len(driver.used()) == 3


def test_a_driver_that_refused_interrupts_is_not_interrupted_later_for_what_it_has_seen(rings: Rings) -> None:
    driver = make_driver("split", rings.memory(), 16)
    assert isinstance(driver, SplitDriver)
    device = rings.device(driver)
    driver.want_interrupts(False)
    driver.add([b"x"], [8])
    device.push(*((chain, b"y") for chain in device.pop()))
    driver.want_interrupts(True)
    assert len(driver.used()) == 1
    device.push()
    assert device.interrupts() == 0
