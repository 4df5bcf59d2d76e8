"""A Linux guest with its own drivers on a simulated GPIO chip, I2C bus and keyboard.

Debian's kernels lack two of the drivers, so they are built from Debian's kernel source for its generic kernel.
QEMU 7.2 does not pass VIRTIO_GPIO_F_IRQ on, so no interrupt of a line reaches a guest here: tests/nested/test_pins.py
has them in a machine of our own. QEMU before 9.0 attaches a vhost-user input device only to guests that run with KVM;
without it the same is played there, in an emulated host that has it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from guests.simulated import (
    I2C,
    KEYBOARD_LABEL,
    LINES,
    PINS_AND_BUS,
    kernel_and_drivers,
    keys_arrive_and_a_light_is_told,
    lines_are_driven_and_read,
)
from guests.testbed import Testbed
from kit.host.line_client import talking

from daemon.attach.qemu_front_ends import GENERIC_SINCE
from daemon.attach.qemu_version import installed_version
from guest.boot.initramfs import prepare_initramfs
from guest.boot.machine import Guest, Machine
from guest.boot.service import free_port, qemu_arguments, serve

MEMORY_MIB = 256
MODULES = ("virtio_pci", "virtio_input", "evdev", "i2c-dev", "at24", "lm75")
PAGE = b"hyperbel"

DAEMON = """
[daemon]
metrics = "127.0.0.1:PORT"
"""
KEYBOARD = f"""
[devices.keyboard]
type = "input"
socket = "keyboard.sock"
label = "{KEYBOARD_LABEL}"
control = "keyboard.control"
"""


@asynccontextmanager
async def booted(testbed: Testbed, folder: Path, devices: str) -> AsyncIterator[Guest]:
    """A guest with these devices, whose drivers are loaded."""
    kernel, drivers = kernel_and_drivers()
    extra = {f"/{name}.ko": module for name, module in drivers.items()}
    initramfs = prepare_initramfs(kernel, print, MODULES, extra)
    config, port = folder / "c.toml", free_port()
    config.write_text((DAEMON + devices).replace("PORT", str(port)))
    async with serve(config, folder, port):
        arguments = await qemu_arguments(config, MEMORY_MIB)
        machine = Machine(kernel.image, initramfs, arguments, memory_mib=MEMORY_MIB)
        async with testbed.hypervisor.boot(machine) as guest:
            await guest.run(" && ".join(f"insmod /{name}.ko" for name in drivers))
            yield guest


async def test_a_guest_drives_simulated_lines_and_talks_to_simulated_chips(testbed: Testbed, folder: Path) -> None:
    async with (
        booted(testbed, folder, PINS_AND_BUS) as guest,
        talking(folder / "pins.control") as pins,
        talking(folder / "bus.control") as bus,
    ):
        await lines_are_driven_and_read(guest)
        assert (await pins.command("list"))[1] == "line 1 output 1 none led"
        await pins.command("set button 1")
        answer = await guest.run(f"result button $(cat {LINES}/button/value)")
        assert answer.results["button"] == "1"

        # The kernel's own drivers of a sensor and a memory.
        await guest.run(f"echo lm75 0x48 >{I2C}/new_device && echo 24c02 0x50 >{I2C}/new_device")
        answer = await guest.run(f"result millidegrees $(cat {I2C}/0-0048/hwmon/hwmon*/temp1_input)")
        assert answer.results["millidegrees"] == "25000"
        assert await bus.command("set 0x48 0 0xe700") == ["ok"]
        answer = await guest.run(f"result millidegrees $(cat {I2C}/0-0048/hwmon/hwmon*/temp1_input)")
        assert answer.results["millidegrees"] == "-25000"
        await guest.run(f"printf {PAGE.decode()} | dd of={I2C}/0-0050/eeprom bs=1 seek=60 2>/dev/null")
        answer = await guest.run(f"result kept $(dd if={I2C}/0-0050/eeprom bs=1 skip=60 count={len(PAGE)} 2>/dev/null)")
        assert answer.results["kept"] == PAGE.decode()
        assert (folder / "eeprom.bin").read_bytes()[60 : 60 + len(PAGE)] == PAGE

        # And by hand: who is there, and what it holds.
        await guest.run(f"echo 0x48 >{I2C}/delete_device; echo 0x50 >{I2C}/delete_device")
        answer = await guest.run("result found $(i2cdetect -y -r 0 | grep -o -E ' (48|50)'); true")
        assert answer.results["found"] == "48 50"
        answer = await guest.run("result byte $(i2cget -y 0 0x50 0x3c b); i2cset -y 0 0x50 0 0x5a b")
        assert answer.results["byte"] == hex(PAGE[0])
        assert await bus.command("get 0x50 0") == ["value 0x50 0x00 0x5a", "ok"]
        assert (await guest.run("i2cget -y 0 0x51 0 b", status=None)).status != 0


@pytest.fixture
def testbed_with_input(testbed: Testbed) -> Testbed:
    """A machine whose QEMU attaches no input device skips the test."""
    acceleration = testbed.hypervisor.acceleration
    version = installed_version()
    assert version is not None
    if acceleration.name != "kvm" and version < GENERIC_SINCE:
        where = "tests/nested/test_pins.py has it"
        pytest.skip(f"the vhost-user-input of QEMU {version} needs KVM ({acceleration.why}); {where}")
    return testbed


async def test_keys_arrive_in_a_guest(testbed_with_input: Testbed, folder: Path) -> None:
    async with booted(testbed_with_input, folder, KEYBOARD) as guest, talking(folder / "keyboard.control") as keys:
        await keys_arrive_and_a_light_is_told(guest, keys)
