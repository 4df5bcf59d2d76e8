"""Simulated keys, GPIO lines and I2C chips for a Linux guest, and the kernel and the drivers that it needs for them."""

from __future__ import annotations

from kit.host.line_client import Talker

from guest.boot.console import Console
from guest.debian.kernel import GENERIC_META_PACKAGE, Kernel, prepare_kernel
from guest.debian.kernel_source import prepare_drivers

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
LINES = "/tmp/lines"
I2C = "/sys/bus/i2c/devices/i2c-0"


def kernel_and_drivers() -> tuple[Kernel, dict[str, bytes]]:
    """Debian's generic kernel, and the modules by their names."""
    kernel = prepare_kernel(print, GENERIC_META_PACKAGE)
    return kernel, prepare_drivers(kernel, print)


async def lines_are_driven_and_read(guest: Console) -> None:
    """The chip is found by its label, for a board may have another. The two lines are under ``LINES`` from then on."""
    answer = await guest.run(
        f"chip=$(grep -l '^virtio' {GPIO}/gpiochip*/label) && chip=${{chip%/label}} && base=$(cat $chip/base) &&"
        f"result lines $(cat $chip/ngpio) && mkdir {LINES} &&"
        f"for n in 0 1; do echo $((base + n)) >{GPIO}/export; done &&"
        # Linux 7.3 calls an exported line by its number, older ones by its name where it has one.
        f"for each in 0:button 1:led; do for line in {GPIO}/${{each#*:}} {GPIO}/gpio$((base + ${{each%:*}})); do"
        f" [ ! -e $line ] || ln -s $line {LINES}/${{each#*:}}; done; done &&"
        f"echo high >{LINES}/led/direction && echo in >{LINES}/button/direction &&"
        f"result led $(cat {LINES}/led/value) && result button $(cat {LINES}/button/value)"
    )
    assert (answer.results["lines"], answer.results["led"], answer.results["button"]) == ("4", "1", "0")


KEYBOARD_LABEL = "Test keys"
# struct input_event of a guest with 64 bits: 16 bytes of time, which are cut off later, type, code, value.
DUMP = '8/2 "%x " 1/2 " %u " 1/2 "%u " 1/4 "%d\\n"'
PRESSED = (
    "key KEY_A press",
    "key KEY_LEFTSHIFT press; key KEY_A release",
    "key KEY_LEFTSHIFT release",
    "key KEY_B tap",
)
EVENTS = ["1 30 1", "0 0 0", "1 42 1", "1 30 0", "0 0 0", "1 42 0", "0 0 0", "1 48 1", "0 0 0", "1 48 0", "0 0 0"]
CAPS_LOCK_ON = "\\0" * 16 + "\\21\\0\\1\\0\\1\\0\\0\\0"


async def keys_arrive_and_a_light_is_told(guest: Console, keys: Talker) -> None:
    """By way of the guest's /dev/input; ``keys`` is at the control socket of an input device called as above."""
    answer = await guest.run(
        f"name=$(grep -l '^{KEYBOARD_LABEL}$' /sys/class/input/event*/device/name); event=${{name#/sys/class/input/}};"
        "event=${event%%/*}; result event $event;"
        f"hexdump -v -n {24 * len(EVENTS)} -e '{DUMP}' </dev/input/$event >/tmp/keys & "
        # What comes before it has opened the device is nobody's.
        "until ls -l /proc/$!/fd 2>/dev/null | grep -q /dev/input/$event; do usleep 10000; done"
    )
    for report in PRESSED:
        assert await keys.command(report) == ["ok"]
    assert (await guest.run("wait $! && cut -d ' ' -f 9- /tmp/keys")).lines == EVENTS
    assert await keys.command("watch") == ["ok"]
    await guest.run(f"printf '{CAPS_LOCK_ON}' >/dev/input/{answer.results['event']}")
    assert await keys.line() == "light LED_CAPSL 1"
