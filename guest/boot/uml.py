"""User-mode Linux: a real Linux kernel that is a process of this machine, up in a second without QEMU and without KVM.

Its devices are vhost-user sockets on its command line, its console speaks as ``guest/programs/init`` has it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from guest.boot.console import Listener
from guest.boot.machine import Guest, start_machine
from guest.debian.cache import PrepareError, Progress
from guest.debian.kernel import Kernel
from guest.debian.suites import open_suite

SUITES = {"6.1": "bookworm", "7.2": "sid"}
"""Debian's own, by the kernel they are. Drivers of blk, net, console and vsock."""
SERIES_VARIABLE = "HYPERBELL_UML"
SERIES = "6.1"
PACKAGE = "user-mode-linux"
PROGRAM = "usr/bin/linux.uml"
STARTED = "hyperbell-bin/linux.uml"
BOOT_SECONDS = 30.0


@dataclass(frozen=True)
class UmlDevice:
    """A device at ``socket``; ``virtio_id`` is the number of its type (virtio 1.3, section 5)."""

    socket: Path
    virtio_id: int


def prepare_uml(progress: Progress, series: str = "") -> Kernel:
    """Debian's User-mode Linux, downloaded and unpacked. Raises ``PrepareError`` with advice.

    ``series`` is one of ``SUITES``; unless given it is ``$HYPERBELL_UML``, or 6.1. It runs with its own suite's C
    library, which may be newer than this machine's.
    """
    suite = chosen_suite(SUITES, series)
    found = open_suite(suite, progress)
    tree = found.unpack([PACKAGE])
    modules = list(tree.folder.glob("usr/lib/uml/modules/*/kernel"))
    if len(modules) != 1 or not (tree.folder / PROGRAM).exists():
        raise PrepareError(f"{PACKAGE} of Debian {suite} has no {PROGRAM} with one folder of modules")
    image = tree.restarting_wrapper(tree.folder / STARTED, PROGRAM)
    return Kernel(f"{PACKAGE} {found.version(PACKAGE)}", image, modules[0])


def chosen_suite(suites: Mapping[str, str], series: str) -> str:
    """That of the Linux ``series``, or of the one that ``$HYPERBELL_UML`` names for a whole run."""
    series = series or os.environ.get(SERIES_VARIABLE) or SERIES
    if series not in suites:
        raise PrepareError(f"there is no User-mode Linux {series} ({SERIES_VARIABLE}); known are {', '.join(suites)}")
    return suites[series]


class UmlGuest(Guest):
    """A booted User-mode Linux."""

    kind = "User-mode Linux"


def linux_command(kernel: Kernel, initramfs: Path, folder: Path) -> list[str]:
    """User-mode Linux with its console on its standard streams, but without memory and devices.

    Its control socket and process id go to ``folder``; without the word they would be in the home folder.
    """
    return [
        *(str(kernel.image), f"initrd={initramfs}", "quiet", "panic=-1"),
        *("con=null", "con0=fd:0,fd:1", "ssl=null", f"uml_dir={folder}"),
    ]


@asynccontextmanager
async def boot_uml(
    kernel: Kernel,
    initramfs: Path,
    devices: Sequence[UmlDevice],
    *,
    memory_mib: int = 128,
    append: str = "",
    listen: Listener | None = None,
) -> AsyncIterator[UmlGuest]:
    """A guest that takes commands; it is ended when the block is left. ``MachineError`` if it does not boot."""
    with tempfile.TemporaryDirectory(prefix="hyperbell-uml-") as folder:
        command = [
            *linux_command(kernel, initramfs, Path(folder)),
            f"mem={memory_mib}M",
            *(f"virtio_uml.device={device.socket}:{device.virtio_id}" for device in devices),
            *append.split(),
        ]
        async with boot_command(command, listen) as guest:
            yield guest


@asynccontextmanager
async def boot_command(command: Sequence[str], listen: Listener | None = None) -> AsyncIterator[UmlGuest]:
    """The guest that is the program ``command``, otherwise as ``boot_uml``."""
    guest = UmlGuest(await start_machine(command), listen or (lambda line: None))
    try:
        await guest.expect_userspace(BOOT_SECONDS)
        await guest.expect_ready()
        yield guest
    finally:
        await guest.end()
