"""``hyperbell doorbells``: what each kind of doorbell costs on this host."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from daemon.commands.command import EXIT_FAILURE, EXIT_OK, Command
from daemon.doorbells.measure import run as run_doorbells

EPILOG: Final = """\
Needs /dev/kvm. A guest of its own rings every kind of doorbell that works here, for about three seconds; the other
kinds are named with the reason. Exit status 1: nothing could be measured.

With the file that --save writes, the daemon turns rates into shares of a CPU (metrics, hyperbell show):
  [daemon]
  doorbell_costs = "/var/lib/hyperbell/doorbells.json"

examples:
  hyperbell doorbells
  hyperbell doorbells --json --save /var/lib/hyperbell/doorbells.json
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--save", metavar="PATH", type=Path, help="also write the JSON there, for the daemon")


def doorbells(arguments: argparse.Namespace) -> int:
    """Measure the doorbells of this host."""
    return EXIT_OK if run_doorbells(as_json=arguments.json, save_to=arguments.save) else EXIT_FAILURE


COMMAND: Final = Command("doorbells", "measure what each kind of doorbell costs", doorbells, add_options, EPILOG)
