"""A device that keeps the event loop to itself for long is named in the log, and no other."""

from __future__ import annotations

import trio
from kit.front_end.frontend import Setting, plugged
from kit.ring.driven import Scripted
from structlog.testing import capture_logs

from daemon.running.slow_steps import LONG_SECONDS, SILENT_SECONDS, SlowSteps
from virtio.backend.device_calls import DEVICE
from virtio.device import Chain, Queue


class Clock:
    """Time passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def told(*steps: tuple[str | None, float, float]) -> list[tuple[str, float, int]]:
    """(device, seconds, unreported) of each line, where tasks of these devices take (long, and then wait) in turns."""
    clock = Clock()

    async def work(device: str | None, seconds: float, pause: float) -> None:
        if device is not None:
            DEVICE.set(device)
        async with trio.open_nursery() as nursery:  # what a device starts works for it, too
            nursery.start_soon(step, seconds)
        clock.now += 0  # awaited work of others is not its own
        await trio.lowlevel.checkpoint()
        pauses.append(pause)

    async def step(seconds: float) -> None:
        clock.now += seconds

    async def main() -> None:
        for device, seconds, pause in steps:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(work, device, seconds, pause)
            skip(pauses.pop())

    def skip(seconds: float) -> None:
        slow._began = clock.now = clock.now + seconds

    pauses: list[float] = []
    slow = SlowSteps(clock)
    with capture_logs() as logs:
        trio.run(main, instruments=[slow])
    return [(line["device"], line["seconds"], line["unreported"]) for line in logs]


def test_a_step_that_takes_long_is_reported_with_the_devices_name() -> None:
    assert told(("leds", LONG_SECONDS + 0.25, 0), ("disk", LONG_SECONDS / 2, 0)) == [("leds", LONG_SECONDS + 0.25, 0)]


def test_what_no_device_does_names_none() -> None:
    assert told((None, 10, 0)) == []


def test_a_device_is_reported_once_a_minute_and_says_how_often_it_was_not() -> None:
    again = ("leds", 1.0, 0.0)
    lines = told(again, again, ("leds", 1.0, SILENT_SECONDS), ("rng", 2.0, 0), again)
    assert lines == [("leds", 1.0, 0), ("rng", 2.0, 0), ("leds", 1.0, 2)]


async def test_a_device_is_named_whatever_transport_it_is_behind() -> None:
    """In a machine of our own no task is the device's alone."""
    clock, device = Clock(), Scripted()

    async def slow(queue: Queue, chain: Chain) -> None:
        clock.now += 2 * LONG_SECONDS

    device.script = slow
    instrument = SlowSteps(clock)
    async with plugged(device, Setting("waist", "split")) as p:
        trio.lowlevel.add_instrument(instrument)
        with capture_logs() as logs:
            await p.guest.queues[0].request([b"slow"], [8])
        trio.lowlevel.remove_instrument(instrument)
    assert [line["device"] for line in logs if "event loop" in line["event"]] == [device.name]
