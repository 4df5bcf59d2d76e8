"""User-mode Linux with a driver for every type of device that we have: a device of each works, with default keys.

Part of ``make test-ground``, which builds those kernels and says which one a run is about. Debian's own kernels have
drivers of four types only: test_uml.py.
"""

from __future__ import annotations

import os
import re
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from guests.simulated import KEYBOARD_LABEL, PINS_AND_BUS, keys_arrive_and_a_light_is_told, lines_are_driven_and_read
from guests.uses import (
    FOUR_DEVICES,
    FOUR_TYPES,
    LEASE,
    MIB,
    SIXES,
    chips_are_found,
    disk_keeps,
    page_comes_from_the_host,
    random_bytes_and_sixes_come,
    terminal_speaks_both_ways,
)
from guests.vsock_conversations import guest_to_host, host_to_guest
from kit.conversation.file import TYPES
from kit.front_end.message_relay import notifies, relay
from kit.host.line_client import Talker, talking

from guest.boot.console import Console
from guest.boot.initramfs import compiled_program, prepare_initramfs
from guest.boot.service import Daemon, free_port, serve
from guest.boot.uml import UmlDevice, boot_uml
from guest.boot.uml_kernel import prepare_uml_kernel
from guest.debian.kernel import Kernel

pytestmark = pytest.mark.ground

DEVICES = FOUR_TYPES | {"entropy": 4, "keyboard": 18, "sixes": 4, "pins": 41, "bus": 34}
CONFIG = f"""{FOUR_DEVICES}
[devices.entropy]
type = "rng"
socket = "entropy.sock"

[devices.keyboard]
type = "input"
socket = "keyboard.sock"
label = "{KEYBOARD_LABEL}"
control = "keyboard.control"

[devices.sixes]
type = "./sixes.py:Sixes"
socket = "sixes.sock"
{PINS_AND_BUS}"""


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    return prepare_uml_kernel(print)


@pytest.mark.parametrize("inband", [False, True], ids=["descriptors", "inband"])
async def test_a_device_of_every_type_works_with_default_keys_and_by_messages_where_they_are_offered(
    kernel: Kernel, folder: Path, inband: bool
) -> None:
    assert {match[1] for match in re.finditer(r'type = "(\w+)"', CONFIG)} == set(TYPES) - {"own"}
    extra = {"/bin/vsockcat": compiled_program("vsockcat", ["vsockcat.c"], print), "/bin/lease": LEASE}
    initramfs = prepare_initramfs(kernel, print, (), extra)
    image, port, config = folder / "disk.img", free_port(), folder / "uml.toml"
    image.touch()
    os.truncate(image, 64 * MIB)
    (folder / "sixes.py").write_text(SIXES)
    keys = "inband_notifications = true\n" if inband else ""
    text = re.sub(r"^socket = .*\n", rf"\g<0>{keys}", CONFIG, flags=re.MULTILINE)
    config.write_text(text.replace("PORT", str(port)))
    async with serve(config, folder, port) as daemon, AsyncExitStack() as stack:
        relays = {
            name: await stack.enter_async_context(relay(folder / f"{name}.relay", folder / f"{name}.sock"))
            for name in DEVICES
        }
        devices = [UmlDevice(relays[name].path, virtio_id) for name, virtio_id in DEVICES.items()]
        async with boot_uml(kernel, initramfs, devices) as guest:
            async with talking(folder / "keyboard.control") as typist:
                await every_device_works(guest, folder, typist)
            await nothing_broke(daemon)
            for name, each in relays.items():
                assert notifies(each.said) == ({"VRING_KICK"} if inband else {"kick fd", "call fd"}), name
            await guest.power_off()


async def test_a_guest_that_skips_the_time_in_which_it_would_wait_uses_a_disk_by_messages(
    kernel: Kernel, folder: Path
) -> None:
    initramfs, image, port, config = (
        prepare_initramfs(kernel, print, ()),
        folder / "disk.img",
        free_port(),
        folder / "c",
    )
    image.touch()
    os.truncate(image, 64 * MIB)
    keys = 'type = "blk"\npath = "disk.img"\nsocket = "disk.sock"\ninband_notifications = true\n'
    config.write_text(f'[daemon]\nmetrics = "127.0.0.1:{port}"\n[devices.disk]\n{keys}')
    async with (
        serve(config, folder, port),
        relay(folder / "disk.relay", folder / "disk.sock") as between,
        boot_uml(kernel, initramfs, [UmlDevice(between.path, 2)], append="time-travel") as guest,
    ):
        await guest.run("sleep 100000")  # longer than any test
        await disk_keeps(guest, "vda", image, 1)
        assert notifies(between.said) == {"VRING_KICK"}
        await guest.power_off()


async def every_device_works(guest: Console, folder: Path, typist: Talker) -> None:
    await disk_keeps(guest, "vda", folder / "disk.img", 1)
    await page_comes_from_the_host(guest, folder)
    await guest_to_host(guest, folder)
    await host_to_guest(guest, folder)
    await terminal_speaks_both_ways(guest, folder)
    await random_bytes_and_sixes_come(guest)
    await lines_are_driven_and_read(guest)
    await chips_are_found(guest)
    await keys_arrive_and_a_light_is_told(guest, typist)


async def nothing_broke(daemon: Daemon) -> None:
    metrics = await daemon.metrics()
    for name in ("hyperbell_queue_broken", "hyperbell_protocol_errors_total"):
        assert metrics.total(name) == 0, name
    requests = metrics.by("device", "hyperbell_requests_total")
    errors = metrics.by("device", "hyperbell_request_errors_total")
    for device in DEVICES:
        assert requests[device] > 0, device
        assert device == "bus" or errors[device] == 0, device  # who is looked for and not there is an error
