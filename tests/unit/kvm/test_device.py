"""A device of our own VM (virtio 1.3, 4.2): registers become verbs, KVM's eventfds the queue's, events interrupts."""

from __future__ import annotations

import contextlib
import os

import kit.guest.mmio as regs
import pytest
from kit.front_end.recording_backend import RecordingBackend
from kit.front_end.vhost_user_wire import no_fd_leaks, no_further_descriptors
from kit.kvm.scene import Scene, scene
from kit.ring.driven import Scripted
from structlog.testing import capture_logs

from transports.kvm.machine.device import LINES_MAX
from transports.kvm.machine.slots import DEVICES_MAX, gsi_of, slot
from virtio.backend.backend import Backend
from virtio.device import DeviceOptions
from virtio.devices.blk.device import Blk, BlkOptions
from virtio.devices.rng import Rng
from virtio.errors import HostError
from virtio.native.worker import Worker
from virtio.waist import AddressSpace, ConfigChanged, QueueSetup

NEGOTIATED = regs.ACKNOWLEDGE | regs.DRIVER | regs.FEATURES_OK


def rng() -> Backend:
    return Backend(Rng("entropy", DeviceOptions(), 1, 64))


# ---- places ----


def test_no_two_devices_share_a_place_a_port_an_interrupt_or_a_bell() -> None:
    slots = [slot(number) for number in range(DEVICES_MAX)]
    for values in ([each.gpa for each in slots], [each.port for each in slots], [each.gsi for each in slots]):
        assert len(set(values)) == DEVICES_MAX
    bells = [each.bell(index) for each in slots for index in range(256)]
    assert len(set(bells)) == len(bells)
    assert max(bells) < 0x10000 <= slots[0].port << 8  # below the numbers that ports make
    assert slots[0].bell(256) == 0
    assert gsi_of(0) == 16
    assert not {0, 1, 2, 4, 8, 9, 13} & {each.gsi for each in slots}
    with pytest.raises(IndexError, match="places for 16"):
        slot(DEVICES_MAX)


# ---- what KVM is told ----


async def test_one_queue_has_a_doorbell_for_any_value_and_several_have_one_each() -> None:
    async with rng() as backend, scene(backend) as s:
        notify = s.device.slot.gpa + 0x50
        assert s.vm.calls == [
            ("window", 0xD000_0000, 0x200, 0x1000),
            ("irqfd", 16),
            ("mmio", notify, 0, None),
            ("pio", 0x1000, 2, 0),
        ]
    recording = RecordingBackend(queue_count=2)
    async with scene(recording, number=3) as s:
        assert s.vm.calls == [
            ("window", 0xD000_3000, 0x200, 0x1006),
            ("irqfd", 19),
            ("mmio", 0xD000_3050, 4, 0),
            ("pio", 0x1006, 2, 0),
            ("mmio", 0xD000_3050, 4, 1),
            ("pio", 0x1006, 2, 1),
        ]
        assert set(s.device.window.kicks) == {0, 1}  # type: ignore[attr-defined]
    recording.close()


async def test_everything_is_taken_back_at_the_end_and_no_descriptor_is_left() -> None:
    with no_fd_leaks():
        async with rng() as backend, scene(backend) as s:
            await s.start()
            vm = s.vm
        assert [call for call in vm.calls if call[0] == "remove"] == [
            ("remove", "pio", 0),
            ("remove", "mmio", None),
            ("remove", "irqfd", 16),
        ]


# ---- verbs ----


async def test_the_verbs_come_in_the_order_of_the_drivers_steps() -> None:
    backend = RecordingBackend(queue_count=1, features=regs.F_VERSION_1)
    async with scene(backend) as s:
        await s.start(size=8)
        ring = s.rings[0]
        assert (
            backend.calls
            == [
                ("set_interrupt_status", True),
                ("set_memory", backend.regions),
                ("reset",),
                ("set_memory", backend.regions),
                ("set_status", regs.ACKNOWLEDGE | regs.DRIVER),
                ("set_driver_features", regs.F_VERSION_1),
                ("set_status", NEGOTIATED),
                (
                    "configure_queue",
                    0,
                    QueueSetup(8, ring.desc, ring.avail, ring.used_area, 0, AddressSpace.GPA),
                ),
                ("set_kick", 0, True),
                ("set_doorbell", 0, 1, True),
                ("set_status", NEGOTIATED | regs.DRIVER_OK),
                ("set_call", 0, True),  # 2.1.2: not before DRIVER_OK
                ("enable_queue", 0, True),
            ]
            or backend.calls[3][0] == "set_memory"
        )
        (region,) = backend.regions
        assert (region.gpa, region.size, region.offset) == (0, 4 << 20, 0)
    backend.close()


