"""A real guest's network driver cannot change the size of a ring beneath us: QEMU would not tell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from guests.testbed import Testbed

from guest.boot.initramfs import compiled_program, prepare_initramfs
from guest.boot.machine import Machine, shared_memory
from guest.boot.service import free_port, serve
from virtio.spec import VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1

pytestmark = pytest.mark.guest

ADDRESS, GROUP = "10.9.0.1", "239.1.2.3"
COUNTED = "cat /sys/class/net/eth0/statistics/rx_packets"
CONFIG = """
[devices.vm]
type = "net"
backend = "null"
frames = "reflect"
socket = "vm.sock"
"""


async def test_a_guest_is_refused_other_ring_sizes_and_its_frames_go_on(testbed: Testbed, folder: Path) -> None:
    program = {"/bin/ringsize": compiled_program("ringsize", ["ringsize.c"], print)}
    initramfs = prepare_initramfs(testbed.kernel, print, ("virtio_pci", "virtio_net"), program)
    config = folder / "net.toml"
    port = free_port()
    config.write_text(f'[daemon]\nmetrics = "127.0.0.1:{port}"\n{CONFIG}')
    devices = [
        *shared_memory(256),
        *("-chardev", f"socket,id=net,path={folder}/vm.sock", "-netdev", "vhost-user,id=net0,chardev=net"),
        # Without MSI-X: under TCG, QEMU 7.2 follows a null pointer when the guest unmasks a vector of it.
        *("-device", "virtio-net-pci,netdev=net0,disable-legacy=on,vectors=0"),
    ]
    async with (
        serve(config, folder, port) as daemon,
        testbed.hypervisor.boot(Machine(testbed.kernel.image, initramfs, devices)) as guest,
    ):
        (features,) = (await guest.run("cat /sys/class/net/eth0/device/features")).lines
        assert features[VIRTIO_F_VERSION_1] == "1"
        assert features[VIRTIO_F_RING_RESET] == "0"
        await guest.run(f"ip link set eth0 up && ip addr add {ADDRESS}/24 dev eth0")
        await guest.run("ip route add 224.0.0.0/4 dev eth0")
        sizes = (await guest.run("ringsize eth0")).lines
        assert re.fullmatch(r"receive (256|1024) transmit \1", sizes[0]), "QEMU's, told none: 10.0.13's are the larger"
        await guest.run("ringsize eth0 128 2>/tmp/refused", status=1)  # not to the console: Linux 7.3 says so there too
        refused = (await guest.run("cat /tmp/refused")).lines
        assert refused == ["ringsize: 128: No such file or directory"], "ENOENT: the ring cannot be reset"
        assert (await guest.run("ringsize eth0")).lines == sizes
        # More frames than either ring has entries: each comes back, none is lost in a ring that is no more.
        rounds = int(sizes[0].split()[-1]) // 256
        pings = f"for i in $(seq 300); do ping -c 1 -W 1 {GROUP} & done; wait"
        await guest.run(f"for round in $(seq {rounds}); do {pings}; done; true", timeout_seconds=60 * rounds)
        await guest.run(f"until [ $({COUNTED}) -ge {300 * rounds} ]; do usleep 10000; done")
        assert (await daemon.metrics()).total("hyperbell_request_errors_total", device="vm") == 0
        await guest.power_off()
        await daemon.stop()
