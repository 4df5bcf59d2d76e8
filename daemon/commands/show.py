"""``hyperbell show``: what a running daemon serves and counts."""

from __future__ import annotations

import argparse
import json
from typing import Final

from daemon.commands.command import EXIT_OK, Command, add_control, control_of
from daemon.commands.show_table import render
from daemon.running.control import ask

EPILOG: Final = """\
The configuration must have a control socket, and the daemon that serves it must run:
  [daemon]
  control = "/run/hyperbell/control.sock"

examples:
  hyperbell show /etc/hyperbell/hyperbell.toml
  hyperbell show --control /run/hyperbell/control.sock --json
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_control(parser)
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def show(arguments: argparse.Namespace) -> int:
    """Print what a running daemon does."""
    stats = ask(control_of(arguments), "stats")
    print(json.dumps(stats, indent=2) if arguments.json else render(stats))
    return EXIT_OK


COMMAND: Final = Command("show", "print what a running daemon serves and counts", show, add_options, EPILOG)
