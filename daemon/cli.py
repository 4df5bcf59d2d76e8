"""The command ``hyperbell``."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
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
from daemon.doorbells import run as run_doorbells
from daemon.failures import leaves
from daemon.links import EPILOG as LINK_EPILOG
from daemon.links import add_options as add_link_options
from daemon.microvm_options import EPILOG as MICROVM_EPILOG
from daemon.microvm_options import add_options as add_microvm_options
from daemon.new_device import EPILOG as NEW_DEVICE_EPILOG
from daemon.new_device import add_arguments as add_new_device_arguments
from daemon.new_device import new_device
from daemon.policies import POLICIES
from daemon.preflight import check_inherited_sockets, foreign_packages, host_notes
from daemon.qemu_args import hypercall_notes, libvirt_xml, pasteable, qemu_arguments, why_not
from daemon.qemu_start import chosen_key, hypercall_socket, preload_environment, run_qemu
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
    if arguments.hypercall:
        for note in hypercall_notes(config, q35=arguments.machine != "pc"):
            print(f"note: {note}", file=sys.stderr)
    if not arguments.libvirt:
        machine = arguments.machine or ""
        print(pasteable(qemu_arguments(possible, arguments.memory, machine, hypercall=arguments.hypercall)))
        return EXIT_OK
    environment = None
    if arguments.hypercall:
        key = chosen_key(arguments.key, arguments.secret, arguments.uuid)
        environment = preload_environment(hypercall_socket(config), key, arguments.name)
    print(libvirt_xml(possible, _mebibytes(arguments.memory), environment))
    return EXIT_OK


def qemu(arguments: argparse.Namespace) -> int:
    """Become QEMU, with the preload library."""
    socket = arguments.socket
    if socket is None:
        socket = hypercall_socket(load_config(arguments.config))
    key = chosen_key(arguments.key, arguments.secret, arguments.uuid)
    run_qemu(arguments.command, preload_environment(socket, key, arguments.name))


def hypercall(arguments: argparse.Namespace) -> int:
    """Change who may ring by hypercall, in the running daemon."""
    answer = ask(_control_of(arguments), "hypercall", device=arguments.device, policy=arguments.policy)
    print(f"{arguments.device}: {arguments.policy}{'' if answer['changed'] else ' (as before)'}")
    return EXIT_OK


def link(arguments: argparse.Namespace) -> int:
    """Plug a network interface's cable in or out, in the running daemon."""
    answer = ask(_control_of(arguments), "link", device=arguments.device, state=arguments.state)
    print(f"{arguments.device}: {arguments.state}{'' if answer['changed'] else ' (as before)'}")
    if not answer["guest_is_told"]:
        print(
            f"note: {arguments.device}: no guest is told of it: none is connected, or its front-end (QEMU's is such) "
            "takes no notice",
            file=sys.stderr,
        )
    return EXIT_OK


def microvm(arguments: argparse.Namespace) -> int:
    """Run a Linux guest of our own."""
    from daemon.microvm import run  # only here: nothing else needs a KVM that can be talked to

    return run(arguments)


def schema(arguments: argparse.Namespace) -> int:
    """Print the JSON schema of the configuration."""
    print(json.dumps(json_schema(device_types(), TRANSPORTS), indent=2))
    return EXIT_OK


def show(arguments: argparse.Namespace) -> int:
    """Print what a running daemon does."""
    stats = ask(_control_of(arguments), "stats")
    print(json.dumps(stats, indent=2) if arguments.json else render(stats))
    return EXIT_OK


def _control_of(arguments: argparse.Namespace) -> Path:
    """The control socket that the command line gives, or the configuration that it names."""
    if arguments.control is not None:
        path: Path = arguments.control
        return path
    config = load_config(arguments.file)
    if config.daemon.control is None:
        raise HostError(
            f'{config.path} has no control socket; add to [daemon]: control = "/run/hyperbell/control.sock"'
        )
    return config.daemon.control


def doorbells(arguments: argparse.Namespace) -> int:
    """Measure the doorbells of this host."""
    return EXIT_OK if run_doorbells(as_json=arguments.json, save_to=arguments.save) else EXIT_FAILURE


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
    _add_start_options(add("qemu", qemu, "start QEMU so that its guest can ring by hypercall", _START_EPILOG))
    _add_hypercall_options(add("hypercall", hypercall, "change who may ring by hypercall", _HYPERCALL_EPILOG))
    link_parser = add("link", link, "plug a network interface's cable in or out", LINK_EPILOG)
    add_link_options(link_parser)
    _add_control(link_parser)
    text = "run a Linux guest on virtio-mmio devices of ours, without QEMU"
    add_microvm_options(add("microvm", microvm, text, MICROVM_EPILOG), _memory)
    add_new_device_arguments(add("new-device", new_device, "write a device, its test and its file", NEW_DEVICE_EPILOG))
    add("schema", schema, "print the JSON schema (2020-12) of the configuration")
    _add_show_options(add("show", show, "print what a running daemon serves and counts", _SHOW_EPILOG))
    _add_doorbell_options(add("doorbells", doorbells, "measure what each kind of doorbell costs", _DOORBELLS_EPILOG))
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
  hyperbell qemu-args disk.toml --hypercall           with what the hypercall doorbell needs; see hyperbell qemu

