"""The back ends of input, gpio and i2c on devices that a real kernel has: what it does beside what we think it does.

They need /dev/uinput, a chip of gpio-mockup, an adapter of i2c-virtio with a 24C02 at 0x50, and i2c-stub's adapter.
tests/nested/test_pins.py runs them in a machine that has all of these. No other device of a host is touched.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from kit.host import uinput
from kit.host.uinput import EV_ABS, EV_KEY, EV_LED, REPORT, InputDevice, read_events

from virtio.devices.gpio import uapi as gpio_uapi
from virtio.devices.gpio.device import Gpio
from virtio.devices.gpio.options import GpioOptions
from virtio.devices.i2c.device import I2c
from virtio.devices.i2c.options import I2cOptions
from virtio.devices.input.device import Input
from virtio.devices.input.options import InputOptions
from virtio.errors import HostError
from virtio.testing import TestDriver, attach

# --- an input device ---

KEY_A, KEY_B, KEY_C = 30, 48, 46
ABS_X = 0
LED_CAPSL = 1
IDS = (3, 0x1234, 0x5678, 0x111)
EVENTS, STATUS = 0, 1


@pytest.fixture
def keyboard() -> Iterator[InputDevice]:
    if not os.access(uinput.NODE, os.W_OK):
        pytest.skip(f"{uinput.NODE} is not here, or not ours: the kernel's uinput makes input devices")
    codes = {EV_KEY: [KEY_A, KEY_B, KEY_C], EV_ABS: [ABS_X], EV_LED: [LED_CAPSL]}
    with InputDevice("A test's keyboard", codes, IDS) as made:
        yield made


def on(keyboard: InputDevice, *, grab: bool = True) -> Input:
    return Input("keys", InputOptions(backend="evdev", evdev=keyboard.path, grab=grab), 2, 64)


async def events(driver: TestDriver, count: int) -> list[uinput.Event]:
    return [struct.unpack("<HHi", await driver.request(EVENTS, writable=8)) for _ in range(count)]


async def test_the_guest_is_told_what_the_device_is(keyboard: InputDevice) -> None:
    async with attach(on(keyboard)) as driver:

        def asked(select: int, subsel: int = 0) -> bytes:
            driver.write_config(0, bytes([select, subsel]))
            return driver.read_config(8, driver.read_config(2, 1)[0])

        assert asked(0x01) == b"A test's keyboard"
        assert asked(0x03) == struct.pack("<4H", *IDS)
        assert int.from_bytes(asked(0x11, EV_KEY), "little") == 1 << KEY_A | 1 << KEY_B | 1 << KEY_C
        assert int.from_bytes(asked(0x11, EV_LED), "little") == 1 << LED_CAPSL
        assert asked(0x11, 2) == b"", "it has no relative axes"
        assert asked(0x12, ABS_X) == struct.pack("<5i", -100, 100, 1, 2, 3)


async def test_reports_reach_the_guest_whole_and_in_their_order(keyboard: InputDevice) -> None:
    async with attach(on(keyboard)) as driver:
        sent = [
            (EV_KEY, KEY_A, 1),
            REPORT,
            (EV_KEY, KEY_B, 1),
            (EV_ABS, ABS_X, -100),
            REPORT,
            (EV_KEY, KEY_A, 0),
            REPORT,
        ]
        keyboard.send(*sent)
        assert await events(driver, len(sent)) == sent


async def test_what_is_grabbed_nobody_else_sees_until_it_is_let_go(keyboard: InputDevice) -> None:
    other = os.open(keyboard.path, os.O_RDONLY | os.O_NONBLOCK)
    pressed, released = [(EV_KEY, KEY_A, 1), REPORT], [(EV_KEY, KEY_A, 0), REPORT]
    async with attach(on(keyboard)) as driver:
        with pytest.raises(HostError, match="somebody else has grabbed it"):
            on(keyboard)
        keyboard.send(*pressed)
        assert await events(driver, 2) == pressed
        assert read_events(other) == []
    keyboard.send(*released)
    assert read_events(other) == released
    async with attach(on(keyboard, grab=False)) as driver:
        keyboard.send(*pressed)
        assert await events(driver, 2) == pressed
        assert read_events(other) == pressed
    os.close(other)


async def test_a_light_that_the_guest_switches_shines_and_is_not_told_back(keyboard: InputDevice) -> None:
    async with attach(on(keyboard)) as driver:
        await driver.request(STATUS, struct.pack("<HHi", EV_LED, LED_CAPSL, 1))
        assert (EV_LED, LED_CAPSL, 1) in keyboard.lights()
        # The kernel gives the light to all who read the device, to us too. A guest would switch it again if it heard.
        keyboard.send((EV_KEY, KEY_A, 1), REPORT)
        assert await events(driver, 2) == [(EV_KEY, KEY_A, 1), REPORT]
        await driver.request(STATUS, struct.pack("<HHi", EV_LED, 5, 1))
        assert keyboard.lights() == [], "it has no such light"


async def test_after_more_than_the_kernel_keeps_the_guest_knows_which_keys_are_down(keyboard: InputDevice) -> None:
    async with attach(on(keyboard)) as driver:
        sent = []
        for _ in range(500):  # at once, without a chance for us to read
            sent += [(EV_KEY, KEY_A, 1), REPORT, (EV_KEY, KEY_A, 0), REPORT]
        sent += [(EV_KEY, KEY_B, 1), (EV_ABS, ABS_X, 77), REPORT]
        keyboard.send(*sent)
        come: list[uinput.Event] = []
        state: dict[tuple[int, int], int] = {}
        while state.get((EV_KEY, KEY_B)) != 1 or come[-1] != REPORT:
            come += await events(driver, 1)
            state[come[-1][:2]] = come[-1][2]
        assert len(come) < len(sent), "nothing was lost, so this shows nothing"
        assert state.get((EV_KEY, KEY_A), 0) == 0
        assert state[EV_ABS, ABS_X] == 77


async def test_an_unplugged_device_leaves_no_key_down_and_its_guest_running(keyboard: InputDevice) -> None:
    async with attach(on(keyboard)) as driver:
        keyboard.send((EV_KEY, KEY_A, 1), REPORT)
        assert await events(driver, 2) == [(EV_KEY, KEY_A, 1), REPORT]
        keyboard.unplug()
        assert await events(driver, 2) == [(EV_KEY, KEY_A, 0), REPORT]
        assert await driver.request(STATUS, struct.pack("<HHi", EV_LED, LED_CAPSL, 1)) == b""


# --- a GPIO chip ---

MOCKUP = Path("/sys/kernel/debug/gpio-mockup")
NONE, OUT, IN = 0, 1, 2
RISING, FALLING, BOTH, HIGH, LOW = 1, 2, 3, 4, 8
NAMES, GET_DIRECTION, SET_DIRECTION, GET_VALUE, SET_VALUE, SET_IRQ = range(1, 7)
OK, ERR = b"\0", b"\1"
VALID = b"\1"
BUTTON, LED = 0, 1  # the guest's numbers
PLACES = {BUTTON: 2, LED: 0}  # the chip's


class Chip:
    """The chip, and its lines as somebody with a wire and a lamp has them."""

    def __init__(self) -> None:
        if not os.access(MOCKUP, os.R_OK | os.X_OK):
            pytest.skip(f"{MOCKUP} is not here: as root, with gpio-mockup loaded (gpio_mockup_ranges=-1,4) it is")
        self._lines = sorted(MOCKUP.iterdir())[0]
        self.path = Path("/dev", self._lines.name)

    def drive(self, line: int, level: int) -> None:
        (self._lines / str(PLACES[line])).write_text(f"{level}\n")

    def look(self, line: int) -> int:
        return int((self._lines / str(PLACES[line])).read_text())

    def taken_by(self, line: int) -> str:
        fd = os.open(self.path, os.O_RDWR)
        found = gpio_uapi.line_info(fd, PLACES[line], "chip")
        os.close(fd)
        return found.consumer if found.flags & gpio_uapi.LINE_FLAG_USED else ""


@pytest.fixture
def chip() -> Iterator[Chip]:
    made = Chip()
    for line in PLACES:
        made.drive(line, 0)
    yield made
    assert [made.taken_by(line) for line in PLACES] == ["", ""], "not all was given back"


class Pins:
    def __init__(self, driver: TestDriver) -> None:
        self.driver = driver

    async def ask(self, kind: int, line: int, value: int = 0) -> bytes:
        return await self.driver.request(0, struct.pack("<HHI", kind, line, value), 2)

    async def set(self, kind: int, line: int, value: int) -> None:
        assert await self.ask(kind, line, value) == OK + b"\0"

    async def get(self, line: int) -> int:
        answer = await self.ask(GET_VALUE, line)
        assert answer[:1] == OK
        return answer[1]

    def unmask(self, line: int) -> None:
        self.driver.post(1, struct.pack("<H", line), 1)

    async def interrupt(self) -> None:
        """Exactly one."""
        assert [answer for _, answer in await self.driver.answers(1)] == [VALID]

    def none(self) -> bool:
        return not self.driver.queues[1].driver.used()


@asynccontextmanager
async def pins_of(chip: Chip) -> AsyncIterator[Pins]:
    options = GpioOptions(backend="chip", chip=chip.path, lines=(PLACES[BUTTON], PLACES[LED]))
    async with attach(Gpio("pins", options, 2, 64)) as driver:
        yield Pins(driver)


async def test_lines_of_a_chip_are_driven_and_read_and_given_back(chip: Chip) -> None:
    async with pins_of(chip) as pins:
        assert chip.taken_by(LED) == ""
        await pins.set(SET_VALUE, LED, 1)
        await pins.set(SET_DIRECTION, LED, OUT)
        assert (chip.look(LED), chip.taken_by(LED)) == (1, "hyperbell")
        await pins.set(SET_VALUE, LED, 0)
        assert chip.look(LED) == 0
        chip.drive(BUTTON, 1)
        assert await pins.get(BUTTON) == 1, "before it has a direction"
        await pins.set(SET_DIRECTION, BUTTON, IN)
        assert await pins.get(BUTTON) == 1
        chip.drive(BUTTON, 0)
        assert await pins.get(BUTTON) == 0
        await pins.set(SET_DIRECTION, BUTTON, OUT)
        await pins.set(SET_VALUE, BUTTON, 1)
        assert chip.look(BUTTON) == 1
        await pins.set(SET_DIRECTION, BUTTON, NONE)
        assert chip.taken_by(BUTTON) == ""


async def test_edges_of_a_chip_come_as_they_were_asked_for(chip: Chip) -> None:
    async with pins_of(chip) as pins:
        await pins.set(SET_DIRECTION, BUTTON, IN)
        for asked, wanted in ((RISING, (1,)), (FALLING, (0,)), (BOTH, (1, 0))):
            await pins.set(SET_IRQ, BUTTON, asked)
            pins.unmask(BUTTON)
            for level in (1, 0, 1, 0):
                chip.drive(BUTTON, level)
                assert await pins.get(BUTTON) == level
                if level in wanted:
                    await pins.interrupt()
                    pins.unmask(BUTTON)
                else:
                    assert pins.none()
            await pins.set(SET_IRQ, BUTTON, 0)
            assert [answer for _, answer in await pins.driver.answers(1)] == [b"\0"], "5.18.6.8: it comes back invalid"
            chip.drive(BUTTON, 1)
            chip.drive(BUTTON, 0)
        assert await pins.ask(SET_DIRECTION, BUTTON, OUT) == OK + b"\0", "it has no interrupt any more"


async def test_an_edge_of_a_masked_line_is_kept_and_told_once(chip: Chip) -> None:
    async with pins_of(chip) as pins:
        await pins.set(SET_DIRECTION, BUTTON, IN)
        await pins.set(SET_IRQ, BUTTON, RISING)
        await pins.set(SET_DIRECTION, LED, IN)
        await pins.set(SET_IRQ, LED, RISING)
        pins.unmask(LED)
        for level in (1, 0, 1, 0):
            chip.drive(BUTTON, level)
            await pins.get(BUTTON)
        chip.drive(LED, 1)  # once its edge is here, those before are too
        await pins.interrupt()
        pins.unmask(BUTTON)
        await pins.interrupt()
        pins.unmask(BUTTON)
        await pins.get(BUTTON)
        assert pins.none()


async def test_levels_of_a_chip_interrupt_while_they_last(chip: Chip) -> None:
    async with pins_of(chip) as pins:
        await pins.set(SET_DIRECTION, BUTTON, IN)
        for asked, level in ((HIGH, 1), (LOW, 0)):
            chip.drive(BUTTON, 1 - level)
            await pins.set(SET_IRQ, BUTTON, asked)
            pins.unmask(BUTTON)
            await pins.get(BUTTON)
            assert pins.none()
            chip.drive(BUTTON, level)
            for _ in range(3):
                await pins.interrupt()
                pins.unmask(BUTTON)
            await pins.interrupt()
            chip.drive(BUTTON, 1 - level)
            pins.unmask(BUTTON)
            await pins.set(SET_IRQ, BUTTON, 0)
            assert [answer for _, answer in await pins.driver.answers(1)] == [b"\0"]


async def test_a_line_that_somebody_else_has_is_refused_until_it_is_free(chip: Chip) -> None:
    fd = os.open(chip.path, os.O_RDWR)
    line = gpio_uapi.request_line(fd, PLACES[LED], gpio_uapi.LINE_FLAG_INPUT, False, "chip")
    async with pins_of(chip) as pins:
        assert await pins.ask(SET_DIRECTION, LED, OUT) == ERR + b"\0"
        assert await pins.ask(GET_VALUE, LED) == ERR + b"\0"
        os.close(line)
        await pins.set(SET_DIRECTION, LED, OUT)
    os.close(fd)


async def test_a_reset_of_the_guest_gives_all_lines_back(chip: Chip) -> None:
    async with pins_of(chip) as pins:
        await pins.set(SET_DIRECTION, BUTTON, IN)
        await pins.set(SET_IRQ, BUTTON, BOTH)
        await pins.set(SET_DIRECTION, LED, OUT)
        assert [chip.taken_by(line) for line in PLACES] == ["hyperbell", "hyperbell"]
        await pins.driver.reset()
        assert [chip.taken_by(line) for line in PLACES] == ["", ""]
        await pins.set(SET_DIRECTION, BUTTON, IN)
        await pins.set(SET_IRQ, BUTTON, RISING)
        pins.unmask(BUTTON)
        chip.drive(BUTTON, 1)
        await pins.interrupt()


# --- an I2C adapter ---

EEPROM, ABSENT = 0x50, 0x51
NEXT, READ = 1, 2


def adapter_called(name: str, what: str) -> Path:
    for found in Path("/sys/class/i2c-dev").glob("i2c-*"):
        if (found / "name").read_text().startswith(name):
            return Path("/dev", found.name)
    pytest.skip(f"no I2C adapter is called {name!r} here: with i2c-dev and {what} there is one")


@pytest.fixture
def real() -> Path:
    """An adapter that transfers what it is given; its chips are the hypervisor's."""
    return adapter_called("i2c_virtio", "an I2C device of the hypervisor's")


