"""The command ``hyperbell``: which command it is, and what becomes of its errors."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from config.problems import ConfigError
from daemon.commands.command import EXIT_CONFIG, EXIT_FAILURE, EXIT_INTERRUPTED, add_log_options
from daemon.commands.table import COMMANDS
from daemon.state import version
from virtio.devices import REGISTRY
from virtio.errors import HostError

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_EPILOG: Final = """\
a first disk:
  truncate -s 1G disk.img
  printf '[devices.disk]\\ntype = "blk"\\npath = "disk.img"\\nsocket = "disk.sock"\\n' > disk.toml
  hyperbell check disk.toml
  hyperbell serve disk.toml &
  eval "qemu-system-x86_64 -nographic -kernel vmlinuz -append console=ttyS0 $(hyperbell qemu-args disk.toml)"

Each command has its own --help. Exit status: 0 success, 1 failure, 2 wrong usage, 78 wrong configuration.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Wrong usage raises ``SystemExit(2)``, as argparse does."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        status = command(arguments)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        print(error, file=sys.stderr)
        count = len(error.problems)
        print(f"hyperbell: {count} mistake{'s' if count > 1 else ''} in the configuration", file=sys.stderr)
        return EXIT_CONFIG
    except HostError as error:
        print(f"hyperbell: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except BrokenPipeError:  # `hyperbell schema | head`
        _forget_output()
        return EXIT_FAILURE
    except OSError as error:
        if error.errno not in _NO_ROOM or error.filename is not None:  # a file's has its name
            raise
        _forget_output()
        print(f"hyperbell: the output cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BaseExceptionGroup as group:  # what trio makes of one, and of whatever else went wrong meanwhile
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        return EXIT_INTERRUPTED


def _forget_output() -> None:
    """What is still buffered goes nowhere, without a complaint at the end."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hyperbell",
        description=f"Serves virtio devices ({', '.join(sorted(REGISTRY))}, and any written in Python)\n"
        "to QEMU/KVM guests over vhost-user, and to guests of its own.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hyperbell {version()}")
    add_log_options(parser, default=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.text,
            description=command.text,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        subparser.set_defaults(run=command.run)
        # Also after the command; SUPPRESS keeps what stands before it.
        add_log_options(subparser, default=argparse.SUPPRESS)
        command.add_options(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
