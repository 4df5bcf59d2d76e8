"""Keys, GPIO interrupts and I2C in Linux guests under KVM, and our back ends on devices that a real kernel has.

In an H of its own, with Debian's generic kernel (``pins_host.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from guests.simulated import KEYBOARD_LABEL, keys_arrive_and_a_light_is_told
from kit.host.line_client import Talker
from nested.inner_tests import InnerRun, run_tests_in
from nested.laboratory import Laboratory
from nested.microvm import Microvm
from nested.pins_host import adapter_for_h, pins_images, talking_in

from guest.boot.service import qemu_arguments
from guest.nested.level import Guest, Level, LevelDaemon, NestedMachine

pytestmark = pytest.mark.nested

KEYS, PINS, BUS = (f"/run/{name}.control" for name in ("keys", "pins", "bus"))
# All kinds that QEMU 7.2 can attach. The sockets stand in /run of H.
EVERYTHING = f"""
[daemon]
metrics = "127.0.0.1:9478"

[devices.disk]
type = "blk"
backend = "memory"
size = "8M"
socket = "/run/disk.sock"

[devices.entropy]
type = "rng"
socket = "/run/entropy.sock"

[devices.lan]
type = "net"
backend = "switch"
switch = "lan"
socket = "/run/lan.sock"

[devices.sockets]
type = "vsock"
cid = 3
path = "/run/guest.vsock"
socket = "/run/vsock.sock"

[devices.keyboard]
type = "input"
socket = "/run/keyboard.sock"
label = "{KEYBOARD_LABEL}"
control = "{KEYS}"

[devices.pins]
type = "gpio"
lines = ["button", "led"]
socket = "/run/pins.sock"

[devices.bus]
type = "i2c"
socket = "/run/bus.sock"

