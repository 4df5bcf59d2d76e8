"""A memory file that is cut under us: its queue breaks and says why, everything else goes on, the process lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from kit.ring.device import FORMATS, RingDevice, Rings, make_driver, read_counter

from virtio.dataplane import lib
from virtio.native.memory import install_sigbus_guard
from virtio.testing.driver import Element, GuestMemory, VirtqueueDriver


@pytest.fixture(autouse=True)
def guarded() -> None:
    install_sigbus_guard()


def cut(memory: GuestMemory, size: int) -> None:
    """Shorten the memory file. From here on the driver's own view of what was cut off must not be touched."""
    os.ftruncate(memory.fd, size)


def pair(rings: Rings, ring: str) -> tuple[VirtqueueDriver, RingDevice]:
    driver = make_driver(ring, rings.memory(1 << 16), 8)
    return driver, rings.device(driver)


def mapping_is_dead(device: RingDevice) -> bool:
    (mapping,) = device.table.mappings.values()
    return mapping.dead


@pytest.mark.parametrize("ring", FORMATS)
def test_a_queue_breaks_when_its_ring_was_cut_off(rings: Rings, ring: str) -> None:
    driver, device = pair(rings, ring)
    neighbour_driver, neighbour = pair(rings, ring)
    driver.add([b"x"], [])
    cut(driver.memory, 0)
    assert device.pop() == []
    assert device.fault == lib.VQ_FAULT_MEMORY_GONE
    assert mapping_is_dead(device)
    assert read_counter(device.event_fd) == 1
    token = neighbour_driver.add([b"I am"], [4])
    (chain,) = neighbour.pop()
    neighbour.push((chain, b"well"))
    assert neighbour_driver.used() == [(token, 4, [b"well"])]
    assert not mapping_is_dead(neighbour)


@pytest.mark.parametrize("ring", FORMATS)
def test_a_buffer_that_was_cut_off_reads_as_zeroes_and_the_next_pop_breaks(rings: Rings, ring: str) -> None:
    driver, device = pair(rings, ring)
    memory = driver.memory
    memory.write(memory.gpa + 0x8000, b"secret")
    driver.add_elements([Element(memory.gpa + 0x8000, 6, False), Element(memory.gpa + 0x9000, 64, True)])
    (chain,) = device.pop()
    cut(memory, 0x4000)
    assert chain.data == bytes(6)
    assert chain.write(0, b"lost") == 4
    device.push((chain, b""))
    assert device.pop() == []
    assert device.fault == lib.VQ_FAULT_MEMORY_GONE


@pytest.mark.parametrize("ring", FORMATS)
def test_completions_into_memory_that_was_cut_off_harm_nobody(rings: Rings, ring: str) -> None:
    driver, device = pair(rings, ring)
    driver.add([b"x"], [])
    (chain,) = device.pop()
    cut(driver.memory, 0)
    device.push((chain, b""))
    device.vq.arm()
    assert device.pop() == []
    assert device.fault == lib.VQ_FAULT_MEMORY_GONE


def test_all_queues_of_that_memory_break_and_new_memory_mends_them(rings: Rings) -> None:
    memory = rings.memory(1 << 16)
    devices = [rings.device(make_driver(ring, memory, 8)) for ring in FORMATS]
    cut(memory, 0)
    for device in devices:
        assert device.pop() == []
        assert device.fault == lib.VQ_FAULT_MEMORY_GONE
    driver, device = pair(rings, "split")
    driver.add([b"new"], [])
    assert [chain.data for chain in device.pop()] == [b"new"]
    assert device.fault == 0


def test_a_mapping_that_died_stays_dead_for_later_users(rings: Rings) -> None:
    """The file may grow again; what was there is lost all the same."""
    driver, device = pair(rings, "split")
    memory = driver.memory
    cut(memory, 0)
    assert device.pop() == []
    cut(memory, memory.size)
    device.start(0)
    assert device.pop() == []
    assert device.fault == lib.VQ_FAULT_MEMORY_GONE


ELSEWHERE = """
import faulthandler, mmap, os, sys
from virtio.native.memory import install_sigbus_guard
for step in sys.argv[1:]:
    {"on": faulthandler.enable, "off": faulthandler.disable, "guard": install_sigbus_guard}[step]()
fd = os.memfd_create("not guest memory")
os.ftruncate(fd, 4096)
mine = mmap.mmap(fd, 4096)
os.ftruncate(fd, 0)
print("before", flush=True)
mine[0]
print("after", flush=True)
"""


@pytest.mark.parametrize(
    ("steps", "reported"),
    [
        (["guard"], False),
        (["on", "guard"], True),
        (["guard", "on"], True),
        (["guard", "guard", "on", "guard"], True),
        (["on", "guard", "off", "on", "guard"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_fault_elsewhere_ends_the_process_and_other_handlers_still_report_it(
    steps: list[str], reported: bool
) -> None:
    """faulthandler and pytest install handlers too, before us and after us, and again."""
    ran = subprocess.run([sys.executable, "-c", ELSEWHERE, *steps], capture_output=True, text=True, timeout=60)
    assert ran.returncode == -signal.SIGBUS
    assert ran.stdout == "before\n"
    assert ("Fatal Python error: Bus error" in ran.stderr) == reported
