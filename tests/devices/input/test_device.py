"""The input device (5.8): whole reports in order, and a guest that does not read never ends up with a key held down."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.front_end.frontend import F_RING_PACKED, Plugged, Setting, every_python_setting, plugged
from kit.front_end.links import WaistLink
from kit.host.line_client import talking

from virtio.backend.backend import Backend
from virtio.devices.input.codes import CODES, EV_ABS, EV_KEY, EV_LED, EV_REL, parse_code
from virtio.devices.input.device import EVENT_QUEUE, STATUS_QUEUE, Input
from virtio.devices.input.options import InputOptions
from virtio.devices.input.source import PENDING_MAX, EventQueue, InputEvent
from virtio.errors import HostError
from virtio.testing import attach
from virtio.testing.queue import GUARD
from virtio.waist import IotlbMiss, Permission

KEY_A, KEY_B = 30, 48
SYN = (0, 0, 0)
DROPPED = (0, 3, 0)
NAME, SERIAL, DEVIDS, PROPS, BITS, ABS = 1, 2, 3, 0x10, 0x11, 0x12


def keyboard(control: Path | None = None, events: tuple[str, ...] = ("keyboard", "ABS_X", "REL_X")) -> Input:
    return Input("keyboard", InputOptions(events=events, range=(-5, 1000), label="Test keys", control=control), 2, 64)


def press(device: object, code: int, value: int = 1) -> bool:
    assert isinstance(device, Input)
    return device.source.emit([InputEvent(EV_KEY, code, value)])


async def query(p: Plugged, select: int, subsel: int = 0) -> bytes:
    await p.guest.link.write_config(0, bytes([select]))
    await p.guest.link.write_config(1, bytes([subsel]))
    space = await p.guest.link.read_config(0, 136)
    assert space[:2] == bytes([select, subsel])
    assert not any(space[3:8])
    assert not any(space[8 + space[2] :])
    return space[8 : 8 + space[2]]


async def events(p: Plugged, count: int) -> list[tuple[int, int, int]]:
    queue = p.guest.queues[EVENT_QUEUE]
    found: list[tuple[int, int, int]] = []
    while len(found) < count:
        used = await queue.request([], [8])
        assert used.written == 8
        found.append(struct.unpack("<HHi", used.buffers[0]))
    return found


@every_python_setting
async def test_the_config_space_answers_what_it_is_asked(setting: Setting) -> None:
    async with plugged(keyboard(), setting) as p:
        assert await query(p, NAME) == b"Test keys"
        assert await query(p, SERIAL) == b""
        assert struct.unpack("<4H", await query(p, DEVIDS)) == (6, 0, 0, 1)
        keys = int.from_bytes(await query(p, BITS, EV_KEY), "little")
        assert keys >> KEY_A & 1
        assert not keys & 1
        assert int.from_bytes(await query(p, BITS, EV_LED), "little") == 7
        assert await query(p, BITS, EV_REL) == b"\1"
        assert struct.unpack("<5i", await query(p, ABS, 0)) == (-5, 1000, 0, 0, 0)
        for select, subsel in ((0, 0), (NAME, 1), (PROPS, 0), (BITS, 0), (BITS, 0x1F), (ABS, 1), (0xFF, 0xFF)):
            assert await query(p, select, subsel) == b""
        await p.guest.link.write_config(2, b"\xff" * 100)
        assert await query(p, NAME) == b"Test keys"


@every_python_setting
async def test_each_event_takes_a_buffer_and_each_report_ends(setting: Setting) -> None:
    async with plugged(keyboard(), setting) as p:
        assert press(p.device, KEY_A)
        assert press(p.device, KEY_A, 0)
        assert await events(p, 4) == [(EV_KEY, KEY_A, 1), SYN, (EV_KEY, KEY_A, 0), SYN]
        p.device.source.emit([InputEvent(EV_REL, 0, -7), InputEvent(EV_ABS, 0, 3)])  # type: ignore[attr-defined]
        assert await events(p, 3) == [(EV_REL, 0, -7), (EV_ABS, 0, 3), SYN]


@every_python_setting
async def test_a_guest_that_does_not_read_is_brought_up_to_date_in_one_report(setting: Setting) -> None:
    async with plugged(keyboard(), setting) as p:
        press(p.device, KEY_A)
        assert await events(p, 2) == [(EV_KEY, KEY_A, 1), SYN]
        press(p.device, KEY_A, 0)
        for n in range(PENDING_MAX):
            press(p.device, KEY_B, (n + 1) % 2)
        press(p.device, KEY_B, 1)
        come: list[tuple[int, int, int]] = []
        while not come or come[-1] != (EV_KEY, KEY_B, 1):
            come += await events(p, 1)
            assert len(come) <= PENDING_MAX
        assert DROPPED in come
        assert (EV_KEY, KEY_A, 0) in come


@every_python_setting
async def test_without_a_driver_nothing_waits_and_a_key_still_held_is_told_when_one_comes(setting: Setting) -> None:
    async with plugged(keyboard(), setting, start=False) as p:
        assert not press(p.device, KEY_A)
        assert not press(p.device, KEY_B)
        assert not press(p.device, KEY_A, 0)
        await p.guest.start()
        assert await events(p, 2) == [(EV_KEY, KEY_B, 1), SYN]


@every_python_setting
async def test_buffers_that_are_too_small_come_back_and_cost_no_event(setting: Setting) -> None:
    async with plugged(keyboard(), setting) as p:
        press(p.device, KEY_A)
        queue = p.guest.queues[EVENT_QUEUE]
        assert (await queue.request([], [7])).written == 0
        assert (await queue.request([b"x" * 8], [])).written == 0
        assert await events(p, 2) == [(EV_KEY, KEY_A, 1), SYN]
        assert p.op("event", EVENT_QUEUE) == (4, 2)
        status = p.guest.queues[STATUS_QUEUE]
        for data in (b"short", struct.pack("<HHi", EV_LED, 99, 1), struct.pack("<HHi", EV_LED, 0xFFFF, 1)):
            assert (await status.request([data], [])).written == 0
        await status.request([], [8])
        assert p.op("status", STATUS_QUEUE) == (4, 4)
        await status.request([struct.pack("<HHi", EV_KEY, KEY_A, 1)], [])  # not for us
        assert p.op("status", STATUS_QUEUE) == (5, 4)


@every_python_setting
async def test_an_event_dropped_while_a_buffer_was_waited_for_leaves_the_buffer_to_the_next_one(
    setting: Setting,
) -> None:
    async with plugged(keyboard(), setting) as p:
        assert isinstance(p.device, Input)
        queue = p.guest.queues[EVENT_QUEUE]
        press(p.device, KEY_A)
        press(p.device, KEY_A, 0)
        await trio.testing.wait_all_tasks_blocked()
        p.device.events.catch_up()  # of no key has the guest to be told any more
        queue.driver.add([], [8])
        queue.kick()
        await trio.testing.wait_all_tasks_blocked()
        assert not queue.driver.has_used()
        press(p.device, KEY_B)
        (used,) = await queue.used()
        assert struct.unpack("<HHi", used.buffers[0][: used.written]) == (EV_KEY, KEY_B, 1)
        assert await events(p, 1) == [SYN]


CHAINS = st.tuples(st.sampled_from([EVENT_QUEUE, STATUS_QUEUE]), st.binary(max_size=20), st.integers(0, 20))


@settings(max_examples=60, deadline=None)
@given(st.lists(CHAINS, max_size=20), st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=4)), max_size=8))
def test_whatever_a_driver_sends_and_asks_every_buffer_comes_back_or_waits(
    chains: list[tuple[int, bytes, int]], questions: list[tuple[int, bytes]]
) -> None:
    async def scenario() -> None:
        device = keyboard()
        async with attach(device) as driver:
            for offset, data in questions:
                driver.write_config(offset, data[: 256 - offset])
                space = driver.read_config(0, 136)
                assert space[2] <= 128
                assert not any(space[8 + space[2] :])
            sent = [0, 0]
            for queue, readable, room in chains:
                if readable or room:
                    driver.post(queue, readable, room)
                    sent[queue] += 1
            if sent[STATUS_QUEUE]:
                assert [data for _, data in await driver.answers(STATUS_QUEUE, sent[STATUS_QUEUE])] == [b""] * sent[1]
            driver.post(EVENT_QUEUE, writable=8)
            press(device, KEY_A)
            driver.post(EVENT_QUEUE, writable=8)
            told: list[bytes] = []
            while len(told) < 2:  # some of the buffers above may be good ones
                told += [data for _, data in await driver.answers(EVENT_QUEUE) if data]
            assert told[:2] == [struct.pack("<HHi", EV_KEY, KEY_A, 1), bytes(8)]
            assert not any(queue.broken for queue in driver._backend.stats().queues)

    trio.run(scenario)


async def test_keys_are_pressed_and_lights_are_seen_over_the_control_socket(tmp_path: Path) -> None:
    path = tmp_path / "c"
    async with plugged(keyboard(path), Setting("waist", "split")) as p, talking(path) as client:
        assert await client.command("key KEY_A tap") == ["ok"]
        assert await events(p, 4) == [(EV_KEY, KEY_A, 1), SYN, (EV_KEY, KEY_A, 0), SYN]
        assert await client.command("place ABS_X 12; move REL_X -1;key KEY_30 press") == ["ok"]
        assert await events(p, 4) == [(EV_ABS, 0, 12), (EV_REL, 0, -1), (EV_KEY, KEY_A, 1), SYN]
        assert await client.command("watch") == ["ok"]
        await p.guest.queues[STATUS_QUEUE].request([struct.pack("<HHi", EV_LED, 1, 1)], [])
        assert await client.line() == "light LED_CAPSL 1"


@pytest.mark.parametrize(
    "command",
    [
        "key",
        "key KEY_A",
        "key KEY_A hold",
        "key KEY_NONE tap",
        "key BTN_LEFT tap",
        "key REL_X tap",
        "move REL_Y 1",
        "place ABS_X 1001",
        "place ABS_X x",
        "move REL_X 99999999999",
        "key KEY_A tap;",
        "key KEY_²  tap",
    ],
)
async def test_a_wrong_command_sends_nothing(tmp_path: Path, command: str) -> None:
    path = tmp_path / "c"
    async with plugged(keyboard(path), Setting("waist", "split")) as p, talking(path) as client:
        (answer,) = await client.command(command)
        assert answer.startswith("error ")
        assert await client.command("key KEY_B press") == ["ok"]
        assert await events(p, 1) == [(EV_KEY, KEY_B, 1)]


async def test_who_sends_events_to_no_driver_is_told(tmp_path: Path) -> None:
    path = tmp_path / "c"
    async with plugged(keyboard(path), Setting("waist", "split"), start=False), talking(path) as client:
        assert await client.command("key KEY_A tap") == ["error no guest's driver runs"]


def scripted(folder: Path, text: str, control: Path | None = None) -> Input:
    (folder / "events").write_text(text)
    return Input("keyboard", InputOptions(script=folder / "events", control=control), 2, 64)


TAPPED = [(EV_KEY, KEY_A, 1), SYN, (EV_KEY, KEY_A, 0), SYN]


@every_python_setting
async def test_a_script_is_played_to_the_driver_that_starts_beside_the_live_events(
    setting: Setting, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    async with plugged(scripted(tmp_path, "wait 0.01\nkey KEY_A tap\n", path), setting) as p, talking(path) as client:
        assert await events(p, 4) == TAPPED
        assert await client.command("key KEY_B press") == ["ok"]
        assert await events(p, 2) == [(EV_KEY, KEY_B, 1), SYN]


@every_python_setting
async def test_a_script_that_repeats_goes_on(setting: Setting, tmp_path: Path) -> None:
    async with plugged(scripted(tmp_path, "key KEY_A tap\nwait 0.001\nrepeat"), setting) as p:
        assert await events(p, 12) == 3 * TAPPED


@every_python_setting
async def test_each_driver_that_starts_hears_the_script_from_its_beginning(setting: Setting, tmp_path: Path) -> None:
    async with plugged(scripted(tmp_path, "key KEY_A tap\nwait 86400\nkey KEY_B tap"), setting) as p:
        assert await events(p, 4) == TAPPED
        await p.guest.link.reset()
        p.guest.forget_queues()
        await p.guest.start()
        assert await events(p, 4) == TAPPED


@every_python_setting
async def test_a_driver_that_is_paused_hears_the_rest_and_nothing_twice(setting: Setting, tmp_path: Path) -> None:
    async with plugged(scripted(tmp_path, "key KEY_A press\nwait 86400\nkey KEY_B tap"), setting) as p:
        assert await events(p, 2) == [(EV_KEY, KEY_A, 1), SYN]
        base = await p.guest.link.stop(EVENT_QUEUE)
        await p.guest.start_queue(EVENT_QUEUE, base)
        for value in (1, 0):  # and nothing of A between them: it is down already, and its line has been played
            press(p.device, KEY_B, value)
            assert await events(p, 2) == [(EV_KEY, KEY_B, value), SYN]


async def test_an_address_that_is_missing_does_not_start_the_script_anew(tmp_path: Path) -> None:
    """Behind an IOMMU a queue begins at the same place of its ring again once the front-end has answered."""
    async with plugged(scripted(tmp_path, "key KEY_A tap"), Setting("waist", "split"), start=False) as p:
        link, memory = p.guest.link, p.guest.memory
        p.guest.features = await link.device_features() & ~F_RING_PACKED
        await link.negotiate(p.guest.features)
        await link.share(memory)
        queue = p.guest.add_queue(64)
        driver = queue.driver
        await link.set_up(EVENT_QUEUE, driver.size, (driver.desc, driver.avail, driver.used_area), 0)
        await link.set_call(EVENT_QUEUE, queue.call_fd)
        await link.set_kick(EVENT_QUEUE, queue.kick_fd)
        await link.enable(EVENT_QUEUE, True)
        with trio.fail_after(GUARD):
            assert isinstance(await p.backend.next_event(), IotlbMiss)
        await p.backend.iotlb_update(memory.gpa, memory.size, memory.uva, int(Permission.READ | Permission.WRITE))
        assert await events(p, 4) == TAPPED
        press(p.device, KEY_B)
        assert await events(p, 2) == [(EV_KEY, KEY_B, 1), SYN]


async def test_a_driver_that_another_daemon_served_before_is_not_typed_at_again(tmp_path: Path) -> None:
    async with plugged(scripted(tmp_path, "key KEY_A tap"), Setting("waist", "split"), start=False) as p:
        await p.guest.start()
        assert await events(p, 4) == TAPPED
        base = await p.guest.link.stop(EVENT_QUEUE)
        async with contextlib.AsyncExitStack() as stack:
            other = scripted(tmp_path, "key KEY_A tap")
            stack.callback(other.close)
            moved = await stack.enter_async_context(Backend(other))
            p.guest.link = WaistLink(moved)
            await p.guest.link.negotiate(p.guest.features)
            await p.guest.link.share(p.guest.memory)
            await p.guest.start_queue(EVENT_QUEUE, base)
            press(other, KEY_B)
            assert await events(p, 2) == [(EV_KEY, KEY_B, 1), SYN]


def test_a_wrong_script_is_a_clear_error_where_nothing_checked_it_before(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=re.escape(f"{tmp_path}/events:2: this device has no BTN_LEFT here")):
        scripted(tmp_path, "key KEY_A tap\nkey BTN_LEFT tap")


STEPS = st.lists(st.tuples(st.sampled_from(["press", "take"]), st.integers(1, 5), st.integers(0, 1)), max_size=60)


@given(STEPS, st.integers(0, 300))
def test_the_guest_always_ends_up_knowing_which_keys_are_down(steps: list[tuple[str, int, int]], flood: int) -> None:
    queue, down = EventQueue(), dict.fromkeys(range(1, 6), 0)
    seen = dict(down)

    def take() -> bool:
        event = queue.take()
        if event is not None and event.type == EV_KEY:
            seen[event.code] = event.value
        return event is not None

    for step, code, value in steps:
        if step == "take":
            take()
        for _ in range(flood if step == "press" else 0):
            queue.put([InputEvent(EV_KEY, code, value)])
            down[code] = value
    while take():
        pass
    assert seen == down


def test_our_names_are_those_of_the_kernels_header() -> None:
    header = Path("/usr/include/linux/input-event-codes.h")
    found = dict(re.findall(r"^#define\s+((?:KEY|BTN|REL|ABS|LED)_\w+)\s+(0x[0-9a-f]+|\d+)", header.read_text(), re.M))
    assert {name: int(found[name], 0) for name in CODES} == {name: code for name, (_, code) in CODES.items()}
    assert parse_code("KEY_240") == (EV_KEY, 240)
