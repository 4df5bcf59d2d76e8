"""A guest that reboots under a front-end that tells of no reset, as QEMU 7.2: its new driver finds a device that was.

And a guest that is merely paused, has come from elsewhere, or resets a queue, keeps what it has.
"""

from __future__ import annotations

import kit.front_end.vhost_user_wire as wire
import pytest
import trio
from kit.front_end.frontend import PACKED_START, Guest, Plugged, Setting, every_python_setting, every_ring, plugged
from kit.front_end.steps import Teller, prepare
from kit.ring.driven import Scripted

from virtio.testing.driver import PackedDriver, SplitDriver
from virtio.testing.queue import GuestQueue


class Watched(Scripted):
    """Writes down what it is told of its life."""

    def __init__(self, queues: int = 1) -> None:
        super().__init__(queues)
        self.life: list[str] = []

    def set_driver_features(self, bits: int) -> None:
        super().set_driver_features(bits)
        self.life.append("features" if bits else "no features")

    def queue_running(self, queue_index: int, running: bool) -> None:
        self.life.append(f"{queue_index} {'runs' if running else 'stopped'}")

    def reset(self) -> None:
        self.life.append("reset")

    @property
    def resets(self) -> int:
        return self.life.count("reset")


async def use(*queues: GuestQueue) -> None:
    for queue in queues:
        await queue.request([b"x"], [8])


async def stop(guest: Guest) -> list[int]:
    """As QEMU does it, whatever the reason: GET_VRING_BASE for every queue."""
    return [await guest.link.stop(queue.index) for queue in guest.queues]


async def reboot(p: Plugged) -> None:
    await stop(p.guest)
    p.guest.forget_queues()
    await p.guest.start()


async def go_on(guest: Guest, bases: list[int]) -> None:
    """The end of a pause: the same features and memory, and every queue from where it stood."""
    await guest.negotiate()
    await guest.link.share(guest.memory)
    for index, base in enumerate(bases):
        await guest.start_queue(index, base)


@every_python_setting
async def test_a_device_is_reset_before_the_first_queue_of_a_rebooted_guest_runs(setting: Setting) -> None:
    device = Watched(queues=2)
    async with plugged(device, setting) as p:
        for _ in range(3):
            await use(*p.guest.queues)
            device.life.clear()
            await reboot(p)
            assert device.life == [
                *("0 stopped", "1 stopped", "features"),
                *("no features", "reset", "features", "0 runs", "1 runs"),
            ]
            assert device.driver_features == p.guest.features
        await use(*p.guest.queues)


@every_python_setting
async def test_it_is_also_when_only_a_later_queue_shows_it(setting: Setting) -> None:
    device = Watched(queues=3)
    async with plugged(device, setting) as p:
        await use(p.guest.queues[1])
        device.life.clear()
        await reboot(p)
        assert device.life[4:] == [
            *("0 runs", "0 stopped"),
            *("no features", "reset", "features", "0 runs", "1 runs", "2 runs"),
        ]
        await use(*p.guest.queues)


@every_python_setting
async def test_a_pause_is_no_reset_however_often(setting: Setting) -> None:
    device = Watched(queues=3)
    async with plugged(device, setting) as p:
        for used in ([], [1], [], [0], [2], [0, 1, 2]):
            await use(*[p.guest.queues[index] for index in used])
            await go_on(p.guest, await stop(p.guest))
            await use(*[p.guest.queues[index] for index in used])
        assert device.resets == 0
        await reboot(p)
        assert device.resets == 1


@every_python_setting
async def test_a_ring_that_wrapped_to_its_very_beginning_is_no_new_one(setting: Setting) -> None:
    device = Watched()
    async with plugged(device, setting, start=False) as p:
        guest = p.guest
        await guest.negotiate()
        await guest.link.share(guest.memory)
        driver: SplitDriver | PackedDriver
        if setting.ring == "split":
            driver = SplitDriver(guest.memory, 64, event_idx=True, start=65535)
            beginning = 0
        else:
            driver = PackedDriver(guest.memory, 64, event_idx=True, start=62, wrap=False)
            beginning = PACKED_START
        guest.queues.append(GuestQueue(0, driver))
        await guest.start_queue(0, driver.base)
        await use(guest.queues[0])
        bases = await stop(guest)
        assert bases == [beginning]
        await go_on(guest, bases)
        await use(guest.queues[0])
        assert device.resets == 0


@every_python_setting
async def test_a_guest_that_came_in_the_middle_of_things_goes_on_and_is_known_when_it_reboots(setting: Setting) -> None:
    """A migration, or a daemon that was started anew: this device has never seen the beginning of the rings."""
    device = Watched(queues=2)
    async with plugged(device, setting) as p:
        await use(*p.guest.queues)
        bases = await stop(p.guest)
        await p.guest.link.reset()
        device.life.clear()
        await go_on(p.guest, bases)
        await use(*p.guest.queues)
        await go_on(p.guest, await stop(p.guest))
        assert device.resets == 0
        await reboot(p)
        assert device.resets == 1