@pytest.fixture
def lesser() -> Path:
    return adapter_called("SMBus stub", "i2c-stub (chip_addr=0x51)")


def bus(path: Path, *addresses: int) -> I2c:
    return I2c("bus", I2cOptions(backend="adapter", adapter=path, addresses=addresses), 1, 64)


async def test_the_chips_of_a_real_adapter_are_read_and_written(real: Path) -> None:
    async with attach(bus(real, EEPROM, ABSENT)) as driver:

        async def ask(address: int, flags: int, data: bytes = b"", room: int = 0) -> bytes:
            return await driver.request(0, struct.pack("<HHI", address << 1, 0, flags) + data, room + 1)

        assert await ask(EEPROM, 0) == OK, "it is there"
        assert await ask(ABSENT, 0) == ERR, "nobody is there"
        assert await ask(0x52, 0) == ERR, "none of the guest's"
        assert await ask(EEPROM, 0, b"\x10pin test") == OK
        # Where to read from and the reading are one transaction.
        queue = driver.queues[0]
        queue.driver.add([struct.pack("<HHI", EEPROM << 1, 0, NEXT), b"\x10"], [1])
        queue.driver.add([struct.pack("<HHI", EEPROM << 1, 0, READ)], [8, 1])
        queue.kick()
        assert [answer for _, answer in await driver.answers(0, 2)] == [OK, b"pin test" + OK]
        assert await ask(EEPROM, 0, b"\x14") == OK
        assert await ask(EEPROM, READ, room=4) == b"test" + OK


def test_what_a_real_adapter_cannot_do_is_said_at_the_start(real: Path, lesser: Path) -> None:
    with pytest.raises(HostError, match=f"{lesser} knows SMBus commands only"):
        bus(lesser, ABSENT)
    with pytest.raises(HostError, match=f"{real} has no addresses of ten bits"):
        bus(real, 0x150)
