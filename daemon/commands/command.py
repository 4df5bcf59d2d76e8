"""What a command is, and what several commands share: options, exit statuses, the configuration."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from config.loader import Config, load
from daemon.devices.catalogue import device_types
from daemon.log import setup as log
from transports import TRANSPORTS
from virtio.errors import HostError

EXIT_OK: Final = 0
EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2  # argparse's own
EXIT_CONFIG: Final = 78  # EX_CONFIG of sysexits.h
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as a shell has it


@dataclass(frozen=True)
class Command:
    """``text`` is its line in the list of commands, ``epilog`` what its --help ends with.

    ``run`` returns the exit status; ``ConfigError`` and ``HostError`` become one clear message and theirs.
    """

    name: str
    text: str
    run: Callable[[argparse.Namespace], int]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    epilog: str = ""


def load_config(path: Path, *, lenient: bool = False) -> Config:
    """The configuration at ``path``, checked against what this daemon has to offer."""
    return load(path, device_types(), TRANSPORTS, lenient=lenient)


def add_log_options(parser: argparse.ArgumentParser, default: str | None) -> None:
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


def add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="configuration (TOML)")


def add_control(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("file", metavar="FILE", type=Path, nargs="?", help="configuration that names the control socket")
    which.add_argument("--control", metavar="PATH", type=Path, help="the control socket itself")


def control_of(arguments: argparse.Namespace) -> Path:
    """The control socket that the command line gives, or the configuration that it names."""
    if arguments.control is not None:
        path: Path = arguments.control
        return path
    config = load_config(arguments.file, lenient=True)
    if config.daemon.control is None:
        raise HostError(
            f'{config.path} has no control socket; add to [daemon]: control = "/run/hyperbell/control.sock"'
        )
    return config.daemon.control


def add_vm_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the VM, for the hypercall doorbell")
    group.add_argument("--name", metavar="NAME", help="its name in metrics and logs (default: vm0, vm1, ...)")
    group.add_argument("--key", metavar="HEX", help="its key, 24 bits; drawn at every start if nothing gives one")
    group.add_argument("--secret", metavar="FILE", type=Path, help="the file with the secret to derive its key from")
    group.add_argument("--uuid", metavar="UUID", help="with --secret: the VM's UUID")


def vm_options(arguments: argparse.Namespace) -> list[str]:
    """What was given of ``add_vm_options``, as words of a command line."""
    given = ((name, getattr(arguments, name)) for name in ("name", "key", "secret", "uuid"))
    return [word for name, value in given if value is not None for word in (f"--{name}", str(value))]


def memory_size(text: str) -> str:
    if re.fullmatch(r"[1-9]\d{0,6}[MG]", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256M or 4G")
    return text
