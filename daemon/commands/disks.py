"""``hyperbell reopen`` and ``hyperbell retry``: a disk whose storage failed, while the daemon runs."""

from __future__ import annotations

import argparse
from typing import Final

from daemon.commands.command import EXIT_OK, Command, add_control, control_of
from daemon.running.control import ask
from daemon.running.files import FILES_SECONDS

REOPEN_EPILOG: Final = """\
After a flush of a disk has failed every flush fails, because the kernel forgets what it could not write. This opens the
image again, syncs it, and lets flushes succeed. What was lost before stays lost: check the guest's file systems. The
guest may run meanwhile. Refused while the storage still fails, and where the path is another file by now.

example:
  hyperbell reopen disk /etc/hyperbell/hyperbell.toml
"""
RETRY_EPILOG: Final = """\
A disk with on_error = "stop" keeps the requests that its storage fails, and every request after them. They are tried
again by themselves after 1 s, 2 s, ... up to 60 s; this tries them now, say when there is room again.

example:
  hyperbell retry disk /etc/hyperbell/hyperbell.toml
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="the disk's name in the configuration")
    add_control(parser)


def reopen(arguments: argparse.Namespace) -> int:
    """Open a disk's image again, in the running daemon."""
    ask(control_of(arguments), "reopen", device=arguments.device, wait_seconds=FILES_SECONDS + 5)
    print(f"{arguments.device}: opened again; check the file systems of its guest")
    return EXIT_OK


def retry(arguments: argparse.Namespace) -> int:
    """Try again what a stopped disk keeps, in the running daemon."""
    answer = ask(control_of(arguments), "retry", device=arguments.device)
    print(f"{arguments.device}: {'tried again' if answer['stopped'] else 'not stopped'}")
    return EXIT_OK


REOPEN: Final = Command("reopen", "open a disk's image again after a flush failed", reopen, add_options, REOPEN_EPILOG)
RETRY: Final = Command("retry", "try again the requests that a stopped disk keeps", retry, add_options, RETRY_EPILOG)
