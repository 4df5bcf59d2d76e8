"""``hyperbell microvm``: a Linux guest of our own."""

from __future__ import annotations

import argparse
from typing import Final

from daemon.commands.command import Command, memory_size
from daemon.microvm.options import EPILOG
from daemon.microvm.options import add_options as add_machine_options


def add_options(parser: argparse.ArgumentParser) -> None:
    add_machine_options(parser, memory_size)


def microvm(arguments: argparse.Namespace) -> int:
    """Run a Linux guest of our own."""
    from daemon.microvm.run import run  # only here: nothing else needs a KVM that can be talked to

    return run(arguments)


COMMAND: Final = Command(
    "microvm", "run a Linux guest on virtio-mmio devices of ours, without QEMU", microvm, add_options, EPILOG
)
