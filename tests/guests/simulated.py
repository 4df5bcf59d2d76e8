"""Simulated GPIO lines and I2C chips for a Linux guest, and the kernel and the drivers that it needs for them."""

from __future__ import annotations

import pytest

from guest.cache import PrepareError
from guest.kernel import GENERIC_META_PACKAGE, Kernel, prepare_kernel
from guest.kernel_source import prepare_drivers
from guest.machine import Guest

PINS_AND_BUS = """
[devices.pins]
type = "gpio"
socket = "pins.sock"
lines = ["button", "led", "", "Ethernet reset"]
control = "pins.control"

[devices.bus]
type = "i2c"
socket = "bus.sock"
control = "bus.control"

[[devices.bus.chips]]
address = 0x48
auto_increment = false
registers = [
    {number = 0, size = 2, value = 0x1900, writable = 0},
    {number = 1, writable = 0x7f},
    {number = 2, size = 2, value = 0x4b00},
    {number = 3, size = 2, value = 0x5000},
]

[[devices.bus.chips]]
kind = "eeprom"
address = 0x50
path = "eeprom.bin"
"""

GPIO = "/sys/class/gpio"
I2C = "/sys/bus/i2c/devices/i2c-0"


def kernel_and_drivers() -> tuple[Kernel, dict[str, bytes]]:
    """Debian's generic kernel, and the modules by their names. A machine that cannot have them skips the test."""
    try:
        kernel = prepare_kernel(print, GENERIC_META_PACKAGE)
        return kernel, prepare_drivers(kernel, print)
    except PrepareError as error:
        pytest.skip(f"no drivers for a guest here: {error}")


async def lines_are_driven_and_read(guest: Guest) -> None:
    answer = await guest.run(
        f"base=$(cat {GPIO}/gpiochip*/base); result lines $(cat {GPIO}/gpiochip*/ngpio);"
        f"for n in 0 1; do echo $((base + n)) >{GPIO}/export; done; echo high >{GPIO}/led/direction;"
        f"echo in >{GPIO}/button/direction; result led $(cat {GPIO}/led/value);"
        f"result button $(cat {GPIO}/button/value)"
    )
    assert (answer.results["lines"], answer.results["led"], answer.results["button"]) == ("4", "1", "0")
