"""A real driver that is unbound and bound again: Linux as a process (User-mode Linux), up in a second.

Its vhost-user front-end tells of it by nothing but ENABLE: the rings stay started, and are given base 0 again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import kit.front_end.vhost_user_wire as wire
import pytest
import trio
from structlog.testing import capture_logs

from guest.boot.initramfs import BUSYBOX, Entry, newc
from virtio.backend.backend import Backend
from virtio.devices.blk.device import Blk, BlkOptions
from virtio.native.worker import Worker
from virtio.socket_file import Listen
from virtio.spec import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED

MIB = 1 << 20
UML = shutil.which("linux.uml")
MODULES = Path("/usr/lib/uml/modules")
SECONDS = 60
AS_CONFIGURED = (VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_PACKED)  # this kernel's driver would take both, and fail
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
insmod /virtio_blk.ko
copy() {
	dd if=/dev/vda of=/tmp/half bs=64k count=16 2>/dev/null
	echo "READ $(sha256sum </tmp/half)"
	dd if=/tmp/half of=/dev/vda bs=64k seek=$((16 * $1)) count=16 conv=fsync 2>/dev/null && echo WROTE
}
copy 1
for turn in 2 3 4; do
	for device in $(ls /sys/bus/virtio/devices); do
		echo "$device" >/sys/bus/virtio/drivers/virtio_blk/unbind
		echo "$device" >/sys/bus/virtio/drivers/virtio_blk/bind
	done
	copy $turn
done
poweroff -f
"""

pytestmark = [
    pytest.mark.skipif(UML is None, reason="no linux.uml: apt-get install user-mode-linux"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="no busybox: apt-get install busybox-static"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as name:
        yield Path(name)


def pack(target: Path) -> None:
    """The guest's root: busybox, one module, and what is to be done."""
    (module,) = MODULES.glob("*/kernel/drivers/block/virtio_blk.ko")
    files = {"init": INIT.encode(), "bin/busybox": BUSYBOX.read_bytes(), "virtio_blk.ko": module.read_bytes()}
    entries = [Entry(name, stat.S_IFDIR | 0o755) for name in ("bin", "dev", "proc", "sys", "tmp")]
    entries.append(Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries += [Entry(name, stat.S_IFREG | 0o755, content) for name, content in files.items()]
    target.write_bytes(newc(entries))


async def run_uml(folder: Path, *options: str) -> str:
    """What the guest printed until it powered itself off."""
    command = ["timeout", "--signal=KILL", str(SECONDS), str(UML), "mem=128M", f"initrd={folder / 'root.cpio'}"]
    command += ["root=/dev/ram0", "rdinit=/init", "con=null", "con0=null,fd:1", "quiet", f"uml_dir={folder}"]
    done = await trio.run_process([*command, *options], capture_stdout=True, capture_stderr=True, check=False)
    return (done.stdout + done.stderr).decode(errors="replace")


@pytest.mark.parametrize("reactor", ["io_uring", "epoll"])
async def test_a_disk_works_for_every_driver_that_is_bound_to_it(folder: Path, reactor: str) -> None:
    image = folder / "disk.img"
    content = os.urandom(MIB)
    image.write_bytes(content + bytes(4 * MIB))
    pack(folder / "root.cpio")
    device = Blk("disk", BlkOptions(path=image), 1, 128)
    with capture_logs() as logs:
        async with (
            Worker("uml", reactor=reactor) as worker,
            Backend(device, workers=[worker], features_off=AS_CONFIGURED) as backend,
            wire.serving(backend, Listen(folder / "disk.sock"), limit=SECONDS + 10),
        ):
            printed = await run_uml(folder, f"virtio_uml.device={folder / 'disk.sock'}:2")
        device.close()
    digest = hashlib.sha256(content).hexdigest()
    assert re.findall(r"READ (\w+)", printed) == [digest] * 4, printed
    assert printed.count("WROTE") == 4
    assert image.read_bytes() == content * 5
    assert not [line for line in logs if line["log_level"] in ("warning", "error")]
