"""An H with Debian's generic kernel, which has what keys, pins and buses need, and with an I2C adapter that is real.

The adapter is a virtio device of its own QEMU's, served by a daemon beside it: to H's kernel one as any other.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio
from kit.host.line_client import Talker
from nested.microvm import ON_TERMINAL

from guest.boot.initramfs import compiled_program, module_order
from guest.boot.service import READY_SECONDS, ServiceError, hyperbell_command, qemu_arguments
from guest.debian.kernel import GENERIC_META_PACKAGE, module_files, prepare_kernel, read_module
from guest.debian.kernel_source import DRIVERS, GUEST_DRIVERS, prepare_drivers
from guest.nested.host import LIFETIME_SECONDS, MEMORY_MIB
from guest.nested.images import Images, prepare_images
from guest.nested.level import Level

EEPROM = 0x50
CONFIG = f"""
[daemon]
metrics = "off"

[devices.bus]
type = "i2c"
socket = "bus.sock"

[[devices.bus.chips]]
kind = "eeprom"
address = {EEPROM}
"""
# ext4 is built in nowhere but in the cloud kernel. Up to Linux 6.12 it asks for CRC32C by name; later there is no such
# module.
CHECKSUM = "crc32c_generic"
VIRTIO_DRIVERS = ("virtio_mmio", "virtio_net", "vmw_vsock_virtio_transport", "virtio_input")
MODULES = ("ext4", *VIRTIO_DRIVERS, "evdev", "uinput", "i2c-dev")
# Passed on line by line; busybox knows no Unix sockets.
BRIDGE = """\
import socket, sys, threading
sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1]); lines = sock.makefile("r")
def come():
    for line in lines: print(line, end="", flush=True)
threading.Thread(target=come, daemon=True).start()
for line in open(sys.argv[2]): sock.sendall(line.encode())
"""


def pins_images() -> Images:
    """One initramfs for H and for its guests of both kinds; what is loaded only where it is wanted lies in /."""
    kernel = prepare_kernel(print, GENERIC_META_PACKAGE)
    drivers = prepare_drivers(kernel, print)
    drivers |= prepare_drivers(kernel, print, [name for name in DRIVERS if name not in GUEST_DRIVERS])
    for name, path in module_order(kernel.modules, ["i2c-stub"]).items():
        drivers[name] = read_module(path)
    extra = {f"/{name}.ko": module for name, module in drivers.items()}
    extra["/on-terminal"] = ON_TERMINAL
    extra["/bin/edges"] = compiled_program("edges", ["edges.c"], print)
    checksum = [CHECKSUM] if CHECKSUM in module_files(kernel.modules) else []
    return prepare_images(kernel, print, [*checksum, *MODULES], extra)


@contextmanager
def adapter_for_h() -> Iterator[list[str]]:
    """What H's QEMU must be told to have the adapter, which is served meanwhile: beyond one test's event loop."""
    with tempfile.TemporaryDirectory(prefix="hyperbell-") as name:
        config = Path(name, "bus.toml")
        config.write_text(CONFIG)
        daemon = _serve(config)
        try:
            yield trio.run(qemu_arguments, config, MEMORY_MIB)
        finally:
            daemon.terminate()  # timeout(1) hands it on
            daemon.wait()


def _serve(config: Path) -> subprocess.Popen[bytes]:
    """A daemon from its READY=1 on."""
    path, log = config.with_name("notify.sock"), config.with_name("daemon.log")
    command = ["timeout", "--signal=KILL", str(LIFETIME_SECONDS), str(hyperbell_command()), "serve", str(config)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver, log.open("wb") as said:
        receiver.bind(str(path))
        receiver.settimeout(READY_SECONDS)
        daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env={**os.environ, "NOTIFY_SOCKET": str(path)}
        )
        try:
            while b"READY=1" not in receiver.recv(4096).split(b"\n"):
                pass
        except TimeoutError:
            daemon.terminate()
            daemon.wait()
            raise ServiceError(f"no daemon for H's I2C adapter: {log.read_text()}") from None
    return daemon


class HostTalker(Talker):
    """At a socket in ``host``, by way of a file that is ``log`` there and a FIFO."""

    def __init__(self, host: Level, fifo: str, log: str) -> None:
        self._host = host
        self._fifo = fifo
        self._log = log
        self._taken = 0

    async def send(self, text: str) -> None:
        await self._host.run(f"echo '{text}' >{self._fifo}")

    async def line(self) -> str:
        self._taken += 1
        there = f"[ $(wc -l <{self._log}) -ge {self._taken} ]"
        answer = await self._host.run(f"until {there}; do usleep 10000; done; sed -n {self._taken}p {self._log}")
        return answer.lines[0]


@asynccontextmanager
async def talking_in(host: Level, path: str, name: str) -> AsyncIterator[HostTalker]:
    """A client of the socket ``path`` in ``host``."""
    fifo = f"/run/{name}.fifo"
    await host.write("/tmp/bridge.py", BRIDGE)
    await host.run(f"rm -f {fifo}; mkfifo {fifo}")
    # Open for reading and writing, so that no end of a command is the end of all.
    command = f"sh -c 'exec 3<>{fifo}; exec python3 -S /tmp/bridge.py {path} {fifo}'"
    async with host.job(name, command) as job:
        yield HostTalker(host, fifo, job.log_path)
