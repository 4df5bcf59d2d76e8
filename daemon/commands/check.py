"""``hyperbell check``: everything that is wrong with a configuration, on this host."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from config.problems import ConfigError
from daemon.checks.host import become
from daemon.checks.preflight import foreign_packages, host_faults, host_notes
from daemon.commands.command import EXIT_OK, Command, add_file, load_config
from daemon.running.descriptors import too_few
from virtio.errors import HostError

EPILOG: Final = """\
FILE and its drop-ins FILE.d/*.toml are merged in the order of their names; the later file wins, key by key.
Mistakes are printed as FILE:LINE: [TABLE] KEY: what is wrong, with a second line that says what would be right,
and the exit status is 78. What lies at a path and can never be served (a directory as an image, an image of no whole
blocks) is a mistake, too. Notes are about this host as it is now, and change nothing.

  sudo hyperbell check --user hyperbell /etc/hyperbell/hyperbell.toml
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    text = "look at this host as that user, the service's for instance: what it may not open is a mistake (as root)"
    parser.add_argument("--user", metavar="USER", help=text)


def check(arguments: argparse.Namespace) -> int:
    """Say everything that is wrong with a configuration."""
    if arguments.user is not None:
        become(arguments.user)
    config = load_config(arguments.file)
    faults = host_faults(config, as_daemon=arguments.user is not None)
    if faults:
        raise ConfigError(faults)
    for package, owners in foreign_packages().items():
        raise HostError(
            f'the package "{package}" here belongs to {", ".join(owners)} too, which may have overwritten ours; '
            "install hyperbell into a virtual environment of its own"
        )
    for note in host_notes(config):
        print(f"note: {note}", file=sys.stderr)
    if shortage := too_few(config):
        print(f"note: {shortage}", file=sys.stderr)
    devices = ", ".join(f"{device.name} ({device.common.type})" for device in config.devices.values())
    print(f"{config.path}: correct. Devices: {devices}")
    return EXIT_OK


COMMAND: Final = Command("check", "print every mistake in a configuration", check, add_options, EPILOG)
