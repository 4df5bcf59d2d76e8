"""The command ``hyperbell``."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import structlog
import trio

from config.json_schema import json_schema
from config.loader import Config, load
from config.problems import ConfigError
from daemon import log
from daemon.app import App, LogChoice
from daemon.catalogue import device_types
from daemon.control import ask
from daemon.preflight import check_inherited_sockets, foreign_packages, host_notes
from daemon.qemu_args import libvirt_xml, pasteable, qemu_arguments, why_not
from daemon.show import render
from daemon.state import version
from daemon.systemd import Notifier
from transports import TRANSPORTS
from virtio.errors import HostError

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2  # argparse's own
EXIT_CONFIG: Final = 78  # EX_CONFIG of sysexits.h

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
    except BrokenPipeError:  # `hyperbell schema | head`: what is still buffered goes nowhere, without a complaint
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return EXIT_FAILURE


def load_config(path: Path) -> Config:
    """The configuration at ``path``, checked against what this daemon has to offer."""
    return load(path, device_types(), TRANSPORTS)


# Commands


def serve(arguments: argparse.Namespace) -> int:
    """Run the daemon in the foreground."""
    config = load_config(arguments.file)
    choice = LogChoice(arguments.log_level, arguments.log_format)
    choice.apply(config)
    check_inherited_sockets(config)
    app = App(config, lambda: load_config(arguments.file), choice, Notifier.from_environment())
    logger = structlog.get_logger()
    status = EXIT_OK
    try:
        trio.run(app.run)
    except* HostError as group:
        status = EXIT_FAILURE
        for error in leaves(group):
            logger.error("cannot serve", reason=str(error))
    except* KeyboardInterrupt:  # a second one, while the first was being obeyed
        status = EXIT_FAILURE
        logger.error("stopped before everything was closed")
    except* Exception as unforeseen:
        status = EXIT_FAILURE
        logger.error("stopped by a mistake in hyperbell", exc_info=unforeseen)
    logger.info("stopped", status=status)
    return status


def check(arguments: argparse.Namespace) -> int:
    """Say everything that is wrong with a configuration."""
    config = load_config(arguments.file)
    for package, owners in foreign_packages().items():
        raise HostError(
            f'the package "{package}" here belongs to {", ".join(owners)} too, which may have overwritten ours; '
            "install hyperbell into a virtual environment of its own"
        )
    for note in host_notes(config):
        print(f"note: {note}", file=sys.stderr)
    devices = ", ".join(f"{device.name} ({device.common.type})" for device in config.devices.values())
    print(f"{config.path}: correct. Devices: {devices}")
    return EXIT_OK


def qemu_args(arguments: argparse.Namespace) -> int:
    """Print how QEMU attaches the configured devices."""
    config = load_config(arguments.file)
    name = arguments.device
    if name is not None and name not in config.devices:
        raise HostError(f'{config.path} has no device "{name}"; it has: {", ".join(config.devices)}')
    wanted = [device for device in config.devices.values() if name in (None, device.name)]
    for device in wanted:
        if why_not(device):
            print(f"hyperbell: {why_not(device)}", file=sys.stderr)
    possible = [device for device in wanted if not why_not(device)]
    if not possible:
        return EXIT_FAILURE
    if arguments.libvirt:
        print(libvirt_xml(possible, _mebibytes(arguments.memory)))
    else:
        print(pasteable(qemu_arguments(possible, arguments.memory, arguments.machine or "")))
    return EXIT_OK


def schema(arguments: argparse.Namespace) -> int:
    """Print the JSON schema of the configuration."""
    print(json.dumps(json_schema(device_types(), TRANSPORTS), indent=2))
    return EXIT_OK


def show(arguments: argparse.Namespace) -> int:
    """Print what a running daemon does."""
    control = arguments.control
    if control is None:
        config = load_config(arguments.file)
        control = config.daemon.control
        if control is None:
            raise HostError(
                f'{config.path} has no control socket; add to [daemon]: control = "/run/hyperbell/control.sock"'
            )
    stats = ask(control, "stats")
    print(json.dumps(stats, indent=2) if arguments.json else render(stats))
    return EXIT_OK


def leaves(group: BaseExceptionGroup[HostError]) -> Iterator[HostError]:
    """The errors inside ``group``, however deep, each once."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


# Arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hyperbell",
        description="Serves virtio devices (disks, entropy, consoles) to QEMU/KVM guests over vhost-user.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hyperbell {version()}")
    _add_log_options(parser, default=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str, epilog: str = ""
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        # Also after the command; SUPPRESS keeps what stands before it.
        _add_log_options(command, default=argparse.SUPPRESS)
        return command

    _add_file(add("serve", serve, "run the daemon in the foreground", _SERVE_EPILOG))
    _add_file(add("check", check, "print every mistake in a configuration", _CHECK_EPILOG))
    _add_qemu_options(add("qemu-args", qemu_args, "print the QEMU options that attach the devices", _QEMU_EPILOG))
    add("schema", schema, "print the JSON schema (2020-12) of the configuration")
    _add_show_options(add("show", show, "print what a running daemon serves and counts", _SHOW_EPILOG))
    return parser


_SERVE_EPILOG: Final = """\
signals:
  SIGTERM, SIGINT  stop: in-flight requests are finished, sockets removed
  SIGHUP           reload: log level and format, sizes of images; what else changed is logged as "needs a restart"

example:
  hyperbell --log-format human serve /etc/hyperbell/hyperbell.toml
"""
_CHECK_EPILOG: Final = """\
FILE and its drop-ins FILE.d/*.toml are merged in the order of their names; the later file wins, key by key.
Mistakes are printed as FILE:LINE: [TABLE] KEY: what is wrong, with a second line that says what would be right,
and the exit status is 78. Notes are about this host and change nothing.
"""
_QEMU_EPILOG: Final = """\
examples:
  hyperbell qemu-args disk.toml                       every device of the file
  hyperbell qemu-args disk.toml disk --memory 4G      one of them, and a guest with 4 GiB
  eval "qemu-system-x86_64 -accel kvm $(hyperbell qemu-args disk.toml)"
  hyperbell qemu-args disk.toml --libvirt             XML for virsh edit

The guest's memory is shared with the daemon, so -m and the memory backend belong to the options.
"""
_SHOW_EPILOG: Final = """\
The configuration must have a control socket, and the daemon that serves it must run:
  [daemon]
  control = "/run/hyperbell/control.sock"

examples:
  hyperbell show /etc/hyperbell/hyperbell.toml
  hyperbell show --control /run/hyperbell/control.sock --json
"""


def _add_log_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log-level",
        choices=[*log.LEVELS][:4],
        default=default,
        help="least level to log (default: the file's, or info)",
    )
    group.add_argument(
        "--log-format",
        choices=log.FORMATS,
        default=default,
        help="auto: human on a terminal, journal under systemd, else json",
    )


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="configuration (TOML)")


def _add_qemu_options(parser: argparse.ArgumentParser) -> None:
    _add_file(parser)
    parser.add_argument("device", metavar="DEVICE", nargs="?", help="only this device")
    parser.add_argument("--libvirt", action="store_true", help="print the XML of a libvirt domain instead")
    parser.add_argument("--memory", metavar="SIZE", type=_memory, default="256M", help="the guest's RAM (256M)")
    parser.add_argument("--machine", choices=("q35", "pc"), help="also choose the machine type")


def _add_show_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("file", metavar="FILE", type=Path, nargs="?", help="configuration that names the control socket")
    which.add_argument("--control", metavar="PATH", type=Path, help="the control socket itself")
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def _memory(text: str) -> str:
    if re.fullmatch(r"[1-9]\d{0,6}[MG]", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256M or 4G")
    return text


def _mebibytes(memory: str) -> int:
    return int(memory[:-1]) * (1024 if memory.endswith("G") else 1)


if __name__ == "__main__":
    sys.exit(main())