@every_python_setting
@pytest.mark.parametrize("queues", [1, 2])
async def test_a_queue_that_alone_begins_anew_is_no_new_driver(setting: Setting, queues: int) -> None:
    """VIRTIO_F_RING_RESET (2.6.1), which sets no features: also of a device's only queue."""
    device = Watched(queues)
    async with plugged(device, setting) as p:
        for _ in range(3):
            await use(*p.guest.queues)
            await p.guest.link.stop(queues - 1)
            p.guest.queues.pop().close()
            p.guest.add_queue(32)
            await p.guest.start_queue(queues - 1)
        await use(*p.guest.queues)
        assert device.resets == 0
        await reboot(p)
        assert device.resets == 1


@every_python_setting
async def test_a_device_that_was_reset_is_not_reset_again(setting: Setting) -> None:
    device = Watched(queues=2)
    async with plugged(device, setting) as p:
        await use(*p.guest.queues)
        await p.guest.link.reset()
        p.guest.forget_queues()
        await p.guest.start()
        await use(*p.guest.queues)
        assert device.resets == 1


@every_ring
async def test_what_a_queue_tells_when_the_others_are_in_use_already_is_too_late(ring: str) -> None:
    device = Watched(queues=2)
    async with plugged(device, Setting("waist", ring)) as p:
        guest = p.guest
        await use(guest.queues[1])
        await stop(guest)
        guest.forget_queues()
        await guest.negotiate()
        guest.add_queue(64)
        await guest.start_queue(0)
        await use(guest.queues[0])
        guest.add_queue(64)
        await guest.start_queue(1)
        await use(*guest.queues)
        assert device.resets == 0


@every_ring
async def test_a_device_that_fails_while_it_is_reset_for_a_new_driver_has_broken_queues(ring: str) -> None:
    class Failing(Watched):
        def set_driver_features(self, bits: int) -> None:
            super().set_driver_features(bits)
            if bits and self.resets:
                raise ValueError("mine")

    device = Failing(queues=2)
    async with plugged(device, Setting("waist", ring)) as p:
        await use(p.guest.queues[1])
        await reboot(p)
        await p.guest.queues[0].broken()
        await trio.testing.wait_all_tasks_blocked()
        assert device.resets == 1


# --- as QEMU really does it, for what it calls a generic device (rng, gpio, i2c, input) and for vsock ---


async def stop_as_qemu(tellers: list[Teller]) -> list[int]:
    """A pause, a reboot, system_reset: there is no status and no RESET_DEVICE, and the same is said for each."""
    bases = []
    for teller in tellers:
        await teller.enable(on=False)
    for teller in tellers:
        bases.append(await teller.guest.link.stop(teller.queue.index))
        await teller.call()  # of a queue that is stopped
    return bases


async def start_as_qemu(tellers: list[Teller], bases: list[int]) -> None:
    for teller in tellers:
        await teller.call()
    await tellers[0].features()
    for teller, base in zip(tellers, bases, strict=True):
        await teller.num()
        await teller.base(base)
        await teller.addr()
        await teller.err()
        await teller.kick()
    for teller in tellers:
        await teller.enable()
        await teller.call()


@every_ring
@pytest.mark.parametrize("queues", [1, 3])
async def test_a_generic_device_of_qemus_is_reset_by_a_reboot_and_by_no_pause(ring: str, queues: int) -> None:
    """QEMU 7.2 to 11.1 say one status, 8, in the device's whole life: where the rings begin is all there is."""
    device = Watched(queues)
    async with plugged(device, Setting("socket", ring), start=False) as p:
        tellers = [await prepare(p)]
        tellers += [Teller(p.guest, p.guest.add_queue(16)) for _ in range(queues - 1)]
        await tellers[0].do(39, wire.u64(8))
        await tellers[0].memory()  # once a connection
        await start_as_qemu(tellers, [teller.queue.driver.base for teller in tellers])
        for reboots in range(3):
            assert device.resets == reboots
            for used in ([], [0], [queues - 1], [], list(range(queues))):
                await use(*(tellers[index].queue for index in used))
                await start_as_qemu(tellers, await stop_as_qemu(tellers))
            assert device.resets == reboots
            await stop_as_qemu(tellers)
            p.guest.forget_queues()
            tellers = [Teller(p.guest, p.guest.add_queue(16)) for _ in range(queues)]
            await start_as_qemu(tellers, [teller.queue.driver.base for teller in tellers])
        assert await p.guest.link.status() == 8