async def test_a_queue_that_is_not_ready_any_more_has_stopped() -> None:
    backend = RecordingBackend(queue_count=1, features=regs.F_VERSION_1)
    async with scene(backend) as s:
        await s.start()
        backend.calls.clear()
        await s.write(regs.QUEUE_READY, 0)
        assert await s.read(regs.QUEUE_READY) == 0
        assert backend.calls == [("enable_queue", 0, False), ("stop_queue", 0)]
    backend.close()


async def test_the_driver_hears_of_a_verb_that_fails_by_the_need_for_a_reset() -> None:
    backend = RecordingBackend(queue_count=2, features=regs.F_VERSION_1)
    async with scene(backend) as s:
        await s.negotiate(regs.F_VERSION_1)
        await s.write(regs.STATUS, NEGOTIATED | regs.DRIVER_OK)
        backend.failures["set_kick"] = HostError("no more of them")
        with capture_logs() as logs:
            await s.write(regs.QUEUE_NUM, 8)
            await s.write(regs.QUEUE_READY, 1)
        assert [line["error"] for line in logs if "failed" in line["event"]] == ["no more of them"]
        assert backend.verbs()[-2:] == ["enable_queue", "stop_queue"]  # nothing is left half set up
        assert await s.read(regs.QUEUE_READY) == 0
        assert await s.read(regs.STATUS) & regs.NEEDS_RESET
        assert await s.interrupted() == 2
        await s.start(size=8)
        assert await s.read(regs.STATUS) == NEGOTIATED | regs.DRIVER_OK
    backend.close()


async def test_a_driver_that_meets_a_host_without_descriptors_needs_a_reset_and_then_goes_on() -> None:
    """Each step of a driver wants some: every one it can fail at is a line and DEVICE_NEEDS_RESET, never the guest."""
    async with rng() as backend, scene(backend) as s:
        for left in range(20):
            with capture_logs() as logs, no_further_descriptors(left):
                with contextlib.suppress(AssertionError):  # of a queue that is not ready
                    await s.start()
                status = await s.read(regs.STATUS)
            lines = [line for line in logs if line["event"] == "the driver's request failed"]
            assert bool(status & regs.NEEDS_RESET) == bool(lines)
            assert all("Too many open files" in line["error"] for line in lines), lines
            if not lines:
                break
        assert 4 <= left < 20
        s.rings[0].add([], [64])
        s.ring_mmio(0)
        await s.used(0)


# ---- work ----


@pytest.mark.parametrize("features", [regs.F_VERSION_1, regs.F_VERSION_1 | regs.F_RING_PACKED], ids=["split", "packed"])
async def test_a_driver_uses_the_device_by_either_plain_doorbell(features: int) -> None:
    async with rng() as backend, scene(backend) as s:
        await s.start(features)
        for number in range(6):
            s.rings[0].add([], [64])
            (s.ring_mmio if number % 2 else s.ring_pio)(0)
            (used,) = await s.used(0)
            assert used.written == 64
        await s.rung(kick=3, pio=3)


@pytest.mark.parametrize("reactor", ["io_uring", "epoll"])
async def test_a_native_device_is_served_as_any_other(reactor: str) -> None:
    disk = Blk("disk", BlkOptions(backend="memory", size=1 << 20), 2, 64)
    async with Worker("w", reactor=reactor) as worker, Backend(disk, workers=[worker]) as backend, scene(backend) as s:
        await s.start()
        for index in (0, 1):
            header = bytes([1, 0, 0, 0, 0, 0, 0, 0, index, 0, 0, 0, 0, 0, 0, 0])
            s.rings[index].add([header, bytes([index + 1]) * 512], [1])
            s.ring_mmio(index)
            (used,) = await s.used(index)
            assert used.buffers == [b"\0"]
        s.rings[0].add([bytes(16)], [1024, 1])
        s.ring_pio(0)
        (used,) = await s.used(0)
        assert used.buffers[0] == b"\1" * 512 + b"\2" * 512
        await s.rung(kick=1, pio=1)
    disk.close()


async def test_interrupt_status_is_set_when_the_interrupt_comes() -> None:
    async with rng() as backend, scene(backend) as s:
        await s.start()
        assert await s.interrupted() == 1  # a new call eventfd is signalled once
        s.rings[0].add([], [64])
        s.ring_mmio(0)
        assert await s.interrupted() == 1