[[devices.bus.chips]]
address = 0x48
registers = [{{number = 5, value = 0x19}}]
"""
OWN_DEVICES = (
    f"input,label={KEYBOARD_LABEL},control={KEYS}",
    f'gpio,lines=["button", "led"],control={PINS}',
    f"i2c,chips=[{{address = 0x48, registers = [{{number = 5, value = 0x19}}]}}],control={BUS}",
)


@pytest.fixture(scope="module")
def pins(request: pytest.FixtureRequest) -> Iterator[Laboratory]:
    images = pins_images()
    with adapter_for_h() as devices:
        made = Laboratory(images, devices, "pins-H")
        with made.for_session(request.session):
            yield made


def test_keys_interrupts_and_chips_reach_linux_in_a_machine_of_our_own(pins: Laboratory) -> None:
    async def scenario(host: Level) -> None:
        devices = [word for device in OWN_DEVICES for word in ("--device", device)]
        async with host.boot(Microvm(devices)) as guest:
            async with talking_in(host, KEYS, "keys") as keys:
                await keys_arrive_and_a_light_is_told(guest, keys)
            await guest.run("insmod /gpio-virtio.ko && insmod /i2c-virtio.ko")
            async with talking_in(host, PINS, "pins") as button:
                await edges_arrive_as_they_are_asked_for(guest, button)
            async with talking_in(host, BUS, "bus") as bus:
                await a_chip_is_read_and_written(guest, bus)
            await guest.power_off()

    pins.play(scenario)


async def edges_arrive_as_they_are_asked_for(guest: Guest, pins: Talker) -> None:
    """Line 0, "button", driven from outside; ``edges`` in the guest writes down what comes."""
    interrupts = 0
    for asked, driven, come in (
        ("rising", "1010", ["rising", "rising"]),
        ("falling", "1010", ["falling", "falling"]),
        ("both", "10", ["rising", "falling"]),
    ):
        await guest.run(
            f"edges /dev/gpiochip0 0 {asked} >/tmp/edges & until grep -q . /tmp/edges; do usleep 10000; done"
        )
        assert await pins.command("get button") == [f"line 0 input 0 {asked} button", "ok"]
        seen = 1  # it said that it watches
        for level in driven:
            assert await pins.command(f"set button {level}") == ["ok"]
            if ("rising" if level == "1" else "falling") in come:
                seen += 1
                await guest.run(f"until [ $(wc -l </tmp/edges) -ge {seen} ]; do usleep 10000; done")
        # Found by the name of the program that asked for it: the chip's name there differs between 6.1 and 7.3, and
        # 6.12 lists an interrupt only while a program asks for it.
        asked_for = await guest.run("result irq $(sed -n 's/^ *\\([0-9]*\\):.* edges$/\\1/p' /proc/interrupts)")
        await guest.run("kill $!; wait $! 2>/dev/null; true")
        # Nobody asks for any now: not an interrupt more, and none left over for the next one who asks.
        assert await pins.command("get button") == ["line 0 none 0 none button", "ok"]
        assert await pins.command("pulse button") == ["ok"]
        interrupts += len(come)
        counts = f"/sys/kernel/irq/{asked_for.results['irq']}/per_cpu_count"
        answer = await guest.run(f"cat /tmp/edges; result count $(cat {counts})")
        assert answer.lines[:-1] == ["watching", *come]
        assert sum(map(int, answer.results["count"].split(","))) == interrupts


async def a_chip_is_read_and_written(guest: Guest, bus: Talker) -> None:
    answer = await guest.run("result name $(cat /sys/class/i2c-dev/i2c-0/name); result byte $(i2cget -y 0 0x48 5 b)")
    assert answer.results["name"].startswith("i2c_virtio")
    assert answer.results["byte"] == "0x19"
    await guest.run("i2cset -y 0 0x48 5 0x2a b")
    assert await bus.command("get 0x48 5") == ["value 0x48 0x05 0x2a", "ok"]
    assert (await guest.run("i2cget -y 0 0x49 5 b", status=None)).status != 0


def test_a_guest_of_stock_qemu_uses_every_kind_of_device_at_once(pins: Laboratory, tmp_path: Path) -> None:
    config = tmp_path / "everything.toml"
    config.write_text(EVERYTHING)

    async def scenario(host: Level) -> None:
        machine = NestedMachine()
        words = await qemu_arguments(config, machine.memory_mib, accel="kvm")
        words = words[words.index("-chardev") :]  # its memory it has already
        machine = replace(machine, devices=[re.sub("^virtio-net-pci", r"\g<0>,romfile=", word) for word in words])
        async with (
            host.serve(EVERYTHING, "everything") as daemon,
            host.boot(machine) as guest,
            talking_in(host, KEYS, "keys-of-qemu") as keys,
        ):
            await guest.run("insmod /gpio-virtio.ko && insmod /i2c-virtio.ko")
            await drivers_have_found_their_devices(guest)
            await keys_arrive_and_a_light_is_told(guest, keys)
            await guest.run("diskcheck write write /dev/vda 0 65536 7 && diskcheck verify verify /dev/vda 0 65536 7")
            await guest.run("[ $(head -c 16 /dev/hwrng | wc -c) = 16 ]")
            await guest.run(
                "ip link set eth0 up;"
                " until [ $(cat /sys/class/net/eth0/statistics/tx_packets) -gt 0 ]; do usleep 10000; done"
            )
            # Linux 7.3 calls an exported line by its number, older ones by its name (tests/guests/simulated.py).
            await guest.run(
                "(cd /sys/class/gpio; number=$(($(cat gpiochip*/base) + 1)); echo $number >export;"
                "[ -e led ] && cd led || cd gpio$number; echo high >direction; [ $(cat value) = 1 ])"
            )
            await guest.run("[ $(i2cget -y 0 0x48 5 b) = 0x19 ]")
            await every_device_has_served(daemon)
            await guest.power_off()

    pins.play(scenario)


async def drivers_have_found_their_devices(guest: Guest) -> None:
    """Type (virtio 1.3, section 5) to driver."""
    answer = await guest.run(
        "for device in /sys/bus/virtio/devices/*; do"
        " result $(cat $device/device) $(basename $(readlink $device/driver)); done"
    )
    assert answer.results == {
        "0x0001": "virtio_net",
        "0x0002": "virtio_blk",
        "0x0004": "virtio_rng",
        "0x0012": "virtio_input",
        "0x0013": "vmw_vsock_virtio_transport",
        "0x0022": "i2c_virtio",
        "0x0029": "gpio_virtio",
    }


async def every_device_has_served(daemon: LevelDaemon) -> None:
    metrics = await daemon.metrics()
    assert metrics.total("hyperbell_queue_broken") == 0
    requests = metrics.by("device", "hyperbell_requests_total")
    for device in ("disk", "entropy", "lan", "keyboard", "pins", "bus"):
        assert requests[device] > 0, device
    assert metrics.total("hyperbell_frontend_connected", device="sockets") == 1


def test_back_ends_work_on_devices_of_a_real_kernel(pins: Laboratory) -> None:
    async def scenario(host: Level) -> InnerRun:
        for module in ("i2c-virtio", "i2c-stub chip_addr=0x51", "gpio-mockup gpio_mockup_ranges=-1,4"):
            name, _, options = module.partition(" ")
            await host.run(f"insmod /{name}.ko {options}")
        return await run_tests_in(host, ["test_pins_real"], "", 200)

    run = pins.play(scenario)
    assert len(run.outcomes) > 8, run.text
    assert run.not_passed == {}, run.text
