"""``hyperbell link``: a network interface's cable, plugged in or out in the running daemon."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from daemon.commands.command import EXIT_OK, Command, add_control, control_of
from daemon.running.control import ask
from daemon.running.links import STATES

EPILOG: Final = """\
With the link down nothing passes in either direction, and a guest whose front-end passes changes of the configuration
on sees that its cable is out: so it is in hyperbell microvm. QEMU (seen: 7.2) does not pass them on for network
interfaces: to show its guest the same, use set_link in QEMU's monitor as well.

The change lasts until the daemon ends.

example:
  hyperbell link lan down --control /run/hyperbell/control.sock
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="the interface's name in the configuration")
    parser.add_argument("state", choices=tuple(STATES), help="plugged in or not")
    add_control(parser)


def link(arguments: argparse.Namespace) -> int:
    """Plug a network interface's cable in or out, in the running daemon."""
    answer = ask(control_of(arguments), "link", device=arguments.device, state=arguments.state)
    print(f"{arguments.device}: {arguments.state}{'' if answer['changed'] else ' (as before)'}")
    if not answer["guest_is_told"]:
        print(
            f"note: {arguments.device}: no guest is told of it: none is connected, or its front-end (QEMU's is such) "
            "takes no notice",
            file=sys.stderr,
        )
    return EXIT_OK


COMMAND: Final = Command("link", "plug a network interface's cable in or out", link, add_options, EPILOG)