async def test_nothing_interrupts_before_the_driver_is_there() -> None:
    """2.1.2: no used buffer notification, and no configuration change, before DRIVER_OK."""
    device = Scripted()
    async with Backend(device) as backend, scene(backend) as s:
        await s.negotiate(regs.F_VERSION_1)
        await s.write(regs.QUEUE_NUM, 8)
        await s.write(regs.QUEUE_READY, 1)
        device.config_changed()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(s.vm.irq)
        assert s.device.interrupt.value == 0


async def test_a_kick_that_came_before_the_queue_ran_is_not_lost() -> None:
    async with rng() as backend, scene(backend) as s:
        s.ring_mmio(0)
        await s.start()
        s.rings[0].add([], [8])
        s.ring_mmio(0)
        await s.used(0)


async def test_a_changed_config_space_interrupts_and_changes_the_generation() -> None:
    device, space = Scripted(), [b"before"]
    device.config_space = lambda: space[0]  # type: ignore[method-assign]
    async with Backend(device) as backend, scene(backend) as s:
        await s.start()
        await s.interrupted()
        before = await s.read(regs.GENERATION)
        space[0] = b"after"
        device.config_changed()
        status = 0
        while not status & 2:
            status = await s.interrupted()
        assert await s.read(regs.GENERATION) != before
        assert await s.read(regs.CONFIG, 4) == int.from_bytes(b"afte", "little")


async def test_a_config_change_of_a_recording_back_end_is_an_interrupt_with_bit_1() -> None:
    backend = RecordingBackend(queue_count=1, features=regs.F_VERSION_1)
    async with scene(backend) as s:
        await s.start()
        backend.post(ConfigChanged())
        assert await s.interrupted() == 2
    backend.close()


# ---- resets ----


async def test_a_device_is_reset_and_set_up_again_as_often_as_the_driver_likes() -> None:
    async with rng() as backend, scene(backend) as s:
        for _ in range(5):
            await s.start()
            s.rings[0].add([], [32])
            s.ring_mmio(0)
            (used,) = await s.used(0)
            assert used.written == 32
        s.device.interrupt.raise_config()
        await s.write(regs.STATUS, 0)
        assert s.device.interrupt.value == 0  # 4.2.2.1


async def broken(s: Scene) -> None:
    """Rings that lie outside memory, and a kick."""
    await s.negotiate(regs.F_VERSION_1)
    await s.write(regs.QUEUE_SEL, 0)
    await s.write(regs.QUEUE_NUM, 8)
    for area in regs.AREAS:
        await s.write(area + 4, 1)
    await s.write(regs.QUEUE_READY, 1)
    await s.write(regs.STATUS, NEGOTIATED | regs.DRIVER_OK)
    s.ring_mmio(0)


async def test_rings_outside_memory_need_a_reset_and_cost_nothing_else() -> None:
    async with rng() as backend, scene(backend) as s:
        with capture_logs() as logs:
            await broken(s)
            while not await s.interrupted() & 2:
                pass
        assert await s.read(regs.STATUS) & regs.NEEDS_RESET
        lines = [line for line in logs if line["log_level"] == "warning"]
        assert [line["event"] for line in lines] == ["queue broken"]
        assert "outside guest memory" in lines[0]["error"]
        await s.start()
        assert not await s.read(regs.STATUS) & regs.NEEDS_RESET
        s.rings[0].add([], [32])
        s.ring_mmio(0)
        await s.used(0)


async def test_a_driver_that_breaks_its_queues_for_ever_does_not_fill_the_log() -> None:
    async with rng() as backend, scene(backend) as s:
        with capture_logs() as logs:
            for _ in range(LINES_MAX + 20):
                await broken(s)
                while not await s.read(regs.STATUS) & regs.NEEDS_RESET:
                    await s.interrupted()
        assert len([line for line in logs if line["event"] == "queue broken"]) == LINES_MAX
        assert len([line for line in logs if "no more lines" in line["event"]]) == 1


async def test_nonsense_in_registers_is_told_once_and_counted() -> None:
    async with rng() as backend, scene(backend) as s:
        with capture_logs() as logs:
            for _ in range(3):
                await s.write(regs.QUEUE_SEL, 77)
                assert await s.read(0x3FC) == 0
        assert sorted(line["event"].split(": ", 1)[1] for line in logs) == [
            "QueueSel: no such queue",
            "Unknown: no such register",
        ]
        assert sum(s.device.registers.refusals.values()) == 6
