"""``hyperbell microvm`` in H: a level boots it as it does QEMU."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from guest.nested.level import NestedMachine

# The terminal's driver is a module too: nobody can speak there before it is loaded, so init proper begins after that.
ON_TERMINAL = b"""\
#!/bin/busybox sh
/bin/busybox mkdir /run
/bin/busybox mount -t devtmpfs devtmpfs /dev
while read -r module; do /bin/busybox insmod "/modules/$module.ko"; done </modules/order
: >/modules/order
exec /init </dev/hvc0 >/dev/hvc0 2>&1
"""
"""What its initrd has as /on-terminal."""


@dataclass(frozen=True)
class Microvm(NestedMachine):
    """``devices`` are its arguments."""

    initrd: str = "/project/boot/guest.cpio"

    def command(self, console: str, lines: Sequence[str], images: Sequence[str]) -> str:
        """Its terminal is the line itself; what it says beside it goes where QEMU's words would."""
        words = ["hyperbell", "microvm", "--kernel", "/boot/vmlinux", "--initrd", self.initrd]
        words += ["--memory", f"{self.memory_mib}M", "--cpus", str(self.cpus)]
        words += ["--append", "quiet rdinit=/on-terminal", *self.devices]
        return f"sh -c {shlex.quote(f'exec {shlex.join(words)} <{console} >{console}')}"
