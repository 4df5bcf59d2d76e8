"""What the commands of ``hyperbell`` take on the command line, and what their --help ends with.

Commands whose options are a matter of their own have them beside it: ``links``, ``microvm_options``, ``new_device``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Final

from daemon.doorbells.policies import POLICIES
from daemon.log import setup as log

SERVE_EPILOG: Final = """\
signals:
  SIGTERM, SIGINT  stop: in-flight requests are finished, sockets removed
  SIGHUP           reload: log level and format, each device's hypercall, and images that grew or shrank;
                   what else changed is logged as "needs a restart". Failed devices are tried again

A device that cannot be had (its image is missing, its tap is gone, its Python file fails) is logged, shown by
hyperbell show as failed, and tried again at SIGHUP and by itself, at first after a second and then ever more seldom,
up to once a minute. All other devices are served meanwhile. With --strict the daemon ends instead.

example:
  hyperbell --log-format human serve /etc/hyperbell/hyperbell.toml
"""
CHECK_EPILOG: Final = """\
FILE and its drop-ins FILE.d/*.toml are merged in the order of their names; the later file wins, key by key.
Mistakes are printed as FILE:LINE: [TABLE] KEY: what is wrong, with a second line that says what would be right,
and the exit status is 78. What lies at a path and can never be served (a directory as an image, an image of no whole
blocks) is a mistake, too. Notes are about this host as it is now, and change nothing.

  sudo hyperbell check --user hyperbell /etc/hyperbell/hyperbell.toml
"""
QEMU_EPILOG: Final = """\
The daemon must run with [daemon] hypercall_socket, and the guest needs -accel kvm, -cpu host,hv-relaxed and
modern-pio-notify=on on its devices (hyperbell qemu-args --hypercall prints them) and a driver that rings by hypercall.
Without any of them, or without the daemon, the guest rings as ever; without KVM a note says so, and QEMU starts.

A VM that is migrated, saved or restored needs a key that stays the same: --secret and --uuid, or --key.

examples:
  hyperbell qemu --config disk.toml -- qemu-system-x86_64 -accel kvm -cpu host,hv-relaxed ...
  hyperbell qemu --socket /run/hyperbell/hypercall.sock --name web1 \\
      --secret /etc/hyperbell/secret --uuid 8a1f... -- qemu-system-x86_64 ...
"""
HYPERCALL_EPILOG: Final = """\
offer     the device's queues get connection ids in every VM that has the platform key
withhold  they get none; ids that are there are taken away, and the guest's next ring falls back to the plain doorbell
auto      as offer, but not for a guest that is shown VMX or SVM, that is, one that can itself be a hypervisor

The change lasts until the daemon ends; the key hypercall of [devices.NAME] is what it starts with.

example:
  hyperbell hypercall disk withhold --control /run/hyperbell/control.sock
"""
SHOW_EPILOG: Final = """\
The configuration must have a control socket, and the daemon that serves it must run:
  [daemon]
  control = "/run/hyperbell/control.sock"

examples:
  hyperbell show /etc/hyperbell/hyperbell.toml
  hyperbell show --control /run/hyperbell/control.sock --json
"""
DOORBELLS_EPILOG: Final = """\
Needs /dev/kvm. A guest of its own rings every kind of doorbell that works here, for about three seconds; the other
kinds are named with the reason. Exit status 1: nothing could be measured.

With the file that --save writes, the daemon turns rates into shares of a CPU (metrics, hyperbell show):
  [daemon]
  doorbell_costs = "/var/lib/hyperbell/doorbells.json"

examples:
  hyperbell doorbells
  hyperbell doorbells --json --save /var/lib/hyperbell/doorbells.json
"""


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


def add_check_options(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    text = "look at this host as that user, the service's for instance: what it may not open is a mistake (as root)"
    parser.add_argument("--user", metavar="USER", help=text)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    parser.add_argument("--strict", action="store_true", help="end with status 1 when a device cannot be had")


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


def add_qemu_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", metavar="FILE", type=Path, help="configuration that names the hypercall socket")
    which.add_argument("--socket", metavar="PATH", type=Path, help="the hypercall socket itself")
    add_vm_options(parser)
    parser.add_argument("command", metavar="QEMU", nargs="+", help="QEMU and its arguments, after --")


def add_hypercall_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="the device's name in the configuration")
    parser.add_argument("policy", choices=POLICIES, help="see below")
    add_control(parser)


def add_show_options(parser: argparse.ArgumentParser) -> None:
    add_control(parser)
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def add_control(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("file", metavar="FILE", type=Path, nargs="?", help="configuration that names the control socket")
    which.add_argument("--control", metavar="PATH", type=Path, help="the control socket itself")


def add_doorbell_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--save", metavar="PATH", type=Path, help="also write the JSON there, for the daemon")


def memory_size(text: str) -> str:
    if re.fullmatch(r"[1-9]\d{0,6}[MG]", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256M or 4G")
    return text
