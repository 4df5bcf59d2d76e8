"""All commands, in the order in which --help lists them."""

from __future__ import annotations

from typing import Final

from daemon.commands import (
    check,
    disks,
    doorbells,
    front_ends,
    hypercall,
    link,
    microvm,
    new_device,
    qemu,
    schema,
    serve,
    show,
)
from daemon.commands.command import Command

COMMANDS: Final[tuple[Command, ...]] = (
    serve.COMMAND,
    check.COMMAND,
    front_ends.QEMU_ARGS,
    front_ends.ATTACH,
    front_ends.UML,
    qemu.COMMAND,
    hypercall.COMMAND,
    link.COMMAND,
    disks.REOPEN,
    disks.RETRY,
    microvm.COMMAND,
    new_device.COMMAND,
    schema.COMMAND,
    show.COMMAND,
    doorbells.COMMAND,
)
