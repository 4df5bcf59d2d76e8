"""``hyperbell hypercall``: who may ring by hypercall, in the running daemon."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from daemon.commands.command import EXIT_OK, Command, add_control, control_of
from daemon.doorbells.policies import POLICIES
from daemon.running.control import ask

EPILOG: Final = """\
offer     the device's queues get connection ids in every VM that has the platform key
withhold  they get none; ids that are there are taken away, and the guest's next ring falls back to the plain doorbell
auto      as offer, but not for a guest that is shown VMX or SVM, that is, one that can itself be a hypervisor

The change lasts until the daemon ends; the key hypercall of [devices.NAME] is what it starts with.

example:
  hyperbell hypercall disk withhold --control /run/hyperbell/control.sock
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="the device's name in the configuration")
    parser.add_argument("policy", choices=POLICIES, help="see below")
    add_control(parser)


def hypercall(arguments: argparse.Namespace) -> int:
    """Change who may ring by hypercall, in the running daemon."""
    answer = ask(control_of(arguments), "hypercall", device=arguments.device, policy=arguments.policy)
    print(f"{arguments.device}: {arguments.policy}{'' if answer['changed'] else ' (as before)'}")
    if not answer.get("reaches_vms", True):  # a daemon of an earlier version says nothing of it
        print(
            f"note: {arguments.device}: no VM reports its doorbells now, so none could ring by hypercall; it would "
            "take [daemon] hypercall_socket, and a QEMU that hyperbell qemu has started",
            file=sys.stderr,
        )
    return EXIT_OK


COMMAND: Final = Command("hypercall", "change who may ring by hypercall", hypercall, add_options, EPILOG)
