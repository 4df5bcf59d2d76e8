"""The GPIO device (5.18): lines are read and driven, interrupts arrive once each, and no request can confuse it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.front_end.frontend import Plugged, Setting, every_python_setting, plugged

from virtio.devices.gpio.device import (
    EVENT_QUEUE,
    REQUEST_QUEUE,
    VIRTIO_GPIO_IRQ_STATUS_INVALID,
    VIRTIO_GPIO_IRQ_STATUS_VALID,
    VIRTIO_GPIO_MSG_GET_DIRECTION,
    VIRTIO_GPIO_MSG_GET_LINE_NAMES,
    VIRTIO_GPIO_MSG_GET_VALUE,
    VIRTIO_GPIO_MSG_SET_DIRECTION,
    VIRTIO_GPIO_MSG_SET_IRQ_TYPE,
    VIRTIO_GPIO_MSG_SET_VALUE,
    Gpio,
)
from virtio.devices.gpio.options import GpioOptions
from virtio.devices.gpio.simulated import SimulatedLines
from virtio.testing import TestDriver, attach

NAMES = ("button", "led", "", "Ethernet reset")
BUTTON, LED = 0, 1
NONE, OUT, IN = 0, 1, 2
RISING, FALLING, BOTH, HIGH, LOW = 1, 2, 3, 4, 8
OK, ERR = 0, 1
F_IRQ = 1 << 0


def gpio(names: Sequence[str] = NAMES, control: Path | None = None) -> Gpio:
    return Gpio("pins", GpioOptions(lines=tuple(names), control=control), 2, 64)


def outside(device: object) -> SimulatedLines:
    """What drives the lines from outside of the guest."""
    assert isinstance(device, Gpio)
    assert isinstance(device.lines, SimulatedLines)
    return device.lines


async def ask(p: Plugged, kind: int, line: int, value: int = 0, room: int = 2) -> tuple[int, ...]:
    """The bytes of the response."""
    used = await p.guest.queues[REQUEST_QUEUE].request([struct.pack("<HHI", kind, line, value)], [room])
    return tuple(used.buffers[0][: used.written])


async def enable(p: Plugged, line: int, irq_type: int) -> None:
    assert await ask(p, VIRTIO_GPIO_MSG_SET_IRQ_TYPE, line, irq_type) == (OK, 0)


def unmask(p: Plugged, line: int) -> int:
    queue = p.guest.queues[EVENT_QUEUE]
    token = queue.driver.add([struct.pack("<H", line)], [1])
    queue.kick()
    return token


async def interrupts(p: Plugged, count: int = 1) -> list[tuple[int, int]]:
    """(token, status) of the pairs that came back."""
    back = await p.guest.queues[EVENT_QUEUE].used(count)
    return [(each.token, each.buffers[0][0]) for each in back]


async def settled(p: Plugged) -> None:
    """The device has seen everything before this, for it serves in order, and has come to rest."""
    await ask(p, VIRTIO_GPIO_MSG_GET_VALUE, 0)
    await trio.testing.wait_all_tasks_blocked()


def none_came(p: Plugged) -> bool:
    return not p.guest.queues[EVENT_QUEUE].driver.used()


@every_python_setting
async def test_names_come_as_one_block_whose_size_is_in_the_config_space(setting: Setting) -> None:
    async with plugged(gpio(), setting) as p:
        block = b"button\0led\0\0Ethernet reset\0"
        assert struct.unpack("<HHI", await p.guest.link.read_config(0, 8)) == (4, 0, len(block))
        answer = await ask(p, VIRTIO_GPIO_MSG_GET_LINE_NAMES, 0, room=1 + len(block))
        assert bytes(answer) == b"\0" + block
        short = await ask(p, VIRTIO_GPIO_MSG_GET_LINE_NAMES, 0, room=4)
        assert bytes(short) == b"\0" + block[:3]
        assert p.op("request")[1] == 1


@every_python_setting
async def test_lines_without_names_say_so(setting: Setting) -> None:
    async with plugged(gpio(["", ""]), setting) as p:
        assert struct.unpack("<HHI", await p.guest.link.read_config(0, 8)) == (2, 0, 0)
        assert await ask(p, VIRTIO_GPIO_MSG_GET_LINE_NAMES, 0) == (ERR, 0)


@every_python_setting
async def test_an_input_shows_the_level_from_outside_and_an_output_its_own(setting: Setting) -> None:
    async with plugged(gpio(), setting) as p:
        lines = outside(p.device)
        assert await ask(p, VIRTIO_GPIO_MSG_GET_DIRECTION, BUTTON) == (OK, NONE)
        assert await ask(p, VIRTIO_GPIO_MSG_SET_DIRECTION, BUTTON, IN) == (OK, 0)
        assert await ask(p, VIRTIO_GPIO_MSG_GET_DIRECTION, BUTTON) == (OK, IN)
        for level in (1, 0, 1):
            lines.drive(BUTTON, bool(level))
            assert await ask(p, VIRTIO_GPIO_MSG_GET_VALUE, BUTTON) == (OK, level)
        # 5.18.6.5: what was set before the line became an output is what it begins with.
        assert await ask(p, VIRTIO_GPIO_MSG_SET_VALUE, LED, 1) == (OK, 0)
        assert await ask(p, VIRTIO_GPIO_MSG_GET_VALUE, LED) == (OK, 0)
        assert await ask(p, VIRTIO_GPIO_MSG_SET_DIRECTION, LED, OUT) == (OK, 0)
        assert await ask(p, VIRTIO_GPIO_MSG_GET_VALUE, LED) == (OK, 1)
        assert await ask(p, VIRTIO_GPIO_MSG_SET_VALUE, LED, 0) == (OK, 0)
        assert await ask(p, VIRTIO_GPIO_MSG_GET_VALUE, LED) == (OK, 0)


@every_python_setting
async def test_a_line_that_is_let_go_of_forgets_everything(setting: Setting) -> None:
    async with plugged(gpio(), setting) as p:
        await ask(p, VIRTIO_GPIO_MSG_SET_VALUE, LED, 1)
        await ask(p, VIRTIO_GPIO_MSG_SET_DIRECTION, LED, OUT)
        assert await ask(p, VIRTIO_GPIO_MSG_SET_DIRECTION, LED, NONE) == (OK, 0)
        await ask(p, VIRTIO_GPIO_MSG_SET_DIRECTION, LED, OUT)
        assert await ask(p, VIRTIO_GPIO_MSG_GET_VALUE, LED) == (OK, 0)
        await enable(p, BUTTON, RISING)
        waiting = unmask(p, BUTTON)
        assert await ask(p, VIRTIO_GPIO_MSG_SET_DIRECTION, BUTTON, NONE) == (OK, 0)
        assert await interrupts(p) == [(waiting, VIRTIO_GPIO_IRQ_STATUS_INVALID)]


@every_python_setting
@pytest.mark.parametrize(
    ("irq_type", "rises", "falls"), [(RISING, True, False), (FALLING, False, True), (BOTH, True, True)]
)
async def test_an_edge_of_the_right_kind_is_one_interrupt(
    setting: Setting, irq_type: int, rises: bool, falls: bool
) -> None:
    async with plugged(gpio(), setting) as p:
        await enable(p, BUTTON, irq_type)
        for level, wanted in ((True, rises), (False, falls), (True, rises)):
            token = unmask(p, BUTTON)
            await settled(p)
            outside(p.device).drive(BUTTON, level)
            if wanted:
                assert await interrupts(p) == [(token, VIRTIO_GPIO_IRQ_STATUS_VALID)]
            else:
                await settled(p)
                assert none_came(p)
                await ask(p, VIRTIO_GPIO_MSG_SET_IRQ_TYPE, BUTTON, 0)
                assert await interrupts(p) == [(token, VIRTIO_GPIO_IRQ_STATUS_INVALID)]
                await enable(p, BUTTON, irq_type)


@every_python_setting
async def test_edges_while_masked_are_latched_as_one_and_levels_are_not(setting: Setting) -> None:
    async with plugged(gpio(), setting) as p:
        lines = outside(p.device)
        await enable(p, BUTTON, RISING)
        for _ in range(3):
            lines.drive(BUTTON, True)
            lines.drive(BUTTON, False)
        token = unmask(p, BUTTON)
        assert await interrupts(p) == [(token, VIRTIO_GPIO_IRQ_STATUS_VALID)]
        unmask(p, BUTTON)
        await settled(p)
        assert none_came(p)

        await enable(p, LED, HIGH)
        lines.drive(LED, True)
        lines.drive(LED, False)
        unmask(p, LED)
        await settled(p)
        assert none_came(p)


@every_python_setting
@pytest.mark.parametrize(("irq_type", "active"), [(HIGH, True), (LOW, False)])
async def test_a_level_interrupts_again_and_again_while_it_lasts(setting: Setting, irq_type: int, active: bool) -> None:
    async with plugged(gpio(), setting) as p:
        lines = outside(p.device)
        lines.drive(BUTTON, not active)
        await enable(p, BUTTON, irq_type)
        token = unmask(p, BUTTON)
        await settled(p)
        assert none_came(p)
        lines.drive(BUTTON, active)
        assert await interrupts(p) == [(token, VIRTIO_GPIO_IRQ_STATUS_VALID)]
        for _ in range(3):
            token = unmask(p, BUTTON)
            assert await interrupts(p) == [(token, VIRTIO_GPIO_IRQ_STATUS_VALID)]
        lines.drive(BUTTON, not active)
        unmask(p, BUTTON)
        await settled(p)
        assert none_came(p)


@every_python_setting
async def test_disabling_returns_the_buffers_and_forgets_what_was_latched(setting: Setting) -> None:
    async with plugged(gpio(), setting) as p:
        lines = outside(p.device)
        await enable(p, BUTTON, BOTH)
        token = unmask(p, BUTTON)
        await settled(p)
        await ask(p, VIRTIO_GPIO_MSG_SET_IRQ_TYPE, BUTTON, 0)
        assert await interrupts(p) == [(token, VIRTIO_GPIO_IRQ_STATUS_INVALID)]
        await enable(p, BUTTON, BOTH)
        lines.drive(BUTTON, True)  # latched
        await ask(p, VIRTIO_GPIO_MSG_SET_IRQ_TYPE, BUTTON, 0)
        await enable(p, BUTTON, BOTH)
        unmask(p, BUTTON)
        await settled(p)
        assert none_came(p)


@every_python_setting
async def test_unmasking_what_is_not_enabled_or_there_already_comes_back_invalid(setting: Setting) -> None:
    async with plugged(gpio(), setting) as p:
        assert await interrupts_of(p, unmask(p, BUTTON)) == VIRTIO_GPIO_IRQ_STATUS_INVALID
        await enable(p, BUTTON, RISING)
        first = unmask(p, BUTTON)
        assert await interrupts_of(p, unmask(p, BUTTON)) == VIRTIO_GPIO_IRQ_STATUS_INVALID
        assert await interrupts_of(p, unmask(p, 4)) == VIRTIO_GPIO_IRQ_STATUS_INVALID
        assert await interrupts_of(p, unmask(p, 0xFFFF)) == VIRTIO_GPIO_IRQ_STATUS_INVALID
        outside(p.device).drive(BUTTON, True)
        assert await interrupts(p) == [(first, VIRTIO_GPIO_IRQ_STATUS_VALID)]
        assert p.op("interrupt", EVENT_QUEUE) == (5, 3)


async def interrupts_of(p: Plugged, token: int) -> int:
    ((came, status),) = await interrupts(p)
    assert came == token
    return status


@every_python_setting
async def test_without_the_feature_there_are_no_interrupts(setting: Setting) -> None:
    async with plugged(gpio(), setting, without=F_IRQ) as p:
        assert await ask(p, VIRTIO_GPIO_MSG_SET_IRQ_TYPE, BUTTON, RISING) == (ERR, 0)
        assert await ask(p, VIRTIO_GPIO_MSG_GET_VALUE, BUTTON) == (OK, 0)


@every_python_setting
async def test_an_output_has_no_interrupt_and_a_line_with_one_is_no_output(setting: Setting) -> None:
    async with plugged(gpio(), setting) as p:
        await ask(p, VIRTIO_GPIO_MSG_SET_DIRECTION, LED, OUT)
        assert await ask(p, VIRTIO_GPIO_MSG_SET_IRQ_TYPE, LED, RISING) == (ERR, 0)
        await enable(p, BUTTON, RISING)
        assert await ask(p, VIRTIO_GPIO_MSG_SET_DIRECTION, BUTTON, OUT) == (ERR, 0)


@every_python_setting
async def test_a_queue_that_stops_returns_what_it_holds_and_a_reset_forgets_the_rest(setting: Setting) -> None:
    async with plugged(gpio(), setting) as p:
        await enable(p, BUTTON, RISING)
        token = unmask(p, BUTTON)
        await settled(p)
        await p.guest.link.stop(EVENT_QUEUE)
        assert await interrupts(p) == [(token, VIRTIO_GPIO_IRQ_STATUS_INVALID)]
        outside(p.device).drive(BUTTON, True)  # still enabled, so it is latched
        await ask(p, VIRTIO_GPIO_MSG_SET_DIRECTION, LED, OUT)
        p.guest.close()
        if p.server is None:
            await p.backend.reset()
        guest = await p.connect()
        await guest.start()
        assert await ask(p, VIRTIO_GPIO_MSG_GET_DIRECTION, LED) == (OK, NONE)
        assert await interrupts_of(p, unmask(p, BUTTON)) == VIRTIO_GPIO_IRQ_STATUS_INVALID


# --- what a hostile driver does ---


@every_python_setting
@pytest.mark.parametrize(
    "request_bytes",
    [
        *(struct.pack("<HHI", kind, 0, 0) for kind in (0, 7, 0xFFFF)),
        *(struct.pack("<HHI", kind, line, 0) for kind in range(2, 7) for line in (len(NAMES), 0xFFFF)),
        struct.pack("<HHI", VIRTIO_GPIO_MSG_SET_DIRECTION, 0, 3),
        struct.pack("<HHI", VIRTIO_GPIO_MSG_SET_DIRECTION, 0, 0xFFFFFFFF),
        struct.pack("<HHI", VIRTIO_GPIO_MSG_SET_VALUE, 0, 2),
        *(struct.pack("<HHI", VIRTIO_GPIO_MSG_SET_IRQ_TYPE, 0, kind) for kind in (5, 6, 7, 9, 12, 16, 0x101)),
        b"\1\0\0\0\0\0\0",
        b"",
    ],
    ids=bytes.hex,
)
async def test_nonsense_is_answered_with_an_error_and_nothing_breaks(setting: Setting, request_bytes: bytes) -> None:
    async with plugged(gpio(), setting) as p:
        queue = p.guest.queues[REQUEST_QUEUE]
        used = await queue.request([request_bytes] if request_bytes else [], [2])
        assert used.buffers[0] == bytes([ERR, 0])
        assert await ask(p, VIRTIO_GPIO_MSG_GET_VALUE, 0) == (OK, 0)
        assert p.op("request") == (2, 1)


@every_python_setting
async def test_buffers_without_room_come_back_and_count_as_errors(setting: Setting) -> None:
    async with plugged(gpio(), setting) as p:
        requests, events = p.guest.queues
        get_value = struct.pack("<HHI", VIRTIO_GPIO_MSG_GET_VALUE, 0, 0)
        assert (await requests.request([get_value], [])).written == 0
        assert (await requests.request([get_value], [1])).buffers == [b"\0"]
        assert (await events.request([b"\0\0"], [])).written == 0
        assert (await events.request([b"\0"], [1])).buffers == [b"\0"]
        assert (await events.request([], [4])).buffers == [bytes(4)]
        assert p.op("request") == (2, 2)
        assert p.op("interrupt", EVENT_QUEUE) == (3, 3)


@every_python_setting
async def test_a_flood_of_unmasked_interrupts_leaves_one_buffer_a_line_with_the_device(setting: Setting) -> None:
    async with plugged(gpio(), setting) as p:
        for line in range(len(NAMES)):
            await enable(p, line, BOTH)
        queue = p.guest.queues[EVENT_QUEUE]
        for turn in range(16):
            back = 0
            for line in range(len(NAMES)):
                for _ in range(4):
                    queue.driver.add([struct.pack("<H", line)], [1])
            queue.kick()
            expected = 16 if turn else 16 - len(NAMES)
            while back < expected:
                back += len(await queue.used())
            assert back == expected
        assert p.backend.stats().queues[EVENT_QUEUE].inflight == len(NAMES)


STEPS = st.tuples(
    st.sampled_from(["ask", "unmask", "drive"]),
    st.integers(0, 7),
    st.integers(0, 5),
    st.sampled_from([0, 1, 2, 3, 4, 8, 5, 0xFFFFFFFF]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_whatever_the_order_a_line_keeps_one_buffer_and_only_enabled_ones_interrupt(
    steps: list[tuple[str, int, int, int]],
) -> None:
    async def scenario() -> None:
        device = gpio()
        async with attach(device) as driver:
            types = [0] * len(NAMES)
            held: dict[int, int] = {}  # by token: whose interrupt it unmasks
            for step, kind, line, value in steps:
                if step == "ask":
                    answer = await driver.request(0, struct.pack("<HHI", kind, line, value), 64)
                    if answer[0] == OK and kind == VIRTIO_GPIO_MSG_SET_IRQ_TYPE:
                        types[line] = value
                    if answer[0] == OK and kind == VIRTIO_GPIO_MSG_SET_DIRECTION and value == NONE:
                        types[line] = 0
                elif step == "unmask":
                    held[driver.post(1, struct.pack("<H", line), 1)] = line
                else:
                    outside(device).drive(line % len(NAMES), bool(value))
                await trio.testing.wait_all_tasks_blocked()
                check(driver, types, held)

    def check(driver: TestDriver, types: list[int], held: dict[int, int]) -> None:
        for used in driver.queues[1].driver.used():
            line, status = held.pop(used.token), used.buffers[0][0]
            assert status == VIRTIO_GPIO_IRQ_STATUS_INVALID or types[line] != 0
        lines = sorted(held.values())
        assert lines == sorted(set(lines))
        assert all(types[line] for line in lines)

    trio.run(scenario)
