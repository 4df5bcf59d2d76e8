"""``hyperbell qemu``: QEMU, started so that its guest can ring by hypercall."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from daemon.attach.qemu_start import chosen_key, hypercall_socket, preload_environment, run_qemu, without_kvm
from daemon.commands.command import Command, add_vm_options, load_config

EPILOG: Final = """\
The daemon must run with [daemon] hypercall_socket, and the guest needs -accel kvm, -cpu host,hv-relaxed and
modern-pio-notify=on on its devices (hyperbell qemu-args --hypercall prints them) and a driver that rings by hypercall.
Without any of them, or without the daemon, the guest rings as ever; without KVM a note says so, and QEMU starts.

A VM that is migrated, saved or restored needs a key that stays the same: --secret and --uuid, or --key.

examples:
  hyperbell qemu --config disk.toml -- qemu-system-x86_64 -accel kvm -cpu host,hv-relaxed ...
  hyperbell qemu --socket /run/hyperbell/hypercall.sock --name web1 \\
      --secret /etc/hyperbell/secret --uuid 8a1f... -- qemu-system-x86_64 ...
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", metavar="FILE", type=Path, help="configuration that names the hypercall socket")
    which.add_argument("--socket", metavar="PATH", type=Path, help="the hypercall socket itself")
    add_vm_options(parser)
    parser.add_argument("command", metavar="QEMU", nargs="+", help="QEMU and its arguments, after --")


def qemu(arguments: argparse.Namespace) -> int:
    """Become QEMU, with the preload library."""
    socket = arguments.socket
    if socket is None:
        socket = hypercall_socket(load_config(arguments.config))
    key = chosen_key(arguments.key, arguments.secret, arguments.uuid)
    environment = preload_environment(socket, key, arguments.name)
    reason = without_kvm(arguments.command)
    if reason:
        print(f"note: {reason}: the guest has no hypercall doorbell and rings by plain ones", file=sys.stderr)
    run_qemu(arguments.command, environment)


COMMAND: Final = Command("qemu", "start QEMU so that its guest can ring by hypercall", qemu, add_options, EPILOG)