The guest's memory is shared with the daemon, so -m and the memory backend belong to the options.
"""
_START_EPILOG: Final = """\
The daemon must run with [daemon] hypercall_socket, and the guest needs -accel kvm, -cpu host,hv-relaxed and
modern-pio-notify=on on its devices (hyperbell qemu-args --hypercall prints them) and a driver that rings by hypercall.
Without any of them, or without the daemon, the guest rings as ever.

A VM that is migrated, saved or restored needs a key that stays the same: --secret and --uuid, or --key.

examples:
  hyperbell qemu --config disk.toml -- qemu-system-x86_64 -accel kvm -cpu host,hv-relaxed ...
  hyperbell qemu --socket /run/hyperbell/hypercall.sock --name web1 \\
      --secret /etc/hyperbell/secret --uuid 8a1f... -- qemu-system-x86_64 ...
"""
_HYPERCALL_EPILOG: Final = """\
offer     the device's queues get connection ids in every VM that has the platform key
withhold  they get none; ids that are there are taken away, and the guest's next ring falls back to the plain doorbell
auto      as offer, but not for a guest that is shown VMX or SVM, that is, one that can itself be a hypervisor

The change lasts until the daemon ends; the key hypercall of [devices.NAME] is what it starts with.

example:
  hyperbell hypercall disk withhold --control /run/hyperbell/control.sock
"""
_SHOW_EPILOG: Final = """\
The configuration must have a control socket, and the daemon that serves it must run:
  [daemon]
  control = "/run/hyperbell/control.sock"

examples:
  hyperbell show /etc/hyperbell/hyperbell.toml
  hyperbell show --control /run/hyperbell/control.sock --json
"""
_DOORBELLS_EPILOG: Final = """\
Needs /dev/kvm. A guest of its own rings every kind of doorbell that works here, for about three seconds; the other
kinds are named with the reason. Exit status 1: nothing could be measured.

With the file that --save writes, the daemon turns rates into shares of a CPU (metrics, hyperbell show):
  [daemon]
  doorbell_costs = "/var/lib/hyperbell/doorbells.json"

examples:
  hyperbell doorbells
  hyperbell doorbells --json --save /var/lib/hyperbell/doorbells.json
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
    parser.add_argument("--hypercall", action="store_true", help="with what the hypercall doorbell needs")
    _add_vm_options(parser)


def _add_vm_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the VM, for the hypercall doorbell")
    group.add_argument("--name", metavar="NAME", help="its name in metrics and logs (default: vm0, vm1, ...)")
    group.add_argument("--key", metavar="HEX", help="its key, 24 bits; drawn at every start if nothing gives one")
    group.add_argument("--secret", metavar="FILE", type=Path, help="the file with the secret to derive its key from")
    group.add_argument("--uuid", metavar="UUID", help="with --secret: the VM's UUID")


def _add_start_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", metavar="FILE", type=Path, help="configuration that names the hypercall socket")
    which.add_argument("--socket", metavar="PATH", type=Path, help="the hypercall socket itself")
    _add_vm_options(parser)
    parser.add_argument("command", metavar="QEMU", nargs="+", help="QEMU and its arguments, after --")


def _add_hypercall_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="the device's name in the configuration")
    parser.add_argument("policy", choices=POLICIES, help="see below")
    _add_control(parser)


def _add_show_options(parser: argparse.ArgumentParser) -> None:
    _add_control(parser)
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def _add_control(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("file", metavar="FILE", type=Path, nargs="?", help="configuration that names the control socket")
    which.add_argument("--control", metavar="PATH", type=Path, help="the control socket itself")


def _add_doorbell_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--save", metavar="PATH", type=Path, help="also write the JSON there, for the daemon")


def _memory(text: str) -> str:
    if re.fullmatch(r"[1-9]\d{0,6}[MG]", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256M or 4G")
    return text


def _mebibytes(memory: str) -> int:
    return int(memory[:-1]) * (1024 if memory.endswith("G") else 1)


if __name__ == "__main__":
    sys.exit(main())
